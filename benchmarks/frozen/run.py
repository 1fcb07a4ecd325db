"""A run of the study on cached features, and the list of those to be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.frozen import joined, plan
from benchmarks.frozen.data import Data, build, load
from benchmarks.frozen.heads import View, embedded, tested, train
from benchmarks.frozen.plan import Cell, Joined
from benchmarks.pictograms.run import recalls
from benchmarks.studies import records

STUDY = Path(__file__).parent


def run(cell: Cell, data: Data) -> dict[str, Any]:
    """Trains a cell and scores the epoch that is best by the held-out pairs; test sets
    for ``cells`` alone.
    """
    began = time.process_time()
    view, images = View(data, cell.world, cell.seed), data.pairs["train"].images
    heads, objective, curve = train(cell, view, data)
    record = {
        "id": cell.id,
        "config": cell.config(),
        "curve": curve,
        "score": max(c["recall"] for c in curve),
    }
    record["best_epoch"] = 1 + [line["recall"] for line in curve].index(record["score"])
    record["inv_tau"] = round(float(objective.inv_tau.detach()), 4)
    if cell.stage == "cells":
        texts = data.table
        record |= tested(heads.visual, heads.text, data)
        seen = np.random.default_rng(cell.seed).choice(
            len(view.rows), min(len(view.rows), 1000), replace=False
        )
        fitted = (
            embedded(heads.visual, images[view.pictures[seen]]),
            embedded(heads.text, texts[view.rows[seen]]),
        )
        record["train_recall"] = round(
            recalls(*fitted, [data.texts[i] for i in view.rows[seen]])["mean_recall"], 6
        )
    return record | {"cpu_seconds": round(time.process_time() - began, 1)}


def study(
    folder: Path, cache: Path
) -> tuple[
    Callable[[], Iterable[Cell | Joined]], Callable[[Cell | Joined], dict[str, Any]]
]:
    """Fills the cache; what is to be done by now, and how a run is done."""
    build(folder, cache, print)
    data = load(cache)
    for name, labelled in data.sets.items():
        records.write_set(name, labelled.labels, len(labelled.prompts), STUDY)

    def scores() -> dict[str, float]:
        return {
            name: record["score"]
            for name, record in records.read("search", STUDY).items()
        }

    def listed() -> Iterator[Cell | Joined]:
        yield from plan.runs(scores())
        yield from plan.joined()

    def do(row: Cell | Joined) -> dict[str, Any]:
        return (
            joined.run(row, data, scores(), cache / "heads")
            if isinstance(row, Joined)
            else run(row, data)
        )

    return listed, do
