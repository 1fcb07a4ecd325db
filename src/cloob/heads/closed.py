"""Linear heads in closed form: regularised CCA (``cloob.functional.cca``) whose ridge
and power held-out pairs choose.

Pairs come in blocks of rows, and only their moments are kept, which add: files of any
length take O(F²) memory. Of fewer pairs than columns the rows themselves are kept,
which is less.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.data.vectors import VectorPairs
from cloob.errors import InputError
from cloob.functional.cca import CentredRows, PairMoments, canonical_directions
from cloob.heads.columns import Both, choose_columns, prepared_head
from cloob.heads.fitted import FittedHeads, Rows, recalls_of_ids
from cloob.heads.head import Columns, Head
from cloob.heads.parts import sampled
from cloob.heads.settings import HeadSettings

logger = logging.getLogger(__name__)

RIDGES = (0.1, 0.01, 0.03, 0.3, 1.0, 3.0)
POWERS = (1.0, 0.5, 2.0)
"""What is tried, the usual first: it is taken without held-out pairs, and where they
see no difference.
"""
N_JUDGES = 2000  # held-out pairs that choose
BLOCK = 4096

Block = tuple[Tensor, Tensor, Tensor | None]
"""(n, F_a) rows, their (n, F_b) partners, and (n,) weights or None."""


@dataclass(frozen=True)
class Choice:
    """What held-out pairs choose, and how columns are prepared."""

    ridge: float
    power: float
    columns: Both


def fit_closed_form(
    pairs: VectorPairs,
    held_out: VectorPairs | None = None,
    settings: HeadSettings | None = None,
    choice: Choice | None = None,
) -> FittedHeads:
    """The heads of the closed form.

    Args:
        pairs: The training pairs, which are read in blocks.
        held_out: Pairs that choose ridge and power; None: the usual ones.
        settings: ``standardise`` and ``embed_dim`` count.
        choice: An earlier choice, which is taken again.

    Returns:
        The heads; ``decisions`` names ``ridge``, ``power`` and ``columns``.

    Raises:
        InputError: Fewer than two pairs or ids, or too wide.
    """
    settings = settings or HeadSettings(objective="cca")
    if len(pairs) < 2:
        raise InputError(f"{len(pairs)} pairs; a closed form needs 2 or more")
    if len(np.unique(pairs.ids)) < 2:
        raise InputError(f"{pairs.name}: all pairs have one id, so none is another")
    most = max(2, min(pairs.a.shape[1], pairs.b.shape[1]))
    width = settings.embed_dim or most
    if width > most:
        raise InputError(
            f"embed_dim is {width}, but the closed form finds {most} directions at most"
        )
    columns = choose_columns(pairs, settings) if choice is None else choice.columns
    rows = sampled(pairs)
    heads = (
        prepared_head(rows.a, columns[0], width),
        prepared_head(rows.b, columns[1], width),
    )
    numbers = gathered(pairs, heads)
    recall = None
    if choice is None:
        choice = Choice(RIDGES[0], POWERS[0], columns)
        if held_out is not None:
            choice, recall = choose_ridge(numbers, heads, held_out, columns, width)
    (directions,) = canonical_directions(numbers, [choice.ridge])
    matrices = directions.weighted(choice.power)
    heads[0].solve(numbers.mean_a, matrices[0][:, :width])
    heads[1].solve(numbers.mean_b, matrices[1][:, :width])
    line = {
        "epoch": 1,
        "step": 1,
        "samples_seen": int(numbers.count),
        "loss": None,
        "val_loss": None,
        "val_recall": recall,
        "is_best": True,
    }
    decisions = {**asdict(choice), "columns": [list(way) for way in choice.columns]}
    objective = {"closed_form": "cca", **decisions}
    return FittedHeads(heads, objective, [line], decisions)


def blocks_of(pairs: VectorPairs, heads: tuple[Head, Head]) -> Iterator[Block]:
    """All pairs in blocks of rows, whose columns the heads prepare."""
    for start in range(0, len(pairs), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(pairs)))
        a, b, _ = pairs.batch(places)
        weights = None
        if pairs.weights is not None:
            weights = torch.from_numpy(pairs.weights[places])
        yield heads[0].standardised(a), heads[1].standardised(b), weights


def gathered(pairs: VectorPairs, heads: tuple[Head, Head]) -> PairMoments | CentredRows:
    """The moments of all pairs; of fewer pairs than columns the rows, centred."""
    blocks = blocks_of(pairs, heads)
    if len(pairs) >= max(pairs.a.shape[1], pairs.b.shape[1]):
        moments = (PairMoments.of(*block) for block in blocks)
        return functools.reduce(operator.add, moments)
    a, b, weights = zip(*blocks, strict=True)
    all_weights = None if pairs.weights is None else torch.cat(weights)
    return CentredRows.of(torch.cat(a), torch.cat(b), all_weights)


def choose_ridge(
    numbers: PairMoments | CentredRows,
    heads: tuple[Head, Head],
    held_out: VectorPairs,
    columns: Both,
    width: int,
) -> tuple[Choice, float]:
    """The choice with the best recall on held-out pairs, and this; by float32, as a
    difference that it does not see is none.
    """
    judges = Rows.of(held_out, N_JUDGES)
    numbers = numbers.single()
    judged_a = heads[0].standardised(judges.a) - numbers.mean_a
    judged_b = heads[1].standardised(judges.b) - numbers.mean_b
    found: dict[Choice, float] = {}
    solutions = canonical_directions(numbers, RIDGES)
    for ridge, directions in zip(RIDGES, solutions, strict=True):
        a, b = judged_a @ directions.a[:, :width], judged_b @ directions.b[:, :width]
        for power in POWERS:
            weights = directions.correlations[:width] ** power
            x, y = F.normalize(a * weights, dim=1), F.normalize(b * weights, dim=1)
            recall = float(recalls_of_ids(x, y, judges.ids).mean())
            found[Choice(ridge, power, columns)] = recall
    choice = max(found, key=lambda one: found[one])
    logger.info(
        "cca: ridge %g, power %g (the best of %d on held-out pairs); columns of a %s;"
        " of b %s",
        choice.ridge,
        choice.power,
        len(found),
        *choice.columns,
    )
    return choice, found[choice]


def closed_beside(settings: HeadSettings, pairs: VectorPairs) -> HeadSettings:
    """The settings of the closed form beside heads, or alone: beside them it is no
    wider than its columns allow.
    """
    width = settings.embed_dim
    if width is not None and settings.objective != "cca":
        width = min(width, max(2, min(pairs.a.shape[1], pairs.b.shape[1])))
    return HeadSettings("cca", embed_dim=width, standardise=settings.standardise)


def choice_of(decisions: Mapping[str, Any]) -> Choice:
    """The choice among the decisions of a fit."""
    a, b = (Columns(*way) for way in decisions["columns"])
    return Choice(decisions["ridge"], decisions["power"], (a, b))
