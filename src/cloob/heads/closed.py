"""Linear heads in closed form: regularised CCA (``cloob.functional.cca``) whose ridge,
power and scaling held-out pairs choose.

Pairs come in blocks of rows, and only their moments are kept, which add: files of any
length take O(F²) memory, and machines may each add up the moments of a part. Of fewer
pairs than columns the rows themselves are kept, which is less.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.data.vectors import VectorPairs
from cloob.errors import InputError
from cloob.functional.cca import (
    CanonicalDirections,
    CentredRows,
    PairMoments,
    canonical_directions,
)
from cloob.heads.fitted import FittedHeads, Rows, recalls_of_ids, vary_unlike
from cloob.heads.head import Head
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
    """What held-out pairs choose."""

    ridge: float = RIDGES[0]
    power: float = POWERS[0]
    by_column: bool = False


def fit_closed_form(
    pairs: VectorPairs | PairMoments | CentredRows | Iterable[Block],
    held_out: VectorPairs | None = None,
    settings: HeadSettings | None = None,
    choice: Choice | None = None,
) -> FittedHeads:
    """The heads of the closed form.

    Args:
        pairs: The training pairs; or blocks of their rows, of which an iterator is read
            once; or their moments.
        held_out: Pairs that choose ridge, power and scaling; None: the usual ones.
        settings: ``standardise`` and ``embed_dim`` count.
        choice: An earlier choice, which is taken again.

    Returns:
        The heads; ``decisions`` names ``ridge``, ``power`` and ``by_column``.

    Raises:
        InputError: Fewer than two pairs.
    """
    settings = settings or HeadSettings(objective="cca")
    if isinstance(pairs, VectorPairs):
        if len(np.unique(pairs.ids)) < 2:
            raise InputError(f"{pairs.name}: all pairs have one id, so none is another")
        pairs = blocks_of(pairs)
    if not isinstance(pairs, PairMoments | CentredRows):
        pairs = gathered(pairs)
    if pairs.count <= 1:
        raise InputError(f"{pairs.count:g} pairs; a closed form needs 2 or more")
    most = max(2, min(len(pairs.mean_a), len(pairs.mean_b)))
    width = settings.embed_dim or most
    if width > most:
        raise InputError(
            f"embed_dim is {width}, but the closed form finds {most} directions at most"
        )
    if choice is None:
        choice, directions, tried = choose_ridge(pairs, held_out, settings, width)
    else:
        directions, tried = directions_of(pairs, choice, width), []
    heads = heads_of(pairs, directions, choice.power, settings.embed_dim)
    recall = None
    if tried:
        recall = max(tried)
        columns = ", columns standardised" if choice.by_column else ""
        message = "cca: ridge %g, power %g%s (the best of %d on held-out pairs)"
        logger.info(message, choice.ridge, choice.power, columns, len(tried))
    line = {
        "epoch": 1,
        "step": 1,
        "samples_seen": int(pairs.count),
        "loss": None,
        "val_loss": None,
        "val_recall": recall,
        "is_best": True,
    }
    objective = {"closed_form": "cca", **asdict(choice)}
    return FittedHeads(heads, objective, [line], asdict(choice))


def blocks_of(pairs: VectorPairs) -> Iterator[Block]:
    """All pairs in blocks of rows."""
    for start in range(0, len(pairs), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(pairs)))
        a, b, _ = pairs.batch(places)
        weights = pairs.weights
        yield a, b, None if weights is None else torch.from_numpy(weights[places])


def gathered(blocks: Iterable[Block]) -> PairMoments | CentredRows:
    """The moments of all blocks; of fewer rows than columns the rows, centred."""
    kept: list[Block] = []
    moments: PairMoments | None = None
    n_rows = 0
    for block in blocks:
        n_rows += len(block[0])
        if moments is None and n_rows < max(block[0].shape[1], block[1].shape[1]):
            kept.append(block)
            continue
        for waiting in (*kept, block):
            part = PairMoments.of(*waiting)
            moments = part if moments is None else moments + part
        kept = []
    if moments is not None:
        return moments
    if not kept:
        raise InputError("no usable pairs")
    a = torch.cat([rows for rows, *_ in kept])
    b = torch.cat([rows for _, rows, _ in kept])
    weights = [weight for *_, weight in kept if weight is not None]
    return CentredRows.of(a, b, torch.cat(weights) if weights else None)


def choose_ridge(
    pairs: PairMoments | CentredRows,
    held_out: VectorPairs | None,
    settings: HeadSettings,
    width: int,
) -> tuple[Choice, CanonicalDirections, list[float]]:
    """The choice with the best recall on held-out pairs, its directions, and all
    recalls; only the best directions are kept.
    """
    by_column = settings.standardise == "column"
    if settings.standardise == "auto":
        by_column = any(vary_unlike(variances) for variances in variances_of(pairs))
    if held_out is None:
        usual = Choice(by_column=by_column)
        return usual, directions_of(pairs, usual, width), []
    ways = [by_column]
    if settings.standardise == "auto":
        ways.append(not by_column)
    judges = Rows.of(held_out, N_JUDGES)
    best: tuple[Choice, CanonicalDirections] | None = None
    tried: list[float] = []
    for way in ways:
        solutions = canonical_directions(pairs, RIDGES, by_column=way)
        for ridge, found in zip(RIDGES, solutions, strict=True):
            directions = first_columns(found, width)
            a = (judges.a.double() - pairs.mean_a).float() @ directions.a.float()
            b = (judges.b.double() - pairs.mean_b).float() @ directions.b.float()
            for power in POWERS:
                weights = (directions.correlations**power).float()
                x = F.normalize(a * weights, dim=1)
                y = F.normalize(b * weights, dim=1)
                recall = float(recalls_of_ids(x, y, judges.ids).mean())
                if best is None or recall > max(tried):
                    best = Choice(ridge, power, way), directions
                tried.append(recall)
    assert best is not None
    return *best, tried


def directions_of(
    pairs: PairMoments | CentredRows, choice: Choice, width: int
) -> CanonicalDirections:
    """The strongest directions for one choice."""
    ridges = [choice.ridge]
    (found,) = canonical_directions(pairs, ridges, by_column=choice.by_column)
    return first_columns(found, width)


def variances_of(pairs: PairMoments | CentredRows) -> tuple[Tensor, Tensor]:
    """The variances of both sides' columns."""
    if isinstance(pairs, PairMoments):
        sums = pairs.aa.diagonal(), pairs.bb.diagonal()
    else:
        sums = pairs.a.square().sum(0), pairs.b.square().sum(0)
    return sums[0] / pairs.count, sums[1] / pairs.count


def first_columns(directions: CanonicalDirections, width: int) -> CanonicalDirections:
    """The strongest directions."""
    a, b, correlations = directions
    return CanonicalDirections(a[:, :width], b[:, :width], correlations[:width])


def heads_of(
    pairs: PairMoments | CentredRows,
    directions: CanonicalDirections,
    power: float,
    embed_dim: int | None,
) -> tuple[Head, Head]:
    """Linear heads of these directions; columns that are left over are zero."""
    matrix_a, matrix_b = directions.weighted(power)
    width = max(2, embed_dim or 0, matrix_a.shape[1])
    heads = Head(len(matrix_a), width), Head(len(matrix_b), width)
    heads[0].solve(pairs.mean_a, matrix_a, spread_of(matrix_a))
    heads[1].solve(pairs.mean_b, matrix_b, spread_of(matrix_b))
    return heads[0].eval(), heads[1].eval()


def spread_of(matrix: Tensor) -> float:
    """The size of features whose products with the matrix are near one."""
    size = float(matrix.square().mean().sqrt())
    return 1 / size if size > 0 else 1.0


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
    return Choice(decisions["ridge"], decisions["power"], decisions["by_column"])
