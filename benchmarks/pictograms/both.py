"""The search and the cells of the study in both.md, and its table.

python -m benchmarks.pictograms.both run METHOD [--wrong] [--data DIR]
python -m benchmarks.pictograms.both table
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.studies import records
from benchmarks.studies.cells import Setting, TowerCell
from benchmarks.studies.comparison import t_interval
from benchmarks.studies.pages import lead, percent, table

STUDY = Path(__file__).parent
ROOT = STUDY.parents[1]
NEW = ("both", "cross")
TOWER = "tiny-resnet"
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
SHORT, LONG = 3, 12
START = Setting(inv_tau=30.0, beta=8.0)
_NEXT_RATE = {5e-4: 2.5e-4, 1e-3: 7e-4, 2e-3: 4e-3}
_ROUNDS: tuple[Callable[[Setting], list[dict[str, Any]]], ...] = (
    lambda _: [
        {"inv_tau": inv_tau, "beta": beta}
        for inv_tau, beta in ((30.0, 16.0), (15.0, 8.0), (15.0, 16.0), (8.0, 16.0))
    ],
    lambda _: [{"lr": lr} for lr in (5e-4, 2e-3)],
    lambda best: [{"lr": _NEXT_RATE[best.lr]}],
    lambda _: [{"batch_size": n} for n in (64, 256)],
    lambda _: [{"weight_decay": decay} for decay in (0.02, 0.5)],
    lambda _: [{"inv_tau": 8.0, "beta": 32.0}],
)
"""What the study's search varied for CLOOB, round by round."""


class Search:
    """The study's search: a function of its records."""

    def __init__(self, method: str, done: Mapping[str, Mapping[str, Any]]) -> None:
        self.method = method
        self.scores = {name: r["val"]["mean_recall"] for name, r in done.items()}

    def cell(self, setting: Setting, epochs: int) -> TowerCell:
        return TowerCell("search", self.method, TOWER, SEARCH_SEED, epochs, setting)

    def missing(self) -> Iterator[TowerCell]:
        """What the search has to run next."""
        best = self.cell(START, SHORT)
        tried = [best]
        yield from self._unscored(tried)
        for values in _ROUNDS:
            near = [
                self.cell(dataclasses.replace(best.setting, **value), SHORT)
                for value in values(best.setting)
            ]
            yield from self._unscored(near)
            tried += near
            best = max([best, *near], key=lambda cell: self.scores[cell.id])
        yield from self._unscored(self.finalists(tried))

    def _unscored(self, cells: list[TowerCell]) -> Iterator[TowerCell]:
        yield from (cell for cell in cells if cell.id not in self.scores)

    def finalists(self, tried: list[TowerCell]) -> list[TowerCell]:
        """The published setting, the best, and the published temperatures with the
        best one's rate, batch and decay, or the second best.
        """
        ordered = sorted(tried[1:], key=lambda cell: -self.scores[cell.id])
        best, second = (cell.setting for cell in ordered[:2])
        tuned = dataclasses.replace(
            START,
            lr=best.lr,
            batch_size=best.batch_size,
            weight_decay=best.weight_decay,
        )
        third = second if tuned in (best, START) else tuned
        return [self.cell(setting, LONG) for setting in (START, best, third)]

    def best(self) -> Setting:
        long = [name for name in self.scores if f"_e{LONG}_" in name]
        name = max(long, key=lambda name: self.scores[name])
        found = records.read("search", STUDY)[name]["config"]["setting"]
        return Setting(**found)


def searched(method: str) -> dict[str, dict[str, Any]]:
    return {
        name: record
        for name, record in records.read("search", STUDY).items()
        if record["config"]["method"] == method
        and record["config"]["tower"] == TOWER
        and record["config"]["seed"] == SEARCH_SEED
    }


def wrong_search(setting: Setting, method: str) -> list[TowerCell]:
    """Four runs, as each method had with 40 % wrong captions."""
    around = (
        setting,
        dataclasses.replace(setting, inv_tau=30.0, beta=8.0),
        dataclasses.replace(setting, inv_tau=15.0, beta=8.0),
        dataclasses.replace(setting, weight_decay=2.0),
    )
    return [
        TowerCell("wrong-search", method, TOWER, SEARCH_SEED, LONG, each)
        for each in around
    ]


def run(method: str, wrong: bool, data: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    from benchmarks.pictograms.run import runner

    do = runner(data, ROOT / "runs" / "pictograms")

    def done(cell: TowerCell) -> None:
        if (cell.stage, cell.id) in records.names(STUDY):
            return
        print(f"{cell.stage}: {cell.id}", flush=True)
        record = do(cell)
        records.write(cell.stage, record, STUDY)
        recall = record["val"]["mean_recall"]
        print(f"  {record['cpu_seconds']} CPU s, {recall}", flush=True)

    if method in NEW:
        while True:
            cell = next(Search(method, searched(method)).missing(), None)
            if cell is None:
                break
            done(cell)
    best = Search(method, searched(method)).best()
    stage = "cells"
    if wrong:
        stage = "wrong"
        around = wrong_search(best, method)
        for cell in around:
            done(cell)
        scores = records.read("wrong-search", STUDY)
        chosen = max(around, key=lambda cell: scores[cell.id]["val"]["mean_recall"])
        best = chosen.setting
    if method not in NEW:  # a control of this machine and this code
        stage = "control"
    for seed in SEEDS if method in NEW else SEEDS[:1]:
        done(TowerCell(stage, method, TOWER, seed, LONG, best))


def print_table() -> None:
    """Zero-shot accuracy, mean of eight sets, and leads by seed."""
    for stage in ("cells", "wrong"):
        scores: dict[str, dict[int, float]] = {}
        for record in records.read(stage, STUDY).values():
            config = record["config"]
            if config["tower"] != TOWER or config["epochs"] != LONG:
                continue
            if config["setting"] != dataclasses.asdict(
                Search(config["method"], searched(config["method"])).best()
            ):
                continue
            sets = record["zeroshot"].values()
            mean = statistics.mean(each["acc1"] for each in sets)
            scores.setdefault(config["method"], {})[config["seed"]] = mean
        lines = []
        for method, ours in scores.items():
            line = [method, percent(statistics.mean(ours.values()))]
            for other in ("clip", "cloob", "infoloob"):
                seeds = sorted(set(ours) & set(scores[other]))
                gaps = [ours[seed] - scores[other][seed] for seed in seeds]
                line.append(lead(statistics.mean(gaps), t_interval(gaps)))
            lines.append(line)
        print(stage)
        head = ["method", "zero-shot, %", "− CLIP", "− CLOOB", "− InfoLOOB"]
        print(table(head, lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("method")
    running.add_argument("--wrong", action="store_true")
    running.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "table":
        print_table()
    else:
        run(options.method, options.wrong, options.data)


if __name__ == "__main__":
    main()
