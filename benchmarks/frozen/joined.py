"""The runs of ``claim.md``: heads and the closed form, alone and side by side, from all
pairs or from cleaned ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks.frozen.data import Data
from benchmarks.frozen.heads import Heads, View, tested, train
from benchmarks.studies import records
from benchmarks.studies.cells import Captions, HeadsCell, JoinedCell, as_config
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.functional.cca import PairMoments, canonical_directions
from cloob.heads.head import Head
from cloob.heads.suspects import suspicion

STUDY = Path(__file__).parent
CCA = "cca"
MEMBERS = {
    "clip": ("clip", 0, 256),
    "infoloob": ("infoloob", 0, 256),
    "cloob": ("cloob", 0, 256),
    "infoloob-1": ("infoloob", 1, 256),
    "infoloob-2": ("infoloob", 2, 384),
    "infoloob-wide": ("infoloob", 0, 640),
    "clip-2": ("clip", 2, 384),
    "cloob-2": ("cloob", 2, 384),
}
"""Method, which of several first weights and orders, width."""
_ALL = 43_276
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
POWERS = (0.5, 1.0, 1.5, 2.0)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the closed form beside heads of weight 1."""


class Both(NamedTuple):
    """The sides of a model."""

    visual: nn.Module
    text: nn.Module


