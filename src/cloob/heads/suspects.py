"""Which pairs do not belong together: each scored by a closed form that has not seen
it.

Pairs are divided into folds by their ids. The canonical directions (``functional.cca``)
of the other folds give unit rows x and y of a fold. With h_j(x_i) the mean cosine of
x_i to its ten nearest rows y of other ids than pair j's, a pair (i, j) scores

    s(i, j) = <x_i, y_j> - (h_j(x_i) + h_i(y_j)) / 2,

so that a row which is near to everything gains nothing by it (CSLS, arXiv:1710.04087).
Two terms need no shared space (LEMoN, arXiv:2407.18941): the mean cosine of b_j with
the b of the ten rows nearest to a_i, and of a_i with the a of the ten nearest to b_j.

The given pairs are (i, i). Pairs that are *known to be wrong* have j of another id and
other numbers on both sides, drawn at random within the fold; they score as a wrong pair
among the given ones does, for what stands opposite is never among the nearest, whether
it belongs there or not. They choose the ridge and how much LEMoN's terms count, by how
often a given pair scores above a known wrong one; their mean and deviation are the zero
and the unit of the scores; and they tell how many of the given pairs are wrong
(``heads.wrong_share``).

Nothing depends on where a row stands: rows are sorted by a digest of their numbers
before anything is drawn, so a permutation of the rows permutes the answer, bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.errors import InputError, counted
from cloob.functional.cca import (
    CanonicalDirections,
    CentredRows,
    PairMoments,
    canonical_directions,
)
from cloob.functional.checks import check_ids
from cloob.heads.matrix import as_matrix
from cloob.heads.wrong_share import WrongShare, estimate_wrong_share

_FOLDS = 5
_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
_NEAREST = 10
# rows among which the nearest are looked for, evenly spread where there are more
_CANDIDATES = 10_000
_ROWS = 1024  # at a time
_DRAWS = 4  # known wrong pairs for every given one
_STEPS = 1000  # rows that are tried as a partner
_JUDGED = 200  # given pairs that choose the ridge, if there are as many
_LISTED = 512  # nearest rows that are kept at most
_WEIGHTS = (0.0, 0.25, 0.5, 1.0)  # of the neighbours' terms
_CHUNK = 1 << 16
_NUMBERS = 1 << 23  # that are gathered at a time

_T = TypeVar("_T")
_Trained = PairMoments | CentredRows


@dataclass(frozen=True)
class Suspicion:
    """What is known of n pairs, in their order."""

    scores: Tensor  # (n,) float32; the lowest pair is the most suspicious
    known_wrong: Tensor  # (m,) float32: scores of pairs that are known to be wrong
    # (n,) int64: the pair whose b fits a best among those looked at; itself where none
    # fits better
    better: Tensor
    wrong: WrongShare  # how many are wrong, and how probably each

    def count(self) -> int:
        """How many pairs are more probably wrong than right; none where that is
        uncertain.
        """
        if not self.wrong.is_certain:
            return 0
        return int((self.wrong.probability > 0.5).sum())


@dataclass(frozen=True)
class Cleaned:
    """What is left of n pairs."""

    kept_rows: Tensor  # (k,) int64, ascending
    scores: Tensor  # (n,) float32; the lowest ones were left out
    probability: Tensor  # (n,) float32, of being wrong
    share: float  # of wrong pairs, estimated
    interval: tuple[float, float]  # 95 % of it

    def left_out(self) -> Tensor:
        """The (n - k,) rows that were left out, lowest score first."""
        order = self.scores.argsort(stable=True)
        return order[~torch.isin(order, self.kept_rows)]


def suspects(
    a: Any,
    b: Any,
    ids: Any = None,
    folds: int = _FOLDS,
    *,
    probability: bool = False,
) -> Tensor:
    """How well the two sides of every pair belong together; the lowest scores are the
    most suspicious pairs.

    Args:
        a: (n, F_a) finite numbers: a tensor, an array, a sparse matrix or a data frame.
        b: (n, F_b) finite numbers; row i belongs to row i of a, or is suspected not to.
        ids: (n,) integers (``cloob.ids`` makes them of texts); pairs of equal id are
            judged together, by the others.
        folds: Parts, each scored by the directions of the others.
        probability: Return the probability that a pair is wrong instead, estimated from
            all scores (``cloob.heads.wrong_share``). It falls as the score rises.

    Returns:
        (n,) float32 scores, or probabilities. 0 is the mean score of pairs that are
        known to be wrong, 1 their deviation; scores compare pairs of one call alone.

    Raises:
        InputError: Shapes do not fit, a number is not finite, or there are fewer than
            two distinct ids for a fold.

    Example:
        >>> import torch, cloob
        >>> a = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> b = a @ torch.ones(8, 5).triu()
        >>> b[[3, 4]] = b[[4, 3]]  # two wrong pairs
        >>> sorted(cloob.suspects(a, b).argsort()[:2].tolist())
        [3, 4]
    """
    result = suspicion(dense_rows("a", a), dense_rows("b", b), ids, folds)
    return result.wrong.probability if probability else result.scores


def dense_rows(name: str, rows: Any) -> Tensor:
    """Rows of anything that holds numbers; what float32 cannot hold is refused."""
    matrix = as_matrix(name, rows)
    matrix = matrix.toarray() if hasattr(matrix, "toarray") else matrix
    dtype = np.float32 if matrix.dtype == np.float32 else np.float64
    dense = torch.from_numpy(np.require(matrix, dtype, ["C", "W"]))
    for start, part in enumerate(torch.split(dense, _ROWS)):
        finite = part.float().isfinite().all(1)
        if not finite.all():
            row = start * _ROWS + int(finite.int().argmin())
            raise InputError(
                f"{name}: row {row} holds NaN, infinity or a number that float32 cannot"
                " hold"
            )
    return dense


def clean(a: Tensor, b: Tensor, ids: Any, share: str | float) -> Cleaned:
    """Leaves out the pairs that least seem to belong together.

    Args:
        a: (n, F_a) numbers.
        b: (n, F_b) numbers.
        ids: (n,) integers, as of ``suspects``.
        share: ``"auto"``: those that are more probably wrong than right, and none where
            that is uncertain; a number: this share of the pairs.

    Returns:
        The rows that are kept, with the scores and probabilities of all.
    """
    result = suspicion(a, b, ids)
    count = result.count() if share == "auto" else round(float(share) * len(a))
    kept = result.scores.argsort(stable=True)[count:].sort().values
    wrong = result.wrong
    return Cleaned(kept, result.scores, wrong.probability, wrong.share, wrong.interval)


@torch.no_grad()
def suspicion(
    a: Tensor,
    b: Tensor,
    ids: Any = None,
    folds: int = _FOLDS,
    *,
    in_one_space: bool = False,
) -> Suspicion:
    """As ``suspects``, with all that is known of the pairs.

    Where rows of a and b are of one space already, as those of a trained model are,
    their cosine takes the place of the closed form's.
    """
    n = len(a)
    if a.ndim != 2 or b.ndim != 2 or len(b) != n:
        raise InputError(
            f"a is {tuple(a.shape)}, b is {tuple(b.shape)}; two matrices with as many"
            " rows are needed"
        )
    ids = ids.cpu() if isinstance(ids, Tensor) else ids
    checked = check_ids(ids, None, n, n, torch.device("cpu"))
    digests = _row_digests(a), _row_digests(b)
    both = digests[0] * np.uint64(0x9E3779B97F4A7C15) + digests[1]
    group = _number_ids(both, None if checked is None else checked[0])
    distinct = int(group.max()) + 1 if n else 0
    folds = 1 if in_one_space else folds
    if distinct < 2 * folds or not (in_one_space or folds > 1):
        raise InputError(
            f"{counted(distinct, 'distinct ids')} in {folds} folds; 2 folds or more, of"
            " 2 ids or more, are needed"
        )
    order = torch.from_numpy(np.argsort(both, kind="stable"))
    pairs = _Pairs(
        _centred(a, order),
        _centred(b, order),
        group[order],
        *torch.from_numpy(np.stack(digests).view(np.int64))[:, order],
    )
    if in_one_space:
        scored = _score_in_one_space(pairs, a[order], b[order])
    else:
        scored = _score_by_folds(pairs, folds)
    scores, better = torch.empty(n), torch.empty(n, dtype=torch.long)
    scores[order] = scored.given
    better[order] = order[scored.better]
    wrong = estimate_wrong_share(scores, scored.known_wrong, distinct)
    return Suspicion(scores, scored.known_wrong, better, wrong)


class _Pairs(NamedTuple):
    """Rows of both sides, the number of every pair's id, and digests of both rows."""

    a: Tensor  # (n, F_a) float64
    b: Tensor  # (n, F_b) float64
    group: Tensor  # (n,) int64, as all of these
    digest_a: Tensor
    digest_b: Tensor

    def take(self, rows: Tensor) -> _Pairs:
        return _Pairs(*(part[rows] for part in self))


