"""Ranks of the right answers, and the accuracies that follow from them.

Queries are (Q, D) rows, a gallery (G, D) rows of the same dtype; scores are computed in
float32 (float64 for float64 rows), in blocks of ``chunk`` rows. Ranks are int64,
0-based, on the queries' device; one rank serves every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from cloob.functional.checks import as_vector
from cloob.functional.private import in_full_precision
from cloob.functional.streamed.tiles import blocks

CHUNK = 1024
"""Rows of a block, whose scores stay in a processor's cache."""
UNRANKED = torch.iinfo(torch.int64).max
"""The rank of a query that has no finite score with any of its positives: no k reaches
it.
"""


def ranks(
    query: Tensor,
    gallery: Tensor,
    targets: Tensor | Sequence[Sequence[int]],
    chunk: int = CHUNK,
) -> Tensor:
    """(Q,) ranks of every query's best positive in the gallery by scalar product.

    ``targets`` are the positives: a (Q,) int64 tensor of gallery rows, Q non-empty
    sequences of them, or (P, 2) int64 pairs (query, gallery row), of every query one or
    more. The rank is the number of negatives (gallery rows that are no positive of the
    query) that score at least as much as the best positive: a tie ranks last, so that a
    tower that maps everything to one point earns nothing. Scores within the rounding of
    a scalar product (8 ulp of ‖query‖·max ‖gallery‖) are tied, which makes the rank of
    duplicate rows independent of ``chunk`` and of the matmul. A row that is not finite
    scores −∞: in the gallery it is ahead of nobody; a query without a finite positive
    score is ``UNRANKED``.
    """
    if not isinstance(targets, Tensor):
        flat = [(i, j) for i, positives in enumerate(targets) for j in positives]
        targets = torch.tensor(flat, dtype=torch.int64).reshape(-1, 2)
    elif targets.ndim == 1:
        targets = torch.stack(
            [torch.arange(len(targets), device=targets.device), targets.long()], 1
        )
    return _count_ahead(query, gallery, targets, chunk, both=False)[0]


def ranks_of_ids(
    query: Tensor, gallery: Tensor, ids: Tensor, chunk: int = CHUNK
) -> Tensor:
    """(N,) ranks of every query's id among the distinct ids; the gallery keeps the
    first row of an id.

    ``ids`` are (N,) integers: row i of both sides has id i.
    """
    distinct, place = torch.unique(ids.to(query.device), return_inverse=True)
    rows = torch.arange(len(place), device=place.device)
    first = torch.full_like(distinct, len(place), dtype=torch.int64).scatter_reduce_(
        0, place, rows, "amin"
    )
    return ranks(query, gallery[first], place, chunk)


