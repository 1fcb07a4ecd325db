"""The search, the cells and the table of warm.md.

python -m benchmarks.frozen.warm run [--data DIR]
python -m benchmarks.frozen.warm table
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies import records
from benchmarks.studies.cells import Captions, HeadsCell, Setting, as_config
from benchmarks.studies.pages import percent, table

STUDY = Path(__file__).parent
ROOT = STUDY.parents[1]
METHODS = ("cloob", "infoloob", "clip")
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEED = 100
WARM = "closed-form"
JOINED = ("infoloob", "cloob", "cca")
WIDTH = 256


def world(share: float) -> Captions:
    return Captions("mlp", "swap", share, 43_276)


def cold(method: str, share: float) -> HeadsCell:
    """The study's cell of seed 0."""
    found = records.read("cells", STUDY).values()
    cells = [HeadsCell.from_config(record["config"]) for record in found]
    return next(
        cell
        for cell in cells
        if (cell.method, cell.world, cell.seed) == (method, world(share), 0)
    )


class Search:
    """What the search has run, and what it runs next."""

    def __init__(self, method: str, share: float) -> None:
        self.method, self.share = method, share
        first = cold(method, share)
        setting = dataclasses.replace(
            first.setting, lr=first.setting.lr / 3, start=WARM
        )
        self.first = self.cell(setting, max(1, first.epochs // 2))
        self.scores = {
            name: record["score"]
            for name, record in records.read("warm-search", STUDY).items()
        }

    def cell(self, setting: Setting, epochs: int) -> HeadsCell:
        return HeadsCell(
            "warm-search", self.method, world(self.share), SEARCH_SEED, epochs, setting
        )

    def rounds(self) -> Iterator[list[HeadsCell]]:
        """Each round around the best of those before, which ``best`` reads."""
        yield [self.first]
        yield [self._with(**values) for values in self._temperatures()]
        before = self.best.setting.lr
        yield [self._with(lr=before / 3), self._with(lr=before * 3)]
        after = self.best.setting.lr
        factor = {True: 3.0**0.5, False: after / before}[after == before]
        yield [self._with(lr=after * factor)]
        size = self.best.setting.batch_size
        yield [self._with(batch_size=size // 2), self._with(batch_size=size * 2)]
        epochs = self.best.epochs
        yield [
            self.cell(self.best.setting, max(1, epochs // 2)),
            self.cell(self.best.setting, epochs * 2),
        ]
        longer = self.best.epochs > epochs
        yield [
            self.cell(self.best.setting, epochs * 4 if longer else max(1, epochs // 4))
        ]
        inv_tau = self.best.setting.inv_tau
        yield [self._with(inv_tau=inv_tau * 0.84), self._with(inv_tau=inv_tau * 1.19)]

    def missing(self) -> Iterator[HeadsCell]:
        self.best = self.first
        for cells in self.rounds():
            for cell in cells:
                if cell.id not in self.scores:
                    yield cell
            self.best = max([self.best, *cells], key=lambda cell: self.scores[cell.id])

    def _with(self, **values: Any) -> HeadsCell:
        setting = dataclasses.replace(self.best.setting, **values)
        return self.cell(setting, self.best.epochs)

    def _temperatures(self) -> list[dict[str, float]]:
        setting = self.best.setting
        if setting.beta is None:
            factors = (0.5, 0.5**0.5, 2**0.5, 2.0)
            return [{"inv_tau": setting.inv_tau * factor} for factor in factors]
        return [
            {name: getattr(setting, name) * factor}
            for name in ("inv_tau", "beta")
            for factor in (0.5, 2.0)
        ]


class Runner:
    def __init__(self, data: Path, cache: Path) -> None:
        from benchmarks.frozen.data import build, load

        build(data, cache, print)
        self.data = load(cache)
        self.folder = cache / "warm-heads"
        self.folder.mkdir(exist_ok=True)
        for name, labelled in self.data.sets.items():
            records.write_set(name, labelled.labels, len(labelled.prompts), STUDY)

    def all(self) -> None:
        for share in (0.0, 0.4):
            for method in METHODS:
                self.search(method, share)
                for seed in SEEDS:
                    self.warm(method, share, seed, False)
            if share == 0:
                for seed in SEEDS:
                    self.joined(share, seed, False)
                for method in METHODS:
                    self.control(method)
        for seed in SEEDS:
            for method in METHODS:
                self.warm(method, 0.4, seed, True)
            self.joined(0.4, seed, True)

    def search(self, method: str, share: float) -> Search:
        search = Search(method, share)
        for cell in search.missing():
            search.scores[cell.id] = self.run(cell, False, cell.id)["score"]
        return search

    def warm(self, method: str, share: float, seed: int, clean: bool) -> None:
        search = Search(method, share)
        list(search.missing())
        cell = dataclasses.replace(search.best, stage="warm", seed=seed)
        self.run(cell, clean, self._name(cell, clean))

    def control(self, method: str) -> None:
        cell = dataclasses.replace(cold(method, 0.0), stage="warm-control")
        self.run(cell, False, cell.id)

    def run(self, cell: HeadsCell, clean: bool, name: str) -> dict[str, Any]:
        import torch
        from benchmarks.frozen import joined
        from benchmarks.frozen.heads import tested, train

        if (cell.stage, name) in records.names(STUDY):
            return records.read(cell.stage, STUDY)[name]
        print(cell.stage, name, flush=True)
        began = time.process_time()
        view, cleaning = joined._view(cell.world, cell.seed, clean, self.data)
        closed, ridge = None, {}
        if cell.setting.start == WARM:
            closed, ridge = joined._closed_form(cell.world, cell.seed, clean, self.data)
        heads, _, curve = train(cell, view, self.data, closed=closed)
        by_epoch = [line["recall"] for line in curve]
        record = {
            "id": name,
            "config": as_config(cell),
            "clean": clean,
            "closed": ridge,
            **cleaning,
            "curve": curve,
            "score": max(by_epoch),
            "best_epoch": 1 + by_epoch.index(max(by_epoch)),
        }
        if cell.stage != "warm-search":
            record |= tested(heads.visual, heads.text, self.data)
            torch.save(heads.state_dict(), self.folder / f"{name}.pt")
        record["cpu_seconds"] = round(time.process_time() - began, 1)
        records.write(cell.stage, record, STUDY)
        print(f"  {record['score']:.4f}, {record['cpu_seconds']} CPU s", flush=True)
        return record

    def joined(self, share: float, seed: int, clean: bool) -> None:
        import torch
        from benchmarks.frozen import joined
        from benchmarks.frozen.heads import Heads, tested
        from benchmarks.studies.cells import JoinedCell

        row = JoinedCell(JOINED, clean, world(share), seed, "warm-joined")
        if (row.stage, row.id) in records.names(STUDY):
            return
        heads = []
        for method in JOINED[:-1]:
            search = Search(method, share)
            list(search.missing())
            cell = dataclasses.replace(search.best, stage="warm", seed=seed)
            sizes = self.data.pairs["train"].images.shape[1], self.data.table.shape[1]
            model = Heads(sizes, "mlp", 0, WIDTH)
            path = self.folder / f"{self._name(cell, clean)}.pt"
            model.load_state_dict(torch.load(path, weights_only=True))
            heads.append(joined.Both(model.eval().visual, model.text))
        view, _ = joined._view(row.world, seed, clean, self.data)
        scored = [
            (
                view.held_out_recall(both.visual, both.text, self.data),
                index,
                both,
                chosen,
            )
            for index, (both, chosen) in enumerate(
                joined._candidates(row, heads, view, self.data)
            )
        ]
        score, _, both, chosen = max(scored, key=lambda one: (one[0], -one[1]))
        record = {
            "id": row.id,
            "config": as_config(row),
            "score": score,
            **chosen,
            **tested(both.visual, both.text, self.data),
        }
        records.write(row.stage, record, STUDY)

    def _name(self, cell: HeadsCell, clean: bool) -> str:
        return f"{cell.id}_clean" if clean else cell.id


Numbers = tuple[float, float, float]


def numbers(record: dict[str, Any]) -> Numbers:
    """Mean zero-shot, recall of held-out pairs, recall of another source's pairs."""
    zeroshot = [found["acc1"] for found in record["zeroshot"].values()]
    others = record["tuxpaint-captions"]["mean_recall"]
    return statistics.mean(zeroshot), record["val"]["mean_recall"], others


def by_row() -> dict[tuple[str, str, float, bool], dict[int, Numbers]]:
    """(start, members, share, cleaned) -> seed -> numbers."""
    found: dict[tuple[str, str, float, bool], dict[int, Numbers]] = {}
    for stage in ("cells", "claim", "warm", "warm-joined", "warm-control"):
        for record in records.read(stage, STUDY).values():
            config = record["config"]
            if config["world"] != dataclasses.asdict(world(config["world"]["share"])):
                continue
            start = {"warm": "warm", "warm-joined": "warm", "warm-control": "again"}
            members = config.get("members") or [config["method"]]
            key = (
                start.get(stage, "cold"),
                "+".join(members),
                config["world"]["share"],
                record.get("clean", config.get("clean", False)),
            )
            found.setdefault(key, {})[config["seed"]] = numbers(record)
    return found


def show() -> None:
    found = by_row()
    rows = []
    for (start, members, share, clean), seeds in sorted(found.items()):
        if start == "cold" or not any(
            key[1:] == (members, share, clean) for key in found if key[0] == "cold"
        ):
            continue
        before = found["cold", members, share, clean]
        shared = sorted(set(seeds) & set(before))
        cells = [members, f"{share:.0%}" + ", cleaned" * clean, start, str(len(shared))]
        for place in range(3):
            old = statistics.mean(before[seed][place] for seed in shared)
            new = statistics.mean(seeds[seed][place] for seed in shared)
            cells += [percent(old), percent(new)]
        rows.append(cells)
    names = ["members", "wrong", "start", "seeds"]
    for what in ("zero-shot", "recall", "other source"):
        names += [f"{what}, cold", what]
    print(table(names, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "table":
        show()
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    Runner(options.data, ROOT / "runs" / "frozen").all()


if __name__ == "__main__":
    main()