class Side(nn.Module):
    """(n, F) features to (n, D) rows: the unit rows of several heads side by side,
    times their weights.
    """

    def __init__(self, heads: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.weights = weights

    def forward(self, features: Tensor) -> Tensor:
        rows = [
            w * F.normalize(head(features), dim=1)
            for w, head in zip(self.weights, self.heads, strict=True)
        ]
        return torch.cat(rows, dim=1)


def run(row: JoinedCell, data: Data, folder: Path) -> dict[str, Any]:
    """Trains the heads that ``folder`` lacks, puts the row's members side by side and
    scores them.
    """
    began = time.process_time()
    view, cleaning = _view(row.world, row.seed, row.clean, data)
    names = [name for name in row.members if name != CCA]
    heads = [_trained(name, row, view, data, folder) for name in names]
    best_recall = -1.0
    for both, weights in _candidates(row, heads, view, data):
        recall = view.held_out_recall(both.visual, both.text, data)
        if recall > best_recall:
            best_recall = recall
            best = both
            chosen = weights
    return {
        "id": row.id,
        "config": as_config(row),
        **cleaning,
        "score": best_recall,
        **chosen,
        **tested(best.visual, best.text, data),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


@functools.cache
def _settings() -> dict[tuple[str, Captions], HeadsCell]:
    """Method and captions -> the study's cell with the chosen setting."""
    cells = map(HeadsCell.from_config, _configs("cells"))
    return {(cell.method, cell.world): cell for cell in cells}


def _configs(stage: str) -> list[dict[str, Any]]:
    return [record["config"] for record in records.read(stage, STUDY).values()]


def cell_of_member(row: JoinedCell, member: str) -> HeadsCell:
    """The run of a head: the setting chosen with all pairs; with fewer pairs more
    epochs, so that the steps fall with the root of the number of pairs.
    """
    method, _, _ = MEMBERS[member]
    chosen = _settings()[method, dataclasses.replace(row.world, pairs=_ALL)]
    more = round(10 * math.sqrt(_ALL / row.world.pairs)) / 10
    epochs = round(chosen.epochs * more)
    return dataclasses.replace(
        chosen, stage=row.stage, world=row.world, seed=row.seed, epochs=epochs
    )


def _candidates(
    row: JoinedCell, heads: list[Both], view: View, data: Data
) -> Iterator[tuple[Both, dict[str, float]]]:
    if CCA not in row.members:
        yield _beside(heads, [1.0] * len(heads)), {}
        return
    closed, chosen = _closed_form(row.world, row.seed, row.clean, data)
    for weight in WEIGHTS if heads else (1.0,):
        yield (
            _beside([*heads, closed], [*[1.0] * len(heads), weight]),
            {**chosen, "weight": weight},
        )


def _beside(members: Sequence[Both], weights: Sequence[float]) -> Both:
    return Both(*(Side([m[side] for m in members], weights).eval() for side in (0, 1)))


def _trained(name: str, row: JoinedCell, view: View, data: Data, folder: Path) -> Both:
    _, first, width = MEMBERS[name]
    cell = cell_of_member(row, name)
    path = folder / f"{name}_{len(view.rows)}_{cell.id}.pt"
    if path.is_file():
        heads = Heads(
            (data.pairs["train"].images.shape[1], data.table.shape[1]),
            cell.world.head,
            0,
            width,
        )
        heads.load_state_dict(torch.load(path, weights_only=True))
        return Both(heads.eval().visual, heads.text)
    heads, _, curve = train(cell, view, data, first, width)
    print(
        f"  {name}: {100 * max(line['recall'] for line in curve):.1f} of {cell.epochs}"
        " epochs",
        flush=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(heads.state_dict(), path)
    return Both(heads.visual, heads.text)


@functools.lru_cache(maxsize=2)
def _closed_form(
    world: Captions, seed: int, clean: bool, data: Data
) -> tuple[Both, dict[str, float]]:
    """The linear heads of ridge and power that recall most held-out pairs."""
    view, _ = _view(world, seed, clean, data)
    images = data.pairs["train"].images[view.pictures]
    texts = data.table[view.rows]
    blocks = zip(images.split(4096), texts.split(4096), strict=True)
    moments = functools.reduce(operator.add, (PairMoments.of(a, b) for a, b in blocks))
    found: dict[str, float] = {"score": -1.0}
    for ridge, directions in zip(
        RIDGES, canonical_directions(moments, RIDGES), strict=True
    ):
        for power in POWERS:
            a, b = directions.weighted(power)
            both = Both(_linear(moments.mean_a, a), _linear(moments.mean_b, b))
            recall = view.held_out_recall(both.visual, both.text, data)
            if recall > found["score"]:
                best = both
                found = {"score": recall, "ridge": ridge, "power": power}
    return best, {"ridge": found["ridge"], "power": found["power"]}


def _linear(mean: Tensor, matrix: Tensor) -> Head:
    head = Head(*matrix.shape)
    head.set_matrix(mean, matrix)
    return head.eval()


@functools.lru_cache(maxsize=2)
def _view(
    world: Captions, seed: int, clean: bool, data: Data
) -> tuple[View, dict[str, Any]]:
    """The pairs, without those that the library's rule suspects; how right it was."""
    view = View(data, world, seed)
    if not clean:
        return view, {}
    kept, about = _cleaned(view.pictures.tobytes(), view.rows.tobytes(), data)
    view.pictures = view.pictures[kept]
    view.rows = view.rows[kept]
    return view, {"cleaning": about}


@functools.lru_cache(maxsize=2)
def _cleaned(
    pictures: bytes, texts: bytes, data: Data
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which pairs the library's rule leaves: right captions are the same for all seeds,
    so they are judged once.
    """
    chosen, rows = (np.frombuffer(part, np.int64).copy() for part in (pictures, texts))
    train = data.pairs["train"]
    found = suspicion(train.images[chosen], data.table[rows], torch.tensor(rows))
    wrong = rows != train.own[chosen]
    kept = np.sort(found.scores.argsort().numpy()[found.count() :])
    ranks = found.scores.argsort().argsort().numpy()[wrong]
    right = len(wrong) - len(ranks)
    auc = 1 - (ranks.sum() - len(ranks) * (len(ranks) - 1) / 2) / max(
        1, len(ranks) * right
    )
    return kept, {
        "dropped": found.count(),
        "wrong_left": float(wrong[kept].mean()),
        "auc": float(auc) if len(ranks) else None,
    }