def mutual_ranks_of_ids(
    x: Tensor, y: Tensor, ids: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """:func:`ranks_of_ids` of x among y and of y among x, in one sweep where no id is
    twice.
    """
    if len(torch.unique(ids)) < len(ids):
        return ranks_of_ids(x, y, ids, chunk), ranks_of_ids(y, x, ids, chunk)
    place = torch.arange(len(ids), device=x.device)
    return mutual_ranks(x, y, torch.stack([place, place], dim=1), chunk)


def mutual_ranks(
    x: Tensor, y: Tensor, pairs: Tensor, chunk: int = CHUNK, group: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The (N,) ranks of x's positives among the (M, D) rows y and the (M,) ranks of y's
    among x, from one sweep.

    ``pairs`` are (P, 2) int64 rows of x and y that belong together; every row of x and
    of y at least once. With ``group``, the (N,) int64 group of every row of x, they
    name a group and a row of y, and a pair holds for all rows of its group: k rows that
    share k positives take 2k numbers, not k².
    """
    return _count_ahead(x, y, pairs, chunk, both=True, group=group)


def topk_accuracy(ranks: Tensor, k: int = 1) -> float:
    """Share of samples whose label is among the k best classes, from their (N,) 0-based
    ranks.
    """
    return int((as_vector(ranks, "ranks") < k).sum()) / len(ranks)


recall_at_k = topk_accuracy
"""Share of queries with a positive among the k nearest: one of several is enough, as
for COCO and Flickr30k.
"""


def median_rank(ranks: Tensor) -> float:
    """Median of (Q,) ranks, counted from 1 as in retrieval papers; ``inf`` where it
    falls on an ``UNRANKED`` query.
    """
    ordered = as_vector(ranks, "ranks").sort().values
    low, high = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].tolist()
    return float("inf") if high == UNRANKED else (low + high) / 2 + 1


def per_class_recall(correct: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(n_classes,) share of correct samples in every class, float64 on the CPU; NaN for
    a class without samples.

    ``correct`` is (N,) bool or 0/1, ``labels`` (N,) int64 in [0, n_classes).
    """
    # MPS has no float64
    correct, labels = (
        correct.cpu(),
        as_vector(labels, "labels").cpu(),
    )
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise ValueError(
            f"labels must lie in [0, {n_classes}), got {int(labels.min())} to"
            f" {int(labels.max())}"
        )
    hits = torch.bincount(labels, weights=correct.double(), minlength=n_classes)
    return hits / torch.bincount(labels, minlength=n_classes)


@in_full_precision  # in TF32 nothing would tie with scores that are computed one by one
def _count_ahead(
    query: Tensor,
    gallery: Tensor,
    pairs: Tensor,
    chunk: int,
    both: bool,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ranks of the queries' positives in the gallery, and of the gallery's among
    the queries (only if ``both``).
    """
    query, gallery = comparable(query, gallery)
    positives = _positives(query, gallery, pairs, chunk, both, group)
    best, best_back = positives.best()

    rounding = 8 * torch.finfo(query.dtype).eps  # within which scores tie with the best
    lengths, lengths_back = query.norm(dim=1), gallery.norm(dim=1)
    longest = lengths.nan_to_num(nan=0.0).max()
    longest_back = lengths_back.nan_to_num(nan=0.0).max()
    least = best - rounding * longest_back * lengths
    least_back = best_back - rounding * longest * lengths_back
    ahead = torch.zeros_like(best, dtype=torch.int64)
    ahead_back = torch.zeros_like(best_back, dtype=torch.int64)
    for cell, (rows, columns) in enumerate(positives.cells):
        scores = query[rows] @ gallery[columns].T
        positives.hide(scores, cell)
        # Counted by a product with ones, exact below 2²⁴: torch takes eight times as
        # long to add up booleans.
        counted = torch.ge(scores, least[rows, None], out=torch.empty_like(scores))
        ahead[rows] += (counted @ counted.new_ones(counted.shape[1])).long()
        if both:
            torch.ge(scores, least_back[None, columns], out=counted)
            ahead_back[columns] += (counted.new_ones(len(counted)) @ counted).long()
    return (
        torch.where(best > -torch.inf, ahead, UNRANKED),
        torch.where(best_back > -torch.inf, ahead_back, UNRANKED),
    )


def comparable(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64, with NaN for all of a row that is not finite."""
    fit = (
        query.ndim == gallery.ndim == 2
        and query.shape[1] == gallery.shape[1]
        and query.dtype == gallery.dtype
    )
    if not fit or len(query) == 0 or len(gallery) == 0:
        shapes = (
            f"{query.dtype} {tuple(query.shape)} and {gallery.dtype}"
            f" {tuple(gallery.shape)}"
        )
        raise ValueError(
            "expected non-empty (Q, D) queries and a (G, D) gallery of one dtype, got"
            f" {shapes}"
        )
    if query.dtype != torch.float64:  # half precision would make neighbours tie
        query, gallery = query.float(), gallery.float()
    bad = ~query.isfinite().all(1, keepdim=True)
    bad_back = ~gallery.isfinite().all(1, keepdim=True)
    if bad.any() | bad_back.any():
        query = query.masked_fill(bad, torch.nan)
        gallery = gallery.masked_fill(bad_back, torch.nan)
    return query, gallery


class _PositiveList:
    """Few positives: a list of query rows and their gallery rows, sorted by the block
    of scores in which they lie.
    """

    def __init__(
        self, query: Tensor, gallery: Tensor, chunk: int, row: Tensor, column: Tensor
    ) -> None:
        self.query, self.gallery = query, gallery
        self.cells = _cells(query, gallery, chunk)
        n_across = -(-len(gallery) // chunk)
        cell_of_pair = row // chunk * n_across + column // chunk
        cell, order = cell_of_pair.sort(stable=True)
        self.row, self.column = row[order], column[order]
        ends = torch.arange(1, len(self.cells) + 1, device=cell.device)
        self.ends = [0, *torch.searchsorted(cell, ends).tolist()]

    def best(self) -> tuple[Tensor, Tensor]:
        """The score of every query's best positive, and of every gallery row's."""
        best = self.query.new_full((len(self.query),), -torch.inf)
        best_back = self.gallery.new_full((len(self.gallery),), -torch.inf)
        at_once = max(1, (1 << 22) // max(1, self.query.shape[1]))
        for start in range(0, len(self.row), at_once):
            row = self.row[start : start + at_once]
            column = self.column[start : start + at_once]
            scores = (self.query[row] * self.gallery[column]).sum(1)
            scores = scores.nan_to_num(nan=-torch.inf)
            best.scatter_reduce_(0, row, scores, "amax")
            best_back.scatter_reduce_(0, column, scores, "amax")
        return best, best_back

    def hide(self, scores: Tensor, cell: int) -> None:
        """Makes the positives' scores of a block NaN: ahead of nobody."""
        rows, columns = self.cells[cell]
        own = slice(self.ends[cell], self.ends[cell + 1])
        row, column = self.row[own] - rows.start, self.column[own] - columns.start
        scores[row, column] = torch.nan


class _PositiveMasks:
    """Many positives: a mask of every block of scores, from the queries' groups."""

    def __init__(
        self, query: Tensor, gallery: Tensor, chunk: int, group: Tensor, pairs: Tensor
    ) -> None:
        self.query, self.gallery = query, gallery
        self.cells = _cells(query, gallery, chunk)
        self.group, self.pairs = group, pairs

    def best(self) -> tuple[Tensor, Tensor]:
        """The score of every query's best positive, and of every gallery row's."""
        best = self.query.new_full((len(self.query),), -torch.inf)
        best_back = self.gallery.new_full((len(self.gallery),), -torch.inf)
        for cell, (rows, columns) in enumerate(self.cells):
            scores = self.query[rows] @ self.gallery[columns].T
            scores.nan_to_num_(nan=-torch.inf)
            scores.masked_fill_(~self._inside(cell), -torch.inf)
            torch.maximum(best[rows], scores.amax(1), out=best[rows])
            torch.maximum(best_back[columns], scores.amax(0), out=best_back[columns])
        return best, best_back

    def hide(self, scores: Tensor, cell: int) -> None:
        """As :meth:`_PositiveList.hide`."""
        scores.masked_fill_(self._inside(cell), torch.nan)

    def _inside(self, cell: int) -> Tensor:
        """(rows, columns) bool of a block: whether they belong together."""
        rows, columns = self.cells[cell]
        present, place = torch.unique(self.group[rows], return_inverse=True)
        group, column = self.pairs.unbind(1)
        of = torch.searchsorted(present, group.contiguous()).clamp_max(len(present) - 1)
        own = present[of] == group
        own &= (columns.start <= column) & (column < columns.stop)
        width = columns.stop - columns.start
        belongs = place.new_zeros(len(present), width, dtype=torch.bool)
        belongs[of[own], column[own] - columns.start] = True
        inside: Tensor = belongs[place]
        return inside


def _cells(query: Tensor, gallery: Tensor, chunk: int) -> list[tuple[slice, slice]]:
    rows = blocks(len(query), chunk)
    return list(product(rows, blocks(len(gallery), chunk)))


def _positives(
    query: Tensor,
    gallery: Tensor,
    pairs: Tensor,
    chunk: int,
    both: bool,
    group: Tensor | None,
) -> _PositiveList | _PositiveMasks:
    """The positives, checked; the device is waited for twice."""
    q, g, device = len(query), len(gallery), query.device
    pairs = pairs.to(device)
    group = torch.arange(q, device=device) if group is None else group.to(device)
    if len(pairs) == 0:
        raise ValueError("query 0 has no positive")
    ends = [*pairs.amin(0), *pairs.amax(0), group.max()]
    *ranges, last_group = torch.stack(ends).tolist()
    for low, high, size, side in (
        (ranges[0], ranges[2], last_group + 1, "query"),
        (ranges[1], ranges[3], g, "gallery row"),
    ):
        if not 0 <= low <= high < size:
            raise ValueError(
                f"targets: {side} {low} to {high} is out of range for {size}"
            )

    rows_of_group = torch.zeros(last_group + 1, dtype=torch.int64, device=device)
    rows_of_group.index_add_(0, group, torch.ones_like(group))
    named = torch.zeros(last_group + 1, dtype=torch.int64, device=device)
    without = named.index_fill(0, pairs[:, 0], 1)[group] == 0
    without_back = rows_of_group.new_zeros(g).index_fill(0, pairs[:, 1], 1) == 0
    n_rows = rows_of_group[pairs[:, 0]]
    numbers = [n_rows.sum()]
    for missing in (without, without_back):
        numbers += [missing.any(), missing.int().argmax()]
    count, any_missing, first, any_back, first_back = torch.stack(numbers).tolist()
    if any_missing:
        raise ValueError(f"query {first} has no positive")
    if any_back and both:
        raise ValueError(f"gallery row {first_back} has no positive")

    if count > 4 * max(q, g, q * g // chunk):
        return _PositiveMasks(query, gallery, chunk, group, pairs)
    # Every pair of a group is one of each of its rows.
    in_groups = group.argsort(stable=True)
    first_row = rows_of_group.cumsum(0) - rows_of_group
    first_entry = n_rows.cumsum(0) - n_rows
    pair = torch.repeat_interleave(n_rows, output_size=count)
    within = torch.arange(count, device=device) - first_entry[pair]
    row = in_groups[first_row[pairs[pair, 0]] + within]
    return _PositiveList(query, gallery, chunk, row, pairs[pair, 1])
