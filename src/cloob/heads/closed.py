"""Heads in closed form: regularised CCA (``cloob.functional.cca``) of the columns
(``"cca"``), or of random waves of them (``"kcca"``; Lopez-Paz et al. 2014), whose
ridge, power and bandwidth held-out pairs choose.

Pairs come in blocks of rows, and only their moments are kept, which add: files of any
length take O(F²) memory. Of fewer pairs than columns the rows themselves are kept,
which is less.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch.nn import functional as F

from cloob.data.vectors import VectorPairs
from cloob.errors import InputError
from cloob.functional.cca import CentredRows, PairMoments, canonical_directions
from cloob.heads.columns import (
    Both,
    choose_columns,
    prepared_heads,
    set_directions,
)
from cloob.heads.fitted import EpochLine, Rows, SingleHeads, recalls_of_ids
from cloob.heads.head import N_WAVES, Head
from cloob.heads.parts import check_ids, sampled
from cloob.heads.settings import USUAL_DIM, ClosedForm, HeadSettings

logger = logging.getLogger(__name__)

RIDGES = (0.1, 0.01, 0.03, 0.3, 1.0, 3.0)
POWERS = (1.0, 0.5, 2.0)
BANDWIDTHS = (2.0, 1.0, 4.0)  # in median distances
"""What is tried, the usual first: it is taken without held-out pairs, and where they
see no difference.
"""
N_JUDGES = 2000  # held-out pairs that choose
BLOCK = 4096


@dataclass(frozen=True)
class Choice:
    """What held-out pairs choose, and how columns are prepared."""

    columns: Both
    ridge: float = RIDGES[0]
    power: float = POWERS[0]
    bandwidth: float | None = None  # of waves, if there are any


@dataclass(frozen=True)
class ClosedHeads(SingleHeads):
    """Heads of the closed form."""

    choice: Choice = field(kw_only=True)


def fit_closed_form(
    pairs: VectorPairs,
    held_out: VectorPairs | None = None,
    settings: HeadSettings | None = None,
    columns: Both | None = None,
) -> ClosedHeads:
    """The heads of the closed form.

    Args:
        pairs: The training pairs, which are read in blocks.
        held_out: Pairs that choose ridge, power and bandwidth; None: the usual ones.
        settings: ``objective``, ``standardise`` and ``embed_dim`` count.
        columns: How columns are prepared; None: as the settings or the pairs say.

    Returns:
        The heads; ``decisions`` names ``columns``, ``ridge``, ``power`` and
        ``bandwidth``.

    Raises:
        InputError: Fewer than two ids, or too wide.
    """
    settings = settings or HeadSettings(objective="cca")
    width = checked_width(pairs, settings)
    choice = Choice(columns or choose_columns(pairs, settings))
    if settings.objective == "kcca":
        choice = choose_bandwidth(pairs, held_out, choice, width)
    heads = prepared(pairs, choice, width)
    numbers = gathered(pairs, heads)
    recall = None
    if held_out is not None:
        choice, recall = choose_ridge(numbers, heads, held_out, choice)
        log_choice(settings.objective, choice)
    return solve(settings, heads, numbers, choice, recall)


def refit_closed_form(pairs: VectorPairs, closed: ClosedHeads) -> ClosedHeads:
    """The heads of other pairs, by what was chosen before."""
    width = checked_width(pairs, closed.settings)
    heads = prepared(pairs, closed.choice, width)
    return solve(closed.settings, heads, gathered(pairs, heads), closed.choice)


def solve(
    settings: HeadSettings,
    heads: tuple[Head, Head],
    numbers: PairMoments | CentredRows,
    choice: Choice,
    recall: float | None = None,
) -> ClosedHeads:
    """Gives heads the matrices of the choice, whose recall of held-out pairs is
    noted.
    """
    set_directions(heads, numbers, choice.ridge, choice.power)
    line: EpochLine = {
        "epoch": 1,
        "step": 1,
        "samples_seen": int(numbers.count),
        "loss": None,
        "val_recall": recall,
        "is_best": True,
    }
    decisions = {**asdict(choice), "columns": [list(way) for way in choice.columns]}
    objective = {"closed_form": settings.objective, **decisions}
    return ClosedHeads(
        heads, objective, [line], decisions, settings=settings, choice=choice
    )


def checked_width(pairs: VectorPairs, settings: HeadSettings) -> int:
    """The width of the heads' rows; InputError where there is no closed form."""
    check_ids(pairs)
    most = most_directions(pairs, settings.objective)
    usual = USUAL_DIM if settings.objective == "kcca" else most
    width = settings.embed_dim or usual
    if width > most:
        raise InputError(
            f"embed_dim is {width}, but the closed form finds {most} directions at most"
        )
    return width


