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

import functools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.data.rows import row_digests
from cloob.data.vectors import hold_out
from cloob.errors import InputError, counted
from cloob.functional.cca import CentredRows, PairMoments, canonical_directions
from cloob.heads.matrix import pairs_of
from cloob.heads.wrong_share import WrongShare, estimate_wrong_share

FOLDS = 5
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
NEAREST = 10
# rows among which the nearest are looked for, evenly spread where there are more
CANDIDATES = 10_000
MAX_LISTED = 512  # nearest rows that are kept at most
BLOCK = 1024  # rows at a time
DRAWS = 4  # known wrong pairs for every given one, nearly
N_JUDGED = 200  # given pairs that choose the ridge, if there are as many
TERM_WEIGHTS = (0.0, 0.25, 0.5, 1.0)  # of the neighbours' terms
MAX_NUMBERS = 1 << 23  # that are gathered at a time

Trained = PairMoments | CentredRows


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


def suspects(
    a: object, b: object, ids: object = None, *, probability: bool = False
) -> Tensor:
    """How well the two sides of every pair belong together; the lowest scores are the
    most suspicious pairs.

    Args:
        a: (n, F_a) finite numbers: a tensor, an array, a sparse matrix or a data frame.
        b: (n, F_b) finite numbers; row i belongs to row i of a, or is suspected not to.
        ids: (n,) integers or texts; pairs of equal id are judged together, by the
            others. None: equal rows of a side are of one id.
        probability: Return the probability that a pair is wrong instead, estimated from
            all scores (``cloob.heads.wrong_share``). It falls as the score rises.

    Returns:
        (n,) float32 scores, or probabilities. 0 is the mean score of pairs that are
        known to be wrong, 1 their deviation; scores compare pairs of one call alone.

    Raises:
        InputError: Shapes do not fit, a number is not finite, or there are fewer than
            ten distinct ids.

    Example:
        >>> import torch, cloob
        >>> a = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> b = a @ torch.ones(8, 5).triu()
        >>> b[[3, 4]] = b[[4, 3]]  # two wrong pairs
        >>> sorted(cloob.suspects(a, b).argsort()[:2].tolist())
        [3, 4]
    """
    pairs, _ = hold_out(pairs_of(a, b, ids))
    batch = pairs.batch()
    x, y = batch.parts
    result = suspicion(x, y, batch.ids)
    return result.wrong.probability if probability else result.scores


@torch.no_grad()
def suspicion(
    a: Tensor, b: Tensor, ids: Tensor | None = None, *, in_one_space: bool = False
) -> Suspicion:
    """As ``suspects``, with all that is known of the pairs.

    Where rows of a and b are of one space already, as those of a trained model are,
    their cosine takes the place of the closed form's.
    """
    n = len(a)
    pairs, order = sorted_pairs(a, b, ids, n_folds=1 if in_one_space else FOLDS)
    matches = draw_matches(pairs)
    if in_one_space:
        x, y = (F.normalize(side.float(), dim=1)[order] for side in (a, b))
        by_column = False
        first_term, better = score_fold(pairs, 0, matches, x, y)
    else:
        first_term, better, by_column = score_by_other_folds(pairs, matches)
    terms = [first_term, *neighbour_terms(pairs, matches, by_column)]
    ordered = combine(terms, n)
    back = order.argsort()
    scores, known_wrong = ordered[:n][back], ordered[n:]
    wrong = estimate_wrong_share(scores, known_wrong, int(pairs.ids.max()) + 1)
    return Suspicion(scores, known_wrong, order[better][back], wrong)


class Pairs(NamedTuple):
    """Rows of both sides in the order of their digests, with what is known of every
    pair.
    """

    a: Tensor  # (n, F_a) float64
    b: Tensor  # (n, F_b) float64
    ids: Tensor  # (n,) int64 from 0, as all of these
    fold: Tensor
    digest_a: Tensor
    digest_b: Tensor

    def in_fold(self, fold: int) -> Tensor:
        """The rows of a fold."""
        return (self.fold == fold).nonzero().squeeze(1)


