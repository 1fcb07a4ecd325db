"""A run of the study on cached features."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.frozen import joined
from benchmarks.frozen.data import Data, build, load
from benchmarks.frozen.heads import View, embedded, tested, train
from benchmarks.studies import records
from benchmarks.studies.cells import HeadsCell, JoinedCell, as_config
from benchmarks.studies.measures import recalls

STUDY = Path(__file__).parent


def cell_of(config: Mapping[str, Any]) -> HeadsCell | JoinedCell:
    if "members" in config:
        return JoinedCell.from_config(config)
    return HeadsCell.from_config(config)


def runner(
    folder: Path, cache: Path
) -> Callable[[HeadsCell | JoinedCell], dict[str, Any]]:
    """How a run is done, after the cache has been filled."""
    build(folder, cache, print)
    data = load(cache)
    for name, labelled in data.sets.items():
        records.write_set(name, labelled.labels, len(labelled.prompts), STUDY)

    def do(cell: HeadsCell | JoinedCell) -> dict[str, Any]:
        if isinstance(cell, JoinedCell):
            return joined.run(cell, data, cache / "heads")
        return run(cell, data)

    return do


def run(cell: HeadsCell, data: Data) -> dict[str, Any]:
    """Trains a cell and scores the epoch that is best by the held-out pairs."""
    began = time.process_time()
    view = View(data, cell.world, cell.seed)
    heads, objective, curve = train(cell, view, data)
    by_epoch = [line["recall"] for line in curve]
    best = max(by_epoch)
    seen = np.random.default_rng(cell.seed).choice(
        len(view.rows), min(len(view.rows), 1000), replace=False
    )
    pictures = data.pairs["train"].images[view.pictures[seen]]
    rows = view.rows[seen]
    trained_on = recalls(
        embedded(heads.visual, pictures),
        embedded(heads.text, data.table[rows]),
        [data.texts[row] for row in rows],
    )
    return {
        "id": cell.id,
        "config": as_config(cell),
        "curve": curve,
        "score": best,
        "best_epoch": 1 + by_epoch.index(best),
        "inv_tau": round(float(objective.inv_tau.detach()), 4),
        **tested(heads.visual, heads.text, data),
        "train_recall": round(trained_on["mean_recall"], 6),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
