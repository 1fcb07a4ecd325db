"""Which records the tables are made of, and in which order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from benchmarks.pictograms.cells import CELL_EPOCHS, DEFAULTS, METHODS, TOWERS, Setting, chosen_setting
from benchmarks.pictograms.comparison import Record

NAMES = {
    "clip": "CLIP",
    "infoloob": "InfoLOOB",
    "infonce-hopfield": "InfoNCE + Hopfield",
    "cloob": "CLOOB",
    "cloob-warm": "CLOOB, InfoLOOB first",
    "sum": "InfoLOOB + CLOOB",
}
Runs = dict[tuple[str, str], dict[int, Record]]
"""(method, tower) -> seed -> record."""


def select(cells: Mapping[str, Record], scores: Mapping[str, float], epochs: int | None = None) -> tuple[Runs, Runs]:
    """The runs of a length (the study's) with the chosen settings, and those with the published ones."""
    chosen: Runs = defaultdict(dict)
    published: Runs = defaultdict(dict)
    for record in cells.values():
        config = record["config"]
        method, setting = config["method"], Setting(**config["setting"])
        if config["epochs"] != (epochs or CELL_EPOCHS):
            continue
        if setting == chosen_setting(method, scores, config["tower"])[0]:
            chosen[method, config["tower"]][config["seed"]] = record
        elif setting == DEFAULTS[method]:
            published[method, config["tower"]][config["seed"]] = record
    return dict(chosen), dict(published)


def zeroshot_mean(record: Record) -> float:
    """Mean top-1 over the sets."""
    return float(np.mean([found["acc1"] for found in record["zeroshot"].values()]))


def ordered(runs: Runs) -> list[tuple[tuple[str, str], dict[int, Record]]]:
    """The runs tower by tower, methods in the study's order."""
    return sorted(runs.items(), key=lambda item: (TOWERS.index(item[0][1]), METHODS.index(item[0][0])))


def every(runs: Runs) -> Iterable[Record]:
    """All records."""
    return (record for of_seed in runs.values() for record in of_seed.values())
