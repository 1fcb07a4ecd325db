"""Ranks of the right answers, and the accuracies that follow from them.

Queries are (Q, D) rows, a gallery (G, D) rows of the same dtype; scores are computed in
float32 (float64 for float64 rows), in blocks of ``chunk`` rows. Ranks are int64,
0-based, on the queries' device; one rank serves every k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        queries = torch.arange(len(pairs), device=pairs.device)
        pairs = torch.stack([queries, pairs.long()], dim=1)
    return _count_ahead(query, gallery, pairs, chunk, both=False)[0]


def ranks_of_ids(
    query: Tensor, gallery: Tensor, ids: Tensor, chunk: int = CHUNK
) -> Tensor:
    """(N,) ranks of every query's id among the distinct ids; the gallery keeps the
    first row of an id.

    ``ids`` are (N,) integers: row i of both sides has id i.
    """
    first_rows, distinct = _first_rows(ids.to(query.device))
    return ranks(query, gallery[first_rows], distinct, chunk)


def mutual_ranks_of_ids(
    x: Tensor, y: Tensor, ids: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """:func:`ranks_of_ids` of x among y and of y among x; in one sweep, unless most ids
    are thrice or more, so that two against distinct rows are less work.
    """
    first_rows, distinct = _first_rows(ids.to(x.device))
    if 2 * len(first_rows) < len(ids):
        ranks_of_x = ranks(x, y[first_rows], distinct, chunk)
        return ranks_of_x, ranks(y, x[first_rows], distinct, chunk)
    rows = torch.arange(len(ids), device=x.device)
    first_of_id = first_rows[distinct]
    is_first = first_of_id == rows
    later = rows[~is_first]
    pairs = torch.stack([rows, first_of_id], dim=1)
    pairs_of_later = torch.stack([first_of_id[later], later], dim=1)
    pairs = torch.cat([pairs, pairs_of_later])
    return _count_ahead(x, y, pairs, chunk, both=True, counted=is_first)


def _first_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of every distinct id, and which of these every row's id is."""
    ids_in_order, distinct = torch.unique(ids, return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    first_rows = torch.full_like(ids_in_order, len(ids), dtype=torch.int64)
    return first_rows.scatter_reduce_(0, distinct, rows, "amin"), distinct


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
    """Share of queries with a positive among the k best, from their (Q,) ranks.

    Of classes it is the top-k accuracy, in retrieval recall@k, where one of several
    positives is enough, as for COCO and Flickr30k.
    """
    return int((as_vector(ranks, "ranks") < k).sum()) / len(ranks)


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
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ranks of the queries' positives in the gallery, and of the gallery's among
    the queries (only if ``both``).

    With ``counted``, (N,) bool of equally many rows of both sides, the other rows are
    asked for and are in no gallery.
    """
    query, gallery = comparable(query, gallery)
    pairs = pairs.to(query.device)
    n_groups = len(query)
    if group is None:
        group = torch.arange(n_groups, device=query.device)
    else:
        group = group.to(query.device)
        n_groups = int(group.max()) + 1
    sizes = n_groups, len(gallery)
    check_places(pairs, *sizes)
    _check_every_row_has_one(pairs, group, sizes, both)
    positives = _Positives(pairs, group, sizes, chunk)

    # 1 for what is in a gallery, 0 for what is not
    in_gallery = gallery.new_ones(len(gallery))
    in_gallery_back = query.new_ones(len(query))
    if counted is not None:
        in_gallery = in_gallery_back = counted.to(gallery)
    best, best_back = _best_positives(
        query, gallery, positives, in_gallery, in_gallery_back
    )
    least = least_tied(best, query, gallery)
    least_back = least_tied(best_back, gallery, query)

    ahead = torch.zeros_like(best, dtype=torch.int64)
    ahead_back = torch.zeros_like(best_back, dtype=torch.int64)
    scratch = query.new_empty(min(chunk, len(query)) * min(chunk, len(gallery)))
    for rows, columns, row, column in positives:
        scores = query[rows] @ gallery[columns].T
        if len(row):
            scores[row, column] = torch.nan  # ahead of nobody
        # Counted by a product with ones, exact below 2²⁴: torch takes eight times as
        # long to add up booleans.
        reached = scratch[: scores.numel()].view_as(scores)
        torch.ge(scores, least[rows, None], out=reached)
        ahead[rows].add_((reached @ in_gallery[columns]).long())
        if both:
            torch.ge(scores, least_back[columns], out=reached)
            ahead_back[columns].add_((in_gallery_back[rows] @ reached).long())
    ahead.masked_fill_(best == -torch.inf, UNRANKED)
    ahead_back.masked_fill_(best_back == -torch.inf, UNRANKED)
    return ahead, ahead_back


def _best_positives(
    query: Tensor,
    gallery: Tensor,
    positives: _Positives,
    in_gallery: Tensor,
    in_gallery_back: Tensor,
) -> tuple[Tensor, Tensor]:
    """Every query's best score with a positive that is in the gallery, and every
    gallery row's with one among the queries; −∞ without.
    """
    best = query.new_full((len(query),), -torch.inf)
    best_back = gallery.new_full((len(gallery),), -torch.inf)
    for rows, columns, row, column in positives:
        if len(row):
            scores = _positive_scores(query[rows], gallery[columns], row, column)
            forth = scores.masked_fill(in_gallery[columns][column] == 0, -torch.inf)
            best[rows].scatter_reduce_(0, row, forth, "amax")
            back = scores.masked_fill(in_gallery_back[rows][row] == 0, -torch.inf)
            best_back[columns].scatter_reduce_(0, column, back, "amax")
    return best, best_back


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


def check_places(pairs: Tensor, n_queries: int, n_gallery: int) -> None:
    """Refuses (P, 2) pairs of a query and a gallery row that there are not."""
    if len(pairs) == 0:
        return
    least, greatest = pairs.aminmax(dim=0)
    ends = torch.stack([least, greatest], dim=1).tolist()
    sizes = {"query": n_queries, "gallery row": n_gallery}
    for (kind, size), (first, last) in zip(sizes.items(), ends, strict=True):
        if not 0 <= first <= last < size:
            raise ValueError(f"{kind} {first} to {last} is out of range for {size}")


def pair_scores(query: Tensor, gallery: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(P,) scores of listed queries and gallery rows, −∞ for NaN."""
    scores = query.new_empty(len(row))
    at_once = max(1, (1 << 22) // max(1, query.shape[1]))
    for part in blocks(len(row), at_once):
        scores[part] = (query[row[part]] * gallery[column[part]]).sum(dim=1)
    return scores.nan_to_num_(nan=-torch.inf)


def least_tied(best: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """The least score of every row with one of the others that ties with its best one,
    but for rounding.
    """
    longest = others.norm(dim=1).nan_to_num(nan=0.0).max()
    rounding = 8 * torch.finfo(best.dtype).eps
    least: Tensor = best - rounding * longest * rows.norm(dim=1)
    return least


class _Positives:
    """The pairs that belong together, spelled out for one block of scores at a time.

    Pairs name a group of queries and a gallery row. Those of a block's columns are
    sorted by group, so that the positives of a query are a range of them.
    """

    def __init__(
        self, pairs: Tensor, group_of_row: Tensor, sizes: tuple[int, int], chunk: int
    ) -> None:
        self.group_of_row = group_of_row
        self.n_groups, n_columns = sizes
        self.strips = blocks(len(group_of_row), chunk)
        self.blocks = blocks(n_columns, chunk)

        group, column = pairs.unbind(dim=1)
        block = column // chunk
        order = (block * self.n_groups + group).argsort()
        n_of_block = _sums(block, torch.ones_like(block), len(self.blocks)).tolist()
        self.groups = torch.split(group[order], n_of_block)
        self.columns = torch.split(column[order], n_of_block)

        row = torch.arange(len(group_of_row), device=group.device)
        counts = []
        for place in range(len(self.blocks)):
            n_of_row, _ = self._ranges(place)
            counts.append(_sums(row // chunk, n_of_row, len(self.strips)))
        self.counts = torch.stack(counts).tolist()

    def _ranges(self, block: int) -> tuple[Tensor, Tensor]:
        """How many positives every query has among a block's columns, and the place of
        the first one in their list.
        """
        group = self.groups[block]
        n_of_group = _sums(group, torch.ones_like(group), self.n_groups)
        first_of_group = n_of_group.cumsum(dim=0) - n_of_group
        return n_of_group[self.group_of_row], first_of_group[self.group_of_row]

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """The queries and columns of every block of scores, and the (P,) rows and
        columns within it of its positives.
        """
        for block, columns in enumerate(self.blocks):
            n_of_row, first = self._ranges(block)
            # What is to be added to a pair's number to have its place in the list.
            shift = first - (n_of_row.cumsum(dim=0) - n_of_row)
            start = 0
            for rows, count in zip(self.strips, self.counts[block], strict=True):
                row = column = self.columns[block][:0]
                if count:
                    row = torch.repeat_interleave(n_of_row[rows], output_size=count)
                    number = torch.arange(start, start + count, device=row.device)
                    column = self.columns[block][number + shift[rows][row]]
                    column -= columns.start
                yield rows, columns, row, column
                start += count


def _sums(places: Tensor, numbers: Tensor, size: int) -> Tensor:
    """(size,) sums of the numbers of every place."""
    return numbers.new_zeros(size).index_add_(0, places, numbers)


def _positive_scores(
    query: Tensor, gallery: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """(P,) scores of a block's positives: of many by one product of matrices."""
    if len(row) <= 4 * max(len(query), len(gallery)):
        return pair_scores(query, gallery, row, column)
    scores: Tensor = (query @ gallery.T).nan_to_num_(nan=-torch.inf)
    return scores[row, column]


def _check_every_row_has_one(
    pairs: Tensor, group_of_row: Tensor, sizes: tuple[int, int], both: bool
) -> None:
    """Refuses a query without a positive, and a gallery row without one if it is
    ``both``.
    """
    group, column = pairs.unbind(dim=1)
    n_groups, n_columns = sizes
    named = group.new_zeros(n_groups).index_fill(0, group, 1)[group_of_row]
    if both:
        of_columns = group.new_zeros(n_columns).index_fill(0, column, 1)
        named = torch.cat([named, of_columns])
    if named.all():
        return
    first = int((named == 0).nonzero()[0])
    n_rows = len(group_of_row)
    if first < n_rows:
        raise ValueError(f"query {first} has no positive")
    raise ValueError(f"gallery row {first - n_rows} has no positive")