class _Choice(NamedTuple):
    """Rows of a and of b that are put together."""

    of_a: Tensor  # (m,) int64
    of_b: Tensor  # (m,)


class _Scored(NamedTuple):
    """Numbers of the given pairs and of those known to be wrong; the row of b that fits
    a row of a best.
    """

    given: Tensor  # (n,) float32
    known_wrong: Tensor  # (m,) float32
    better: Tensor  # (n,) int64


class _Near(NamedTuple):
    """The nearest rows of every row, nearest first."""

    rows: Tensor  # (n, K) int64
    cosines: Tensor  # (n, K) float32


def _row_digests(rows: Tensor) -> np.ndarray:
    """(n,) uint64 digests of the numbers of every row, whatever their type."""
    digests = np.empty(len(rows), np.uint64)
    for start, part in enumerate(torch.split(rows, _ROWS)):
        wide = (part.double() + 0.0).numpy()  # -0.0 is 0.0
        for row, numbers in enumerate(wide, start * _ROWS):
            digest = hashlib.blake2b(numbers.tobytes(), digest_size=8).digest()
            digests[row] = int.from_bytes(digest, "big")
    return digests


def _number_ids(digests: np.ndarray, ids: Tensor | None) -> Tensor:
    """(n,) numbers of the ids, in the order of the least digest of an id's pairs.

    Equal pairs are of one id where there are no ids, and ids whose least pairs are
    equal are one, so that no pair is judged by its copy.
    """
    _, group = np.unique(digests if ids is None else ids.numpy(), return_inverse=True)
    least = np.full(int(group.max(initial=-1)) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(least, group, digests)
    _, number = np.unique(least, return_inverse=True)
    return torch.from_numpy(number[group])


def _centred(rows: Tensor, order: Tensor) -> Tensor:
    """The rows in an order, as float64, about their mean, of greatest number one.

    The first row is subtracted before the mean, so that a constant column is zero; a
    column that varies by rounding alone becomes zero too.
    """
    wide = rows.double()[order]
    first = wide[0].clone()
    wide -= first
    wide -= wide.mean(0)
    precision = torch.finfo(rows.dtype if rows.is_floating_point() else wide.dtype).eps
    wide[:, wide.abs().amax(0) <= precision * first.abs()] = 0.0
    size = wide.abs().max()
    return wide / size if size > 0 else wide


def _score_in_one_space(pairs: _Pairs, a: Tensor, b: Tensor) -> _Scored:
    """Scores the given pairs, and others that are known to be wrong, by cosines."""
    known = _draw_known_wrong(pairs)
    x, y = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    scored = _score_cosines(x, y, pairs.group, known)
    return _combine([scored, *_neighbour_terms(pairs, known, by_column=False)])


def _score_by_folds(pairs: _Pairs, folds: int) -> _Scored:
    """Scores the given pairs, and others that are known to be wrong, by the closed form
    of the other folds.
    """
    fold = pairs.group % folds
    rows_of = [(fold == k).nonzero().squeeze(1) for k in range(folds)]
    parts = [pairs.take(rows) for rows in rows_of]
    drawn = [_draw_known_wrong(part) for part in parts]
    others = _all_but_one(parts)
    ridge, by_column = _choose_ridge(parts, others, drawn)

    given = torch.empty(len(fold))
    better = torch.empty(len(fold), dtype=torch.long)
    known_wrong = []
    for k, rows in enumerate(rows_of):
        (directions,) = canonical_directions(others[k], [ridge], by_column=by_column)
        scored = _score_fold(parts[k], others[k], directions, drawn[k])
        given[rows] = scored.given
        better[rows] = rows[scored.better]
        known_wrong.append(scored.known_wrong)

    known = _Choice(
        torch.cat([rows[part.of_a] for rows, part in zip(rows_of, drawn, strict=True)]),
        torch.cat([rows[part.of_b] for rows, part in zip(rows_of, drawn, strict=True)]),
    )
    scored = _Scored(given, torch.cat(known_wrong), better)
    return _combine([scored, *_neighbour_terms(pairs, known, by_column)])


def _draw_known_wrong(pairs: _Pairs) -> _Choice:
    """Pairs that are known to be wrong, some for every row.

    A draw puts the rows in random order; a row's partner is the next one that differs
    from it in id and in the numbers of both sides.
    """
    n = len(pairs.group)
    generator = torch.Generator().manual_seed(0)
    of_a, of_b = [], []
    for _ in range(_DRAWS):
        order = torch.randperm(n, generator=generator)
        place = torch.empty_like(order)
        place[order] = torch.arange(n)
        waiting = torch.arange(n)
        for step in range(1, min(n, _STEPS)):
            candidate = order[(place[waiting] + step) % n]
            differs = torch.stack(
                [key[candidate] != key[waiting] for key in pairs[2:]]
            ).all(0)
            of_a.append(waiting[differs])
            of_b.append(candidate[differs])
            waiting = waiting[~differs]
            if not len(waiting):
                break
    return _Choice(torch.cat(of_a), torch.cat(of_b))


def _all_but_one(parts: list[_Pairs]) -> list[_Trained]:
    """For every fold the pairs of the other folds, in the form that costs less."""
    wide = max(parts[0].a.shape[1], parts[0].b.shape[1])
    if sum(len(part.group) for part in parts) < wide:
        return [
            CentredRows.of(
                torch.cat([part.a for part in others]),
                torch.cat([part.b for part in others]),
            )
            for others in _leave_one_out(parts)
        ]
    moments = [PairMoments.of(part.a, part.b) for part in parts]
    return [sum(others[1:], others[0]) for others in _leave_one_out(moments)]


def _leave_one_out(parts: list[_T]) -> list[list[_T]]:
    return [[*parts[:k], *parts[k + 1 :]] for k in range(len(parts))]


def _choose_ridge(
    parts: list[_Pairs], others: list[_Trained], drawn: list[_Choice]
) -> tuple[float, bool]:
    """The ridge, and whether columns are standardised, by which a given pair scores
    above a known wrong one most often: in the first fold, in more where it is small.
    """
    above: dict[tuple[float, bool], float] = {}
    judged = 0
    for part, trained, known in zip(parts, others, drawn, strict=True):
        if judged >= _JUDGED:
            break
        judged += len(part.group)
        for by_column in (False, True):
            tried = canonical_directions(trained, _RIDGES, by_column=by_column)
            for ridge, directions in zip(_RIDGES, tried, strict=True):
                scored = _score_fold(part, trained, directions, known)
                setting = ridge, by_column
                above[setting] = above.get(setting, 0.0) + _count_above(scored)
    return max(above, key=lambda setting: above[setting])


def _count_above(scored: _Scored) -> float:
    """How many times a given pair scores above a known wrong one."""
    wrong = scored.known_wrong.sort().values
    return float(torch.searchsorted(wrong, scored.given).sum())


def _score_fold(
    pairs: _Pairs, trained: _Trained, directions: CanonicalDirections, known: _Choice
) -> _Scored:
    """The pairs of a fold by directions that have not seen them; all rows count within
    the fold.
    """
    of_a, of_b = directions.weighted(1.0)
    x = F.normalize((pairs.a - trained.mean_a) @ of_a, dim=1).float()
    y = F.normalize((pairs.b - trained.mean_b) @ of_b, dim=1).float()
    return _score_cosines(x, y, pairs.group, known)


def _score_cosines(x: Tensor, y: Tensor, group: Tensor, known: _Choice) -> _Scored:
    """The cosines of unit rows less the mean ones of their nearest rows."""
    listed = _list_length(group)
    near_x, near_y = _find_nearest(x, y, listed), _find_nearest(y, x, listed)
    own = torch.arange(len(x))
    scores = []
    for of_x, of_y in (_Choice(own, own), known):
        hub_x = _mean_cosine(near_x, of_x, group, group[of_y])
        hub_y = _mean_cosine(near_y, of_y, group, group[of_x])
        scores.append((x[of_x] * y[of_y]).sum(1) - (hub_x + hub_y) / 2)
    nearest, _ = _first_of_other_ids(near_x.rows, group, [group])
    nearest = nearest[:, 0]
    fits = (x * y[nearest]).sum(1) > (x * y).sum(1)
    fits &= group[nearest] != group
    return _Scored(scores[0], scores[1], torch.where(fits, nearest, own))


def _neighbour_terms(pairs: _Pairs, known: _Choice, by_column: bool) -> list[_Scored]:
    """How like the two sides' neighbours are: of a row of a with the nearest other rows
    of a, the mean cosine of its row of b with theirs; and the other way round.
    """
    sides = []
    for rows in (pairs.a, pairs.b):
        spread = rows.std(0) if by_column else torch.ones_like(rows[0])
        scaled = rows / spread.masked_fill(spread == 0, 1.0)
        sides.append(F.normalize(scaled, dim=1).float())
    group = pairs.group
    own = torch.arange(len(group))
    listed = _list_length(group)
    terms = []
    for side, (mine, other) in enumerate((sides, sides[::-1])):
        near = _find_nearest(mine, mine, listed)
        means = []
        for chosen in (_Choice(own, own), known):
            query, opposite = chosen[side], chosen[1 - side]
            means.append(_mean_agreement(near.rows, other, group, query, opposite))
        terms.append(_Scored(means[0], means[1], own))
    return terms


def _combine(terms: list[_Scored]) -> _Scored:
    """The sum of the terms, in deviations of known wrong pairs from their mean; the
    first counts fully, the others as much as tells given pairs from known wrong ones
    best.
    """
    if not len(terms[0].known_wrong):
        return terms[0]
    standardised = []
    for term in terms:
        mean = term.known_wrong.mean()
        deviation = term.known_wrong.std(correction=0)
        deviation = deviation if deviation > 0 else torch.ones(())
        standardised.append(
            ((term.given - mean) / deviation, (term.known_wrong - mean) / deviation)
        )
    (given, known_wrong), *others = standardised
    tried = [
        _Scored(
            given + weight * sum(part for part, _ in others),
            known_wrong + weight * sum(part for _, part in others),
            terms[0].better,
        )
        for weight in _WEIGHTS
    ]
    return max(tried, key=_count_above)


def _list_length(group: Tensor) -> int:
    """As many nearest rows as leave enough of other ids."""
    largest = int(torch.bincount(group).max())
    return min(_NEAREST + 2 * largest, _LISTED)


def _find_nearest(queries: Tensor, rows: Tensor, count: int) -> _Near:
    """The nearest of (m, D) unit rows for (n, D) unit queries."""
    step = max(1, -(-len(rows) // _CANDIDATES))
    candidates = torch.arange(0, len(rows), step)
    others = rows[candidates].T
    count = min(count, len(candidates))
    found = [(part @ others).topk(count, dim=1) for part in torch.split(queries, _ROWS)]
    return _Near(
        torch.cat([candidates[top.indices] for top in found]),
        torch.cat([top.values for top in found]),
    )


def _first_of_other_ids(
    listed: Tensor, group: Tensor, left_out: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The first listed rows of other groups than those that are left out.

    Args:
        listed: (m, K) rows.
        group: (n,) groups of all rows.
        left_out: Vectors of (m,) groups.

    Returns:
        (m, k) rows, and (m, k) 1.0 where a row is of another group, else 0.0.
    """
    groups = group[listed]
    same = torch.stack([groups == one[:, None] for one in left_out]).any(0)
    places = same.byte().argsort(dim=1, stable=True)[:, :_NEAREST]
    return listed.gather(1, places), (~same).gather(1, places).float()


def _mean_cosine(near: _Near, query: Tensor, group: Tensor, left_out: Tensor) -> Tensor:
    """(m,) mean cosines of some rows' nearest rows but those of a group each; where the
    list holds no others, the last cosine.
    """
    means = []
    for part in torch.split(torch.arange(len(query)), _CHUNK):
        cosines = near.cosines[query[part]]
        same = group[near.rows[query[part]]] == left_out[part, None]
        place = (~same).cumsum(1)
        chosen = (~same & (place <= _NEAREST)).float()
        total = chosen.sum(1)
        mean = (cosines * chosen).sum(1) / total.clamp_min(1)
        means.append(torch.where(total > 0, mean, cosines[:, -1]))
    return torch.cat(means)


def _mean_agreement(
    listed: Tensor, other: Tensor, group: Tensor, query: Tensor, opposite: Tensor
) -> Tensor:
    """(m,) mean cosines, on the other side, of a row that stands opposite with those of
    the nearest rows of other ids; 0 where the list holds none.
    """
    means = []
    size = max(1, _NUMBERS // (_NEAREST * other.shape[1]))
    for part in torch.split(torch.arange(len(query)), size):
        mine, theirs = query[part], opposite[part]
        left_out = [group[mine], group[theirs]]
        rows, chosen = _first_of_other_ids(listed[mine], group, left_out)
        cosines = (other[rows] @ other[theirs].unsqueeze(2)).squeeze(2)
        total = chosen.sum(1).clamp_min(1)
        means.append((cosines * chosen).sum(1) / total)
    return torch.cat(means)
