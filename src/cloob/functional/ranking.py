"""Ranks of the right answers, and the accuracies that follow from them.

Queries are (Q, D) rows, a gallery (G, D) rows of the same dtype; scores are computed in
float32 (float64 for float64 rows), in blocks of ``chunk`` rows. Ranks are int64,
0-based, on the queries' device; one rank serves every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

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
    if isinstance(targets, Tensor):
        pairs = targets
    else:
        flat = [(i, j) for i, positives in enumerate(targets) for j in positives]
        pairs = torch.tensor(flat, dtype=torch.int64).reshape(-1, 2)
    if pairs.ndim == 1:
        place = torch.arange(len(pairs), device=pairs.device)
        pairs = torch.stack([place, pairs.long()], dim=1)
    return _count_ahead(query, gallery, pairs, chunk, both=False)[0]


def ranks_of_ids(
    query: Tensor, gallery: Tensor, ids: Tensor, chunk: int = CHUNK
) -> Tensor:
    """(N,) ranks of every query's id among the distinct ids; the gallery keeps the
    first row of an id.

    ``ids`` are (N,) integers: row i of both sides has id i.
    """
    distinct, place = torch.unique(ids.to(query.device), return_inverse=True)
    rows = torch.arange(len(place), device=place.device)
    first = torch.full_like(distinct, len(place), dtype=torch.int64)
    first.scatter_reduce_(0, place, rows, "amin")
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
    labels = as_vector(labels, "labels").cpu()
    least = int(labels.min())
    greatest = int(labels.max())
    if not 0 <= least <= greatest < n_classes:
        raise ValueError(
            f"labels must lie in [0, {n_classes}), got {least} to {greatest}"
        )
    correct = correct.cpu().double()  # MPS has no float64
    hits = torch.bincount(labels, weights=correct, minlength=n_classes)
    return hits / torch.bincount(labels, minlength=n_classes)


@in_full_precision  # in TF32 nothing would tie with scores that are computed one by one
def _count_ahead(
    query: Tensor,
    gallery: Tensor,
    pairs: Tensor,
    chunk: int,
    *,
    both: bool,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ranks of the queries' positives in the gallery, and of the gallery's among
    the queries (only if ``both``).
    """
    blocks_of_scores = _Blocks(*comparable(query, gallery), chunk)
    positives = _positives(blocks_of_scores, pairs, both, group)
    best, best_back = positives.best()
    least, least_back = blocks_of_scores.tied_with(best, best_back)
    ahead = torch.zeros_like(best, dtype=torch.int64)
    ahead_back = torch.zeros_like(best_back, dtype=torch.int64)
    for cell, (rows, columns) in enumerate(blocks_of_scores.cells):
        scores = blocks_of_scores.scores(cell)
        positives.hide(scores, cell)
        # Counted by a product with ones, exact below 2²⁴: torch takes eight times as
        # long to add up booleans.
        reached = torch.empty_like(scores)
        torch.ge(scores, least[rows, None], out=reached)
        ahead[rows] += (reached @ torch.ones_like(reached[0])).long()
        if both:
            torch.ge(scores, least_back[columns], out=reached)
            ahead_back[columns] += (torch.ones_like(reached[:, 0]) @ reached).long()
    ahead.masked_fill_(best == -torch.inf, UNRANKED)
    ahead_back.masked_fill_(best_back == -torch.inf, UNRANKED)
    return ahead, ahead_back