class Matches(NamedTuple):
    """Rows that are put together: the n given pairs, then m known to be wrong."""

    of_a: Tensor  # (n + m,) int64
    of_b: Tensor

    def blocks(self, n_numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Some at a time, of which each needs so many numbers."""
        size = max(1, MAX_NUMBERS // n_numbers)
        return zip(
            torch.split(self.of_a, size), torch.split(self.of_b, size), strict=True
        )


class Near(NamedTuple):
    """The nearest rows of every row, nearest first."""

    rows: Tensor  # (n, K) int64
    cosines: Tensor  # (n, K) float32


# --- rows in an order of their own ---


def sorted_pairs(
    a: Tensor, b: Tensor, ids: Tensor | None, n_folds: int
) -> tuple[Pairs, Tensor]:
    """The pairs in the order of their digests, and this order."""
    digest_a, digest_b = digests_of(a), digests_of(b)
    digest_of_pair = digest_a * np.uint64(0x9E3779B97F4A7C15) + digest_b
    numbers = number_ids(digest_of_pair, None if ids is None else ids.cpu().numpy())
    n_ids = int(numbers.max(initial=-1)) + 1
    if n_ids < 2 * n_folds:
        raise InputError(
            f"{counted(n_ids, 'distinct ids')} in {n_folds} folds; 2 ids or more a fold"
            " are needed"
        )
    folds = numbers % n_folds
    columns = (numbers, folds, digest_a.view(np.int64), digest_b.view(np.int64))
    order = torch.from_numpy(np.argsort(digest_of_pair, kind="stable"))
    ordered = [torch.from_numpy(column)[order] for column in columns]
    return Pairs(normalised(a[order]), normalised(b[order]), *ordered), order


def digests_of(rows: Tensor) -> np.ndarray:
    """(n,) uint64 digests of the numbers of every row, whatever their type."""
    wide = rows.double() + 0.0  # -0.0 is 0.0
    return row_digests(wide.numpy()) if len(rows) else np.empty(0, np.uint64)


def number_ids(digests: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """(n,) numbers of the ids, in the order of the least digest of an id's pairs.

    Equal pairs are of one id where there are no ids, and ids whose least pairs are
    equal are one, so that no pair is judged by its copy.
    """
    distinct, places = np.unique(digests if ids is None else ids, return_inverse=True)
    least = np.full(len(distinct), np.iinfo(np.uint64).max)
    np.minimum.at(least, places, digests)
    _, numbers = np.unique(least, return_inverse=True)
    return np.asarray(numbers[places])


def normalised(rows: Tensor) -> Tensor:
    """The rows as float64, less their mean, and divided by their largest number.

    The first row is subtracted before the mean, so that a constant column is zero; a
    column that varies by rounding alone becomes zero too.
    """
    first = rows[0].double()
    centred = rows.double() - first
    centred -= centred.mean(0)
    dtype = rows.dtype if rows.is_floating_point() else torch.float64
    rounding = torch.finfo(dtype).eps * first.abs()
    centred[:, centred.abs().amax(0) <= rounding] = 0.0
    size = centred.abs().max()
    return centred / size if size > 0 else centred


def draw_matches(pairs: Pairs) -> Matches:
    """The given pairs, and pairs that are known to be wrong: rows of a fold in random
    order, where they differ from the row opposite in id and in the numbers of both
    sides.
    """
    n = len(pairs.ids)
    generator = torch.Generator().manual_seed(0)
    drawn_a = pairs.fold.argsort(stable=True).repeat(DRAWS)  # fold after fold
    draws = torch.rand((DRAWS, n), generator=generator, dtype=torch.float64)
    drawn_b = (pairs.fold + draws).argsort(1).flatten()  # a draw is below 1
    differs = torch.ones(len(drawn_a), dtype=torch.bool)
    for key in (pairs.ids, pairs.digest_a, pairs.digest_b):
        differs &= key[drawn_a] != key[drawn_b]
    given = torch.arange(n)
    return Matches(
        torch.cat([given, drawn_a[differs]]), torch.cat([given, drawn_b[differs]])
    )


# --- scores ---


def score_by_other_folds(pairs: Pairs, matches: Matches) -> tuple[Tensor, Tensor, bool]:
    """(n + m,) scores of the pairs of every fold by the closed form of the others, the
    (n,) rows of b that fit best, and whether columns are standardised.
    """
    trained = train_without_each_fold(pairs)
    ridge, by_column = choose_ridge(pairs, matches, trained)
    scores = torch.empty(len(matches.of_a))
    better = torch.empty(len(pairs.ids), dtype=torch.long)
    for fold, moments in enumerate(trained):
        ((scores_of_fold, better_of_fold),) = score_by_ridges(
            pairs, fold, matches, moments, [ridge], by_column
        )
        scores[pairs.fold[matches.of_a] == fold] = scores_of_fold
        better[pairs.fold == fold] = better_of_fold
    return scores, better, by_column


def train_without_each_fold(pairs: Pairs) -> list[Trained]:
    """For every fold the pairs of the other folds, in the form that costs less."""
    if len(pairs.ids) < max(pairs.a.shape[1], pairs.b.shape[1]):
        rows_without = [pairs.fold != fold for fold in range(FOLDS)]
        return [CentredRows.of(pairs.a[rows], pairs.b[rows]) for rows in rows_without]
    rows_of = [pairs.in_fold(fold) for fold in range(FOLDS)]
    moments = [PairMoments.of(pairs.a[rows], pairs.b[rows]) for rows in rows_of]
    return [
        functools.reduce(operator.add, moments[:fold] + moments[fold + 1 :])
        for fold in range(FOLDS)
    ]


def choose_ridge(
    pairs: Pairs, matches: Matches, trained: list[Trained]
) -> tuple[float, bool]:
    """The ridge, and whether columns are standardised, by which a given pair scores
    above a known wrong one most often: in the first fold, in more where it is small.
    """
    n_above: Counter[tuple[float, bool]] = Counter()
    n_judged = 0
    for fold, moments in enumerate(trained):
        if n_judged >= N_JUDGED:
            break
        n_given = len(pairs.in_fold(fold))
        n_judged += n_given
        for by_column in (False, True):
            tried = score_by_ridges(pairs, fold, matches, moments, RIDGES, by_column)
            for ridge, (scores, _) in zip(RIDGES, tried, strict=True):
                n_above[ridge, by_column] += count_above(scores, n_given)
    return max(n_above, key=lambda setting: n_above[setting])


def score_by_ridges(
    pairs: Pairs,
    fold: int,
    matches: Matches,
    trained: Trained,
    ridges: Sequence[float],
    by_column: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What ``score_fold`` finds by directions of every ridge, which have not seen the
    fold.
    """
    rows = pairs.in_fold(fold)
    for directions in canonical_directions(trained, ridges, by_column=by_column):
        of_a, of_b = directions.weighted(1.0)
        x = F.normalize((pairs.a[rows] - trained.mean_a) @ of_a, dim=1).float()
        y = F.normalize((pairs.b[rows] - trained.mean_b) @ of_b, dim=1).float()
        yield score_fold(pairs, fold, matches, x, y)


def score_fold(
    pairs: Pairs, fold: int, matches: Matches, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a fold's unit rows (n', D) the cosines of its matches, less how near both are
    to everything in it, and (n',) the rows of b that fit best.
    """
    rows = pairs.in_fold(fold)
    ids = pairs.ids[rows]
    near_x, near_y = find_nearest(x, y, ids), find_nearest(y, x, ids)
    place_in_fold = torch.zeros_like(pairs.ids)
    place_in_fold[rows] = torch.arange(len(rows))
    is_in_fold = pairs.fold[matches.of_a] == fold
    matches_in_fold = Matches(
        place_in_fold[matches.of_a[is_in_fold]], place_in_fold[matches.of_b[is_in_fold]]
    )
    scores = []
    for of_a, of_b in matches_in_fold.blocks(near_x.rows.shape[1]):
        ids_near_x, ids_near_y = ids[near_x.rows[of_a]], ids[near_y.rows[of_b]]
        hub_x = mean_of_ten(near_x.cosines[of_a], ids_near_x, ids[of_b])
        hub_y = mean_of_ten(near_y.cosines[of_b], ids_near_y, ids[of_a])
        scores.append((x[of_a] * y[of_b]).sum(1) - (hub_x + hub_y) / 2)
    return torch.cat(scores), rows[best_fits(x, y, near_x, ids)]


def best_fits(x: Tensor, y: Tensor, near_x: Near, ids: Tensor) -> Tensor:
    """(n',) for every row x the nearest row y of another id, if it is nearer than the
    own one, which is taken otherwise.
    """
    is_other = ids[near_x.rows] != ids[:, None]
    first_other = is_other.byte().argmax(1, keepdim=True)  # 0 where there is none
    other = near_x.rows.gather(1, first_other).squeeze(1)
    is_nearer = (x * y[other]).sum(1) > (x * y).sum(1)
    fits_better = is_nearer & (ids[other] != ids)
    return torch.where(fits_better, other, torch.arange(len(ids)))


def neighbour_terms(pairs: Pairs, matches: Matches, by_column: bool) -> list[Tensor]:
    """How like the two sides' neighbours are: of a row of a with the nearest other rows
    of a, the mean cosine of its row of b with theirs; and the other way round.
    """
    a, b = unit_rows(pairs.a, by_column), unit_rows(pairs.b, by_column)
    near_a, near_b = find_nearest(a, a, pairs.ids), find_nearest(b, b, pairs.ids)
    swapped = Matches(matches.of_b, matches.of_a)
    return [
        mean_agreement(near_a, b, pairs.ids, matches),
        mean_agreement(near_b, a, pairs.ids, swapped),
    ]


def unit_rows(rows: Tensor, by_column: bool) -> Tensor:
    """Unit rows, of columns in units of their deviation if asked for."""
    if by_column:
        deviations = rows.std(0)
        rows = rows / deviations.masked_fill(deviations == 0, 1.0)
    return F.normalize(rows, dim=1).float()


def combine(terms: list[Tensor], n: int) -> Tensor:
    """(n + m,) the sum of the terms, in deviations of known wrong pairs from their
    mean; the first counts fully, the others as much as tells the n given pairs from
    known wrong ones best.
    """
    if len(terms[0]) == n:
        return terms[0]
    first, of_a, of_b = (standardised(term, n) for term in terms)
    tried = [first + weight * (of_a + of_b) for weight in TERM_WEIGHTS]
    return max(tried, key=lambda scores: count_above(scores, n))


def standardised(scores: Tensor, n: int) -> Tensor:
    """The scores in deviations of known wrong pairs from their mean."""
    deviation = scores[n:].std(correction=0)
    unit = deviation if deviation > 0 else torch.ones(())
    return (scores - scores[n:].mean()) / unit


def count_above(scores: Tensor, n: int) -> int:
    """How many times one of the n given pairs scores above a known wrong one."""
    known_wrong = scores[n:].sort().values
    return int(torch.searchsorted(known_wrong, scores[:n]).sum())


# --- the nearest rows ---


def find_nearest(queries: Tensor, rows: Tensor, ids: Tensor) -> Near:
    """The nearest of (n, D) unit rows for (n, D) unit queries, as many as leave enough
    of other ids.
    """
    step = max(1, -(-len(rows) // CANDIDATES))
    candidates = torch.arange(0, len(rows), step)
    largest = int(torch.bincount(ids).max())
    count = min(NEAREST + 2 * largest, MAX_LISTED, len(candidates))
    columns = rows[candidates].T
    blocks = [
        (block @ columns).topk(count, dim=1) for block in torch.split(queries, BLOCK)
    ]
    return Near(
        torch.cat([candidates[top.indices] for top in blocks]),
        torch.cat([top.values for top in blocks]),
    )


def mean_agreement(
    near: Near, other_side: Tensor, ids: Tensor, matches: Matches
) -> Tensor:
    """(n + m,) mean cosines, on the other side, of the row that stands opposite with
    those of a row's ten nearest rows of other ids.
    """
    means = []
    for rows, opposite in matches.blocks(near.rows.shape[1] * other_side.shape[1]):
        neighbours = near.rows[rows]
        partners_of_neighbours = other_side[neighbours]
        cosines = (partners_of_neighbours @ other_side[opposite].unsqueeze(2)).squeeze(
            2
        )
        means.append(mean_of_ten(cosines, ids[neighbours], ids[rows], ids[opposite]))
    return torch.cat(means)


def mean_of_ten(cosines: Tensor, ids: Tensor, *excluded_ids: Tensor) -> Tensor:
    """(m,) means of the first ten of (m, K) cosines, by the ids of their rows, that are
    of no excluded id; the last one where all are.
    """
    usable = torch.ones_like(ids, dtype=torch.bool)
    for excluded in excluded_ids:
        usable &= ids != excluded[:, None]
    chosen = usable & (usable.cumsum(1) <= NEAREST)
    chosen[:, -1] |= ~usable.any(1)
    weights = chosen.float() / chosen.sum(1, keepdim=True)
    return (cosines * weights).sum(1)
