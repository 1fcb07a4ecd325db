"""How the columns of two matrices are transformed and scaled before heads see them: as
half of the training pairs says of the other half, by a closed form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cloob.data.source import spread
from cloob.data.vectors import VectorPairs
from cloob.functional.cca import CentredRows, PairMoments, canonical_directions
from cloob.heads.fitted import Rows, recalls
from cloob.heads.head import Columns, Head, Kind
from cloob.heads.settings import HeadSettings

WAYS = (
    Columns("plain", "one"),
    Columns("plain", "column"),
    Columns("root", "one"),
    Columns("root", "column"),
    Columns("log", "one"),
    Columns("log", "column"),
    Columns("ranks", "one"),
)
PLAIN_WAYS = WAYS[:2]
LEAST_UNITS = 60  # ids or groups: of fewer nothing can be said
N_TRIED = 2000  # pairs
N_COLUMNS = 256  # of a side: a transform helps some of them as it helps all
RIDGE = 0.1
N_ERRORS = 2.0  # standard errors by which another way has to be better

Both = tuple[Columns, Columns]


def choose_columns(
    pairs: VectorPairs, settings: HeadSettings, ways: Sequence[Columns] = WAYS
) -> Both:
    """How the columns of a and b are prepared: as the settings say, or, with ``auto``,
    in the ways by which the closed form of one half of the pairs finds clearly more
    partners in the other half.
    """
    if settings.standardise != "auto":
        way = Columns("plain", settings.standardise)
        return way, way
    if pairs.weights is not None:
        pairs = pairs.only(pairs.weights > 0)
    sample = pairs.at_most(N_TRIED)
    rows = Rows.of(sample)
    chosen = usual_way(rows.a), usual_way(rows.b)
    if len(np.unique(sample.groups())) < LEAST_UNITS:
        return chosen
    first, second = (narrowed(Rows.of(half)) for half in sample.split(0.5))
    recalls_of = functools.cache(functools.partial(recalls_by, first, second))
    # where both need another way, that of a shows only after that of b
    for side in (0, 1, 0):
        chosen = improved(chosen, side, ways, recalls_of)
    return chosen


def improved(
    chosen: Both,
    side: int,
    ways: Sequence[Columns],
    recalls_of: Callable[[Columns, Columns], Tensor],
) -> Both:
    """The chosen ways with that of a side that gains most, if one gains more than its
    errors.
    """
    best, best_gain = chosen, 0.0
    for way in ways:
        tried = (way, chosen[1]) if side == 0 else (chosen[0], way)
        gains = recalls_of(*tried) - recalls_of(*chosen)
        gain = float(gains.mean() - N_ERRORS * gains.std() / len(gains) ** 0.5)
        if gain > best_gain:
            best, best_gain = tried, gain
    return best


def usual_way(rows: Tensor) -> Columns:
    """Plain columns, divided by their spreads where one number for all would all but
    hide half of them.
    """
    variances = rows.double().var(0, unbiased=False)
    is_unlike = bool(variances.median() < 0.01 * variances.mean())
    return Columns("plain", "column" if is_unlike else "one")


def narrowed(rows: Rows) -> Rows:
    """The rows with fewer columns, evenly spread."""
    a, b = (
        side[:, spread(side.shape[1], min(N_COLUMNS, side.shape[1]))]
        for side in (rows.a, rows.b)
    )
    return Rows(a, b, rows.ids)


def recalls_by(first: Rows, second: Rows, a: Columns, b: Columns) -> Tensor:
    """(ids,) recalls of each half by the closed form of the other, with these columns:
    a row that spoils what is learned from its half is seen whichever half it is in.
    """
    of_second = recalls_of_half(first, second, (a, b))
    return torch.cat([of_second, recalls_of_half(second, first, (a, b))])


def recalls_of_half(train: Rows, judges: Rows, ways: Both) -> Tensor:
    """(ids,) recalls of the judging rows by the closed form of the others."""
    width = min(train.a.shape[1], train.b.shape[1])
    heads = prepared_heads(train, ways, width)
    moments = PairMoments.of(
        heads[0].standardised(train.a), heads[1].standardised(train.b)
    )
    set_directions(heads, moments.single(), RIDGE, power=1.0)
    return recalls(heads, judges)


def prepared_heads(
    rows: Rows, ways: Both, width: int, kind: Kind = "linear"
) -> tuple[Head, Head]:
    """Heads that are to be solved for. Columns that are left as they are they divide by
    one number, which a closed form does not see.
    """
    a, b = (
        way._replace(standardise="one") if way.standardise == "none" else way
        for way in ways
    )
    return make_heads(rows, (a, b), width, kind)


def make_heads(
    rows: Rows,
    ways: Both,
    width: int,
    kind: Kind,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Head, Head]:
    """Heads that prepare columns in these ways, by these rows; their first weights
    depend on the seed alone.
    """
    heads = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for side, way in zip((rows.a, rows.b), ways, strict=True):
            head = Head(
                side.shape[1], width, kind, dropout, way.standardise, way.transform
            )
            head.fit(side)
            heads.append(head.eval())
    return heads[0], heads[1]


def set_directions(
    heads: tuple[Head, Head],
    numbers: PairMoments | CentredRows,
    ridge: float,
    power: float,
) -> None:
    """Gives heads the matrices of the closed form of the columns they prepared."""
    width = heads[0].matrix.out_features
    (directions,) = canonical_directions(numbers, [ridge])
    a, b = directions.weighted(power)
    heads[0].set_matrix(numbers.mean_a, a[:, :width])
    heads[1].set_matrix(numbers.mean_b, b[:, :width])
