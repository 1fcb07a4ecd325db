"""Plans of the study in both.md: the search, and once it is done the cells.

python -m benchmarks.factors.both search > plan.jsonl
python -m benchmarks.factors.both cells > plan.jsonl
python -m benchmarks.factors.both table
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.factors.cells import Run, Setting
from benchmarks.factors.world import World
from benchmarks.studies import records
from benchmarks.studies.comparison import t_interval
from benchmarks.studies.pages import lead, percent, table

STUDY = Path(__file__).parent
METHODS = ("clip", "infoloob", "cloob", "cloob-late", "both", "cross")
SHARES = (0.0, 0.4)
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEED = 100
PLAIN = (5.0, 8.4, 10.0, 15.0, 20.0, 30.0)
RETRIEVING = (
    (8.4, 8.0),
    (8.4, 16.0),
    (15.0, 8.0),
    (15.0, 16.0),
    (30.0, 8.0),
    (30.0, 16.0),
)


def settings(method: str) -> Iterator[Setting]:
    """Twelve of each method: six temperatures, two lengths."""
    temperatures = RETRIEVING
    if method in ("clip", "infoloob"):
        temperatures = tuple((inv_tau, None) for inv_tau in PLAIN)
    for (inv_tau, beta), length in itertools.product(temperatures, (0.5, 1.0)):
        yield Setting(inv_tau, False, beta, 5.8e-4, 10.0, length)


def search() -> Iterator[Run]:
    for method, share in itertools.product(METHODS, SHARES):
        for setting in settings(method):
            yield Run("both-search", method, World(share), SEARCH_SEED, setting)


def cells() -> Iterator[Run]:
    """The setting with the best held-out recall, with each seed."""
    found = records.read("both-search", STUDY)
    for seed, method, share in itertools.product(SEEDS, METHODS, SHARES):
        tried = [run for run in search() if run.method == method]
        tried = [run for run in tried if run.world.wrong == share]
        best = max(tried, key=lambda run: found[run.id]["recall"])
        yield Run("both", method, best.world, seed, best.setting)


def print_table() -> None:
    """Zero-shot accuracy, and the leads over CLOOB and over CLIP by seed."""
    scores: dict[tuple[str, float], dict[int, float]] = {}
    for record in records.read("both", STUDY).values():
        config = record["config"]
        key = (config["method"], config["world"]["wrong"])
        mean = statistics.mean(record["zero_shot"])
        scores.setdefault(key, {})[config["seed"]] = mean
    lines = []
    for share, method in itertools.product(SHARES, METHODS):
        ours = scores[method, share]
        line = [
            f"{percent(share, 0)} %",
            method,
            percent(statistics.mean(ours.values())),
        ]
        for other in ("clip", "cloob", "infoloob"):
            gaps = [ours[seed] - scores[other, share][seed] for seed in sorted(ours)]
            line.append(lead(statistics.mean(gaps), t_interval(gaps)))
        lines.append(line)
    head = ["wrong", "method", "zero-shot, %", "− CLIP", "− CLOOB", "− InfoLOOB"]
    print(table(head, lines))


def main() -> None:
    what = sys.argv[1]
    if what == "table":
        print_table()
        return
    for run in search() if what == "search" else cells():
        print(json.dumps(run.config()))


if __name__ == "__main__":
    main()