def prepared(pairs: VectorPairs, choice: Choice, width: int) -> tuple[Head, Head]:
    """Heads that prepare the columns as chosen, before they are solved."""
    rows = sampled(pairs)
    if choice.bandwidth is None:
        return prepared_heads(rows, choice.columns, width)
    heads = prepared_heads(rows, choice.columns, width, "fourier")
    heads[0].draw_waves(rows.a, choice.bandwidth, seed=0)
    heads[1].draw_waves(rows.b, choice.bandwidth, seed=1)
    return heads


def prepared_blocks(pairs: VectorPairs, heads: tuple[Head, Head]) -> Iterator[Rows]:
    """All pairs in blocks of rows, whose columns the heads prepare."""
    for start in range(0, len(pairs), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(pairs)))
        rows = Rows.of(pairs.only(places))
        a, b = heads[0].standardised(rows.a), heads[1].standardised(rows.b)
        yield Rows(a, b, rows.ids, rows.weights)


def gathered(pairs: VectorPairs, heads: tuple[Head, Head]) -> PairMoments | CentredRows:
    """The moments of all pairs; of fewer pairs than columns the rows, centred."""
    blocks = prepared_blocks(pairs, heads)
    if len(pairs) >= max(head.matrix.in_features for head in heads):
        moments = (PairMoments.of(rows.a, rows.b, rows.weights) for rows in blocks)
        return functools.reduce(operator.add, moments)
    every = [*blocks]
    a = torch.cat([rows.a for rows in every])
    b = torch.cat([rows.b for rows in every])
    weights = None if pairs.weights is None else torch.from_numpy(pairs.weights)
    return CentredRows.of(a, b, weights)


def choose_bandwidth(
    pairs: VectorPairs, held_out: VectorPairs | None, choice: Choice, width: int
) -> Choice:
    """The choice with the bandwidth that finds most with the usual ridge and power."""
    if held_out is None:
        return replace(choice, bandwidth=BANDWIDTHS[0])
    sample = pairs.at_most(BLOCK)
    recalls: dict[Choice, float] = {}
    for bandwidth in BANDWIDTHS:
        tried = replace(choice, bandwidth=bandwidth)
        heads = prepared(sample, tried, width)
        numbers = gathered(sample, heads)
        usual = RIDGES[:1], POWERS[:1]
        _, recalls[tried] = choose_ridge(numbers, heads, held_out, tried, *usual)
    return max(recalls, key=lambda tried: recalls[tried])


def choose_ridge(
    numbers: PairMoments | CentredRows,
    heads: tuple[Head, Head],
    held_out: VectorPairs,
    choice: Choice,
    ridges: Sequence[float] = RIDGES,
    powers: Sequence[float] = POWERS,
) -> tuple[Choice, float]:
    """The choice with the best recall on held-out pairs, and this; by float32, as a
    difference that it does not see is none.
    """
    width = heads[0].matrix.out_features
    judges = Rows.of(held_out, N_JUDGES)
    numbers = numbers.single()
    judged_a = heads[0].standardised(judges.a) - numbers.mean_a
    judged_b = heads[1].standardised(judges.b) - numbers.mean_b
    recalls: dict[Choice, float] = {}
    solutions = canonical_directions(numbers, ridges)
    for ridge, directions in zip(ridges, solutions, strict=True):
        a, b = judged_a @ directions.a[:, :width], judged_b @ directions.b[:, :width]
        for power in powers:
            weights = directions.correlations[:width] ** power
            x, y = F.normalize(a * weights, dim=1), F.normalize(b * weights, dim=1)
            recall = float(recalls_of_ids(x, y, judges.ids).mean())
            recalls[replace(choice, ridge=ridge, power=power)] = recall
    best = max(recalls, key=lambda tried: recalls[tried])
    return best, recalls[best]


def log_choice(objective: str, choice: Choice) -> None:
    """Says what held-out pairs chose."""
    bandwidth = ""
    if choice.bandwidth is not None:
        bandwidth = f", bandwidth {choice.bandwidth:g}"
    logger.info(
        "%s: ridge %g, power %g%s (the best of %d on held-out pairs); columns of a %s;"
        " of b %s",
        objective,
        choice.ridge,
        choice.power,
        bandwidth,
        len(RIDGES) * len(POWERS),
        *choice.columns,
    )


def closed_settings(
    settings: HeadSettings, pairs: VectorPairs, form: ClosedForm = "cca"
) -> HeadSettings:
    """The settings themselves if they are of a closed form; else those of the one that
    stands beside the heads, no wider than its columns allow.
    """
    if settings.is_closed_form:
        return settings
    width = settings.embed_dim
    if width is not None:
        width = min(width, most_directions(pairs, form))
    return HeadSettings(form, embed_dim=width, standardise=settings.standardise)


def most_directions(pairs: VectorPairs, form: str) -> int:
    """How many a closed form finds."""
    if form == "kcca":
        return N_WAVES
    return max(2, min(pairs.a.shape[1], pairs.b.shape[1]))
