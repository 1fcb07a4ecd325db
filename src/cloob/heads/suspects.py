"""Which pairs do not belong together: each scored by a closed form that has not seen
it.

Pairs are divided into folds by their ids. The canonical directions (``functional.cca``)
of the other folds give unit rows x and y of a fold. With h_j(x_i) the mean cosine of
x_i to its ten nearest rows y of other ids than pair j's, a pair (i, j) scores

    s(i, j) = <x_i, y_j> - (h_j(x_i) + h_i(y_j)) / 2,

so that a row which is near to everything gains nothing by it (CSLS, arXiv:1710.04087).
The given pairs score s(i, i). Pairs that are *known to be wrong* have j of another id
and other numbers on both sides, drawn at random within the fold; they score as a wrong
pair among the given ones does, for h leaves out the row that stands opposite, whichever
it is. Their scores choose the ridge, and tell how many of the given pairs are wrong
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
        (n,) float32 scores, between -2 and 2, or probabilities. They compare pairs of
        one call alone.

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
    result = suspicion(as_matrix("a", a), as_matrix("b", b), ids, folds)
    return result.wrong.probability if probability else result.scores


def as_matrix(name: str, rows: Any) -> Tensor:
    """Rows of anything that holds numbers, on the CPU; what float32 cannot hold is
    refused.
    """
    if isinstance(rows, Tensor):
        matrix = rows.detach().cpu()
    else:
        from sklearn.utils import check_array

        array = check_array(
            rows,
            accept_sparse="csr",
            order="C",
            ensure_all_finite=False,
            ensure_min_samples=0,
            input_name=name,
        )
        array = array.toarray() if hasattr(array, "toarray") else array
        dtype = np.float32 if array.dtype == np.float32 else np.float64
        matrix = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if matrix.is_complex():
        raise InputError(f"{name} holds complex numbers; real ones are needed")
    for start, part in enumerate(
        torch.split(matrix, _ROWS) if matrix.ndim == 2 else ()
    ):
        finite = part.float().isfinite().all(1)
        if not finite.all():
            row = start * _ROWS + int(finite.int().argmin())
            raise InputError(
                f"{name}: row {row} holds NaN, infinity or a number that float32 cannot"
                " hold"
            )
    return matrix


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
def suspicion(a: Tensor, b: Tensor, ids: Any = None, folds: int = _FOLDS) -> Suspicion:
    """As ``suspects``, with all that is known of the pairs."""
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
    group, fold_key = _number_ids(both, None if checked is None else checked[0])
    distinct = int(group.max()) + 1 if n else 0
    if folds < 2 or distinct < 2 * folds:
        raise InputError(
            f"{counted(distinct, 'distinct ids')} in {folds} folds; 2 folds or more, of"
            " 2 ids or more, are needed"
        )

    order = torch.from_numpy(np.argsort(both, kind="stable"))
    numbers = np.stack(digests).view(np.int64)
    pairs = _Pairs(
        _centred(a, order),
        _centred(b, order),
        group[order],
        *torch.from_numpy(numbers)[:, order],
    )
    scored = _score_by_folds(pairs, (fold_key % folds)[order], folds)
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


class _Scored(NamedTuple):
    """Scores as of ``Suspicion``."""

    given: Tensor
    known_wrong: Tensor
    better: Tensor


def _row_digests(rows: Tensor) -> np.ndarray:
    """(n,) uint64 digests of the numbers of every row, whatever their type."""
    digests = np.empty(len(rows), np.uint64)
    for start, part in enumerate(torch.split(rows, _ROWS)):
        wide = (part.double() + 0.0).numpy()  # -0.0 is 0.0
        for row, numbers in enumerate(wide, start * _ROWS):
            digest = hashlib.blake2b(numbers.tobytes(), digest_size=8).digest()
            digests[row] = int.from_bytes(digest, "big")
    return digests


def _number_ids(digests: np.ndarray, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(n,) numbers of the ids, and of what is dealt to the folds, in the order of the
    least digest of an id's pairs.

    Without ids, equal pairs are of one id. Ids that hold equal pairs are dealt to one
    fold, so that no pair is judged by its copy.
    """
    _, group = np.unique(digests if ids is None else ids.numpy(), return_inverse=True)
    least = np.full(int(group.max(initial=-1)) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(least, group, digests)
    number = np.empty(len(least), np.int64)
    number[np.argsort(least, kind="stable")] = np.arange(len(least))
    _, dealt = np.unique(least, return_inverse=True)
    return torch.from_numpy(number[group]), torch.from_numpy(dealt[group])


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


def _score_by_folds(pairs: _Pairs, fold: Tensor, folds: int) -> _Scored:
    """Scores the pairs of every fold by the directions of the other folds."""
    rows_of = [(fold == k).nonzero().squeeze(1) for k in range(folds)]
    parts = [pairs.take(rows) for rows in rows_of]
    partners = [_draw_partners(part) for part in parts]
    others = _all_but_one(parts)
    ridge, by_column = _choose_ridge(parts, others, partners)

    given = torch.empty(len(fold))
    better = torch.empty(len(fold), dtype=torch.long)
    known_wrong = []
    for k, rows in enumerate(rows_of):
        (directions,) = canonical_directions(others[k], [ridge], by_column=by_column)
        scored = _score_fold(parts[k], others[k], directions, partners[k])
        given[rows] = scored.given
        better[rows] = rows[scored.better]
        known_wrong.append(scored.known_wrong)
    return _Scored(given, torch.cat(known_wrong), better)


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


def _draw_partners(pairs: _Pairs) -> list[Tensor]:
    """For every row some rows that are known not to belong to it; -1 where there is
    none.

    A draw puts the rows in random order; a row's partner is the next one that differs
    from it in id and in the numbers of both sides.
    """
    n = len(pairs.group)
    generator = torch.Generator().manual_seed(0)
    partners = []
    for _ in range(_DRAWS):
        order = torch.randperm(n, generator=generator)
        place = torch.empty_like(order)
        place[order] = torch.arange(n)
        partner = torch.full((n,), -1)
        waiting = torch.arange(n)
        for step in range(1, min(n, _STEPS)):
            candidate = order[(place[waiting] + step) % n]
            differs = torch.stack(
                [key[candidate] != key[waiting] for key in pairs[2:]]
            ).all(0)
            partner[waiting[differs]] = candidate[differs]
            waiting = waiting[~differs]
            if not len(waiting):
                break
        partners.append(partner)
    return partners


def _choose_ridge(
    parts: list[_Pairs], others: list[_Trained], partners: list[list[Tensor]]
) -> tuple[float, bool]:
    """The ridge, and whether columns are standardised, by which a given pair scores
    above a known wrong one most often: in the first fold, in more where it is small.
    """
    above: dict[tuple[float, bool], float] = {}
    judged = 0
    for part, trained, drawn in zip(parts, others, partners, strict=True):
        if judged >= _JUDGED:
            break
        judged += len(part.group)
        for by_column in (False, True):
            tried = canonical_directions(trained, _RIDGES, by_column=by_column)
            for ridge, directions in zip(_RIDGES, tried, strict=True):
                scored = _score_fold(part, trained, directions, drawn[:1])
                wrong = scored.known_wrong.sort().values
                lower = torch.searchsorted(wrong, scored.given).sum()
                setting = ridge, by_column
                above[setting] = above.get(setting, 0.0) + float(lower)
    return max(above, key=lambda setting: above[setting])


def _score_fold(
    pairs: _Pairs,
    trained: _Trained,
    directions: CanonicalDirections,
    partners: list[Tensor],
) -> _Scored:
    """The pairs of a fold by directions that have not seen them; ``better`` counts
    within the fold.
    """
    of_a, of_b = directions.weighted(1.0)
    x = F.normalize((pairs.a - trained.mean_a) @ of_a, dim=1).float()
    y = F.normalize((pairs.b - trained.mean_b) @ of_b, dim=1).float()
    group, own = pairs.group, torch.arange(len(x))
    cosines = (x * y).sum(1)
    hubs_x, nearest, greatest = _neighbours(x, y, group, [group])
    hubs_y, *_ = _neighbours(y, x, group, [group])
    given = cosines - (hubs_x[0] + hubs_y[0]) / 2
    better = torch.where(greatest > cosines, nearest, own)

    opposite = [group[partner] for partner in partners]
    hubs_x, *_ = _neighbours(x, y, group, opposite)
    known_wrong = []
    for draw, partner in enumerate(partners):
        hub_y, *_ = _neighbours(y[partner], x, group, [group])
        wrong = (x * y[partner]).sum(1) - (hubs_x[draw] + hub_y[0]) / 2
        known_wrong.append(wrong[partner >= 0])
    return _Scored(given, torch.cat(known_wrong), better)


def _neighbours(
    queries: Tensor, rows: Tensor, group: Tensor, left_out: list[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """For every query the mean cosine of the nearest rows but those of one group; of
    the first groups also the nearest row and its cosine.

    Args:
        queries: (n, D) unit rows.
        rows: (m, D) unit rows.
        group: (m,) groups of the rows.
        left_out: Vectors of (n,) groups, each for a mean of its own.
    """
    step = max(1, -(-len(rows) // _CANDIDATES))
    candidates = torch.arange(0, len(rows), step)
    others, of_candidates = rows[candidates].T, group[candidates]
    count = min(_NEAREST, len(candidates))
    means = [torch.empty(len(queries)) for _ in left_out]
    nearest = torch.empty(len(queries), dtype=torch.long)
    greatest = torch.empty(len(queries))
    for part in torch.split(torch.arange(len(queries)), _ROWS):
        cosines = queries[part] @ others
        for place, groups in enumerate(left_out):
            same = groups[part, None] == of_candidates
            top = cosines.masked_fill(same, -1.0).topk(count, dim=1)
            means[place][part] = top.values.mean(1)
            if place == 0:
                nearest[part] = candidates[top.indices[:, 0]]
                greatest[part] = top.values[:, 0]
    return means, nearest, greatest