def comparable(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64, with NaN for all of a row that is not finite."""
    are_matrices = query.ndim == gallery.ndim == 2 and len(query) and len(gallery)
    fit = are_matrices and query.shape[1] == gallery.shape[1]
    if not fit or query.dtype != gallery.dtype:
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


class _Blocks:
    """The (Q, G) scores of queries and a gallery, block by block."""

    def __init__(self, query: Tensor, gallery: Tensor, chunk: int) -> None:
        self.query = query
        self.gallery = gallery
        self.chunk = chunk
        rows = blocks(len(query), chunk)
        columns = blocks(len(gallery), chunk)
        self.n_across = len(columns)
        self.cells = list(product(rows, columns))

    def scores(self, cell: int) -> Tensor:
        """Those of a block."""
        rows, columns = self.cells[cell]
        return self.query[rows] @ self.gallery[columns].T

    def lowest(self) -> tuple[Tensor, Tensor]:
        """−∞ for every query, and for every row of the gallery."""
        lowest = self.query.new_full((len(self.query),), -torch.inf)
        return lowest, self.gallery.new_full((len(self.gallery),), -torch.inf)

    def tied_with(self, best: Tensor, best_back: Tensor) -> tuple[Tensor, Tensor]:
        """The least scores that tie with the best ones, but for rounding."""
        rounding = 8 * torch.finfo(best.dtype).eps
        lengths = self.query.norm(dim=1)
        lengths_back = self.gallery.norm(dim=1)
        longest = lengths.nan_to_num(nan=0.0).max()
        longest_back = lengths_back.nan_to_num(nan=0.0).max()
        least = best - rounding * longest_back * lengths
        return least, best_back - rounding * longest * lengths_back


class _Positives(NamedTuple):
    """Pairs of a group of queries and a gallery row that belong together."""

    group: Tensor  # (P,)
    column: Tensor  # (P,)
    group_of_row: Tensor  # (Q,)


class _PositiveList:
    """Few positives: a list of query rows and their gallery rows, sorted by the block
    of scores in which they lie.
    """

    def __init__(self, scores: _Blocks, row: Tensor, column: Tensor) -> None:
        self.scores = scores
        chunk = scores.chunk
        cell_of_pair = row // chunk * scores.n_across + column // chunk
        cell, order = cell_of_pair.sort(stable=True)
        self.row = row[order]
        self.column = column[order]
        after = torch.arange(1, len(scores.cells) + 1, device=cell.device)
        self.ends = [0, *torch.searchsorted(cell, after).tolist()]

    def best(self) -> tuple[Tensor, Tensor]:
        """The score of every query's best positive, and of every gallery row's."""
        query = self.scores.query
        best, best_back = self.scores.lowest()
        at_once = max(1, (1 << 22) // max(1, query.shape[1]))
        for part in blocks(len(self.row), at_once):
            row = self.row[part]
            column = self.column[part]
            scores = (query[row] * self.scores.gallery[column]).sum(1)
            scores = scores.nan_to_num(nan=-torch.inf)
            best.scatter_reduce_(0, row, scores, "amax")
            best_back.scatter_reduce_(0, column, scores, "amax")
        return best, best_back

    def hide(self, scores: Tensor, cell: int) -> None:
        """Makes the positives' scores of a block NaN: ahead of nobody."""
        rows, columns = self.scores.cells[cell]
        own = slice(self.ends[cell], self.ends[cell + 1])
        row = self.row[own] - rows.start
        column = self.column[own] - columns.start
        scores[row, column] = torch.nan


class _PositiveMasks:
    """Many positives: a mask of every block of scores, from the queries' groups."""

    def __init__(self, scores: _Blocks, positives: _Positives) -> None:
        self.scores = scores
        self.positives = positives

    def best(self) -> tuple[Tensor, Tensor]:
        """The score of every query's best positive, and of every gallery row's."""
        best, best_back = self.scores.lowest()
        for cell, (rows, columns) in enumerate(self.scores.cells):
            scores = self.scores.scores(cell).nan_to_num_(nan=-torch.inf)
            scores.masked_fill_(~self._belong(cell), -torch.inf)
            best[rows] = torch.maximum(best[rows], scores.amax(1))
            of_columns = torch.maximum(best_back[columns], scores.amax(0))
            best_back[columns] = of_columns
        return best, best_back

    def hide(self, scores: Tensor, cell: int) -> None:
        """As :meth:`_PositiveList.hide`."""
        scores.masked_fill_(self._belong(cell), torch.nan)

    def _belong(self, cell: int) -> Tensor:
        """(rows, columns) bool of a block: whether they belong together."""
        rows, columns = self.scores.cells[cell]
        group, column, group_of_row = self.positives
        present, place = torch.unique(group_of_row[rows], return_inverse=True)
        of_pair = torch.searchsorted(present, group.contiguous())
        of_pair = of_pair.clamp_max(len(present) - 1)
        is_here = present[of_pair] == group
        is_here &= (columns.start <= column) & (column < columns.stop)
        width = columns.stop - columns.start
        of_groups = place.new_zeros(len(present), width, dtype=torch.bool)
        of_groups[of_pair[is_here], column[is_here] - columns.start] = True
        belong: Tensor = of_groups[place]
        return belong


def _positives(
    scores: _Blocks, pairs: Tensor, both: bool, group: Tensor | None
) -> _PositiveList | _PositiveMasks:
    """The positives, checked; the device is waited for twice."""
    n_rows = len(scores.query)
    device = scores.query.device
    if group is None:
        group = torch.arange(n_rows, device=device)
    group = group.to(device)
    of_pair, column = pairs.to(device).unbind(1)
    positives = _Positives(of_pair, column, group)
    n_groups = _check_ranges(scores, positives)
    sizes = torch.zeros(n_groups, dtype=torch.int64, device=device)
    sizes.index_add_(0, group, torch.ones_like(group))
    n_of_pair = sizes[positives.group]
    count = _check_everyone(scores, positives, n_of_pair, n_groups, both)
    most = max(
        n_rows, len(scores.gallery), n_rows * len(scores.gallery) // scores.chunk
    )
    if count > 4 * most:
        return _PositiveMasks(scores, positives)

    # Every pair of a group is one of each of its rows.
    in_groups = group.argsort(stable=True)
    first_row = sizes.cumsum(0) - sizes
    first_entry = n_of_pair.cumsum(0) - n_of_pair
    pair = torch.repeat_interleave(n_of_pair, output_size=count)
    within = torch.arange(count, device=device) - first_entry[pair]
    row = in_groups[first_row[positives.group[pair]] + within]
    return _PositiveList(scores, row, positives.column[pair])


def _check_ranges(scores: _Blocks, positives: _Positives) -> int:
    """The number of groups; refuses pairs of what there is not."""
    group, column, group_of_row = positives
    if len(group) == 0:
        raise ValueError("query 0 has no positive")
    ends = [*group.aminmax(), *column.aminmax(), group_of_row.max()]
    least, greatest, first, last, last_group = torch.stack(ends).tolist()
    if not 0 <= least <= greatest <= last_group:
        raise ValueError(
            f"targets: query {least} to {greatest} is out of range for {last_group + 1}"
        )
    n_columns = len(scores.gallery)
    if not 0 <= first <= last < n_columns:
        raise ValueError(
            f"targets: gallery row {first} to {last} is out of range for {n_columns}"
        )
    return int(last_group) + 1


def _check_everyone(
    scores: _Blocks, positives: _Positives, n_of_pair: Tensor, n_groups: int, both: bool
) -> int:
    """The number of positives of all rows; refuses a row without one, and one of the
    gallery if it is ``both``.
    """
    group, column, group_of_row = positives
    named = group.new_zeros(n_groups).index_fill(0, group, 1)
    has_one = named[group_of_row]
    has_one_back = group.new_zeros(len(scores.gallery)).index_fill(0, column, 1)
    numbers = [n_of_pair.sum()]
    for found in (has_one, has_one_back):
        numbers += [found.amin(), found.argmin()]
    count, every, first, every_back, first_back = torch.stack(numbers).tolist()
    if not every:
        raise ValueError(f"query {first} has no positive")
    if both and not every_back:
        raise ValueError(f"gallery row {first_back} has no positive")
    return int(count)
