"""Ranks of the right answers, and the accuracies that follow from them.

Queries are (Q, D) rows, a gallery (G, D) rows of the same dtype; scores are computed in
float32 (float64 for float64 rows), in blocks of ``chunk`` rows. Ranks are int64,
0-based, on the queries' device; one rank serves every k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cloob.functional.checks import as_vector
from cloob.functional.private import full_products, outside_autocast
from cloob.functional.streamed.tiles import blocks

UNRANKED = torch.iinfo(torch.int64).max
"""The rank of a query that has no finite score with any of its positives: no k reaches
it.
"""


@outside_autocast
def ranks(
    query: Tensor,
    gallery: Tensor,
    targets: Tensor | Sequence[Sequence[int]],
    chunk: int = 4096,
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
    query: Tensor, gallery: Tensor, ids: Tensor, chunk: int = 4096
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


@outside_autocast
def mutual_ranks(
    x: Tensor, y: Tensor, pairs: Tensor, chunk: int = 4096, group: Tensor | None = None
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
    correct, labels = (
        correct.cpu(),
        as_vector(labels, "labels").cpu(),
    )  # MPS has no float64
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise ValueError(
            f"labels must lie in [0, {n_classes}), got {int(labels.min())} to"
            f" {int(labels.max())}"
        )
    hits = torch.bincount(labels, weights=correct.double(), minlength=n_classes)
    return hits / torch.bincount(labels, minlength=n_classes)


@full_products()  # in TF32 nothing would tie with scores that are computed one by one
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
    group = (
        torch.arange(len(query), device=query.device)
        if group is None
        else group.to(query.device)
    )
    pairs = pairs.to(query.device)
    _check(query, gallery, pairs, group, both)
    # Within the rounding of half precision neighbourhoods would tie.
    query, gallery = (
        t if t.dtype == torch.float64 else t.float() for t in (query, gallery)
    )
    finite = [t.isfinite().all(1, keepdim=True) for t in (query, gallery)]
    query, gallery = (
        t if ok.all() else t.masked_fill(~ok, torch.nan)
        for t, ok in zip((query, gallery), finite, strict=True)
    )
    block = pairs[:, 1] // chunk
    sizes = torch.bincount(block, minlength=-(-len(gallery) // chunk)).tolist()
    of_block = torch.split(pairs[block.argsort()], sizes)
    cells = [
        (rows, columns, theirs)
        for rows in blocks(query, chunk)
        for columns, theirs in zip(blocks(gallery, chunk), of_block, strict=True)
    ]
    best, best_back = (
        rows.new_full((len(rows),), -torch.inf) for rows in (query, gallery)
    )
    for rows, columns, theirs in cells:
        inside = _inside(group[rows], theirs, columns)
        if inside is not None and int(inside.sum()) <= 4 * max(
            inside.shape
        ):  # few are computed one by one
            row, column = inside.nonzero(as_tuple=True)
            scores = (
                (query[rows][row] * gallery[columns][column])
                .sum(1)
                .nan_to_num(nan=-torch.inf)
            )
            best[rows].scatter_reduce_(0, row, scores, "amax")
            best_back[columns].scatter_reduce_(0, column, scores, "amax")
        elif inside is not None:
            scores = (
                (query[rows] @ gallery[columns].T)
                .nan_to_num_(nan=-torch.inf)
                .masked_fill_(~inside, -torch.inf)
            )
            torch.maximum(best[rows], scores.amax(1), out=best[rows])
            torch.maximum(best_back[columns], scores.amax(0), out=best_back[columns])
    rounding = (
        8 * torch.finfo(query.dtype).eps
    )  # within which scores tie with the best positives
    lengths, lengths_back = query.norm(dim=1), gallery.norm(dim=1)
    least = best - rounding * lengths_back.nan_to_num(nan=0.0).max() * lengths
    least_back = best_back - rounding * lengths.nan_to_num(nan=0.0).max() * lengths_back
    ahead, ahead_back = (
        torch.zeros_like(b, dtype=torch.int64) for b in (best, best_back)
    )
    for rows, columns, theirs in cells:
        scores = query[rows] @ gallery[columns].T
        if (inside := _inside(group[rows], theirs, columns)) is not None:
            scores.masked_fill_(
                inside, torch.nan
            )  # no negatives; NaN is ahead of nobody
        ahead[rows] += (scores >= least[rows, None]).sum(1)
        if both:
            ahead_back[columns] += (scores >= least_back[None, columns]).sum(0)
    return torch.where(best > -torch.inf, ahead, UNRANKED), torch.where(
        best_back > -torch.inf, ahead_back, UNRANKED
    )


def _inside(group: Tensor, pairs: Tensor, columns: slice) -> Tensor | None:
    """(rows, columns) bool of a block: positives, by the rows' groups and the columns'
    pairs; None without any.
    """
    present, place = torch.unique(group, return_inverse=True)
    of = torch.searchsorted(present, pairs[:, 0].contiguous()).clamp_max(
        len(present) - 1
    )
    kept = present[of] == pairs[:, 0]
    if not kept.any():
        return None
    belongs = torch.zeros(
        len(present),
        columns.stop - columns.start,
        dtype=torch.bool,
        device=group.device,
    )
    belongs[of[kept], pairs[kept, 1] - columns.start] = True
    inside: Tensor = belongs[place]
    return inside


def _check(
    query: Tensor, gallery: Tensor, pairs: Tensor, group: Tensor, both: bool
) -> None:
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
    rows = torch.arange(len(gallery), device=group.device)
    for index, place, side in (
        (pairs[:, 0], group, "query"),
        (pairs[:, 1], rows, "gallery row"),
    ):
        size = int(place.max()) + 1
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(
                f"targets: {side} {int(index.min())} to {int(index.max())} is out of"
                f" range for {size}"
            )
        has = (torch.bincount(index, minlength=size) > 0)[place]
        if not has.all() and (both or side == "query"):
            raise ValueError(f"{side} {int((~has).nonzero()[0])} has no positive")
