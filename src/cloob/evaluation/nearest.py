"""The rows of one matrix that are nearest to each row of another, exactly, block by
block: no index, no matrix of all scores.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 16_384  # pairs that are multiplied in float64 together
_ROUNDING = 8.0  # times the rounding of a dot product of unit rows that is allowed for


def nearest(
    query: Tensor, blocks: Iterable[Tensor], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` rows of largest dot product for each row of ``query``.

    A block's products are computed in float32; what may be among the ``k`` is computed
    again in float64. So the answer does not depend on the size of the blocks. Of equal
    products the earlier row is nearer.

    Args:
        query: (Q, D) rows, finite.
        blocks: (n, D) rows of the other matrix, in their order, finite; together N.
        k: How many to find, 1 or more.

    Returns:
        (Q, min(k, N)) float64 products, largest first, and the int64 numbers of their
        rows.
    """
    rows = query.detach().float()
    exact = query.detach().double().numpy()
    best = _Best(len(query), k)
    length = rows.norm(dim=1)
    start = 0
    for block in blocks:
        block = block.detach()
        scores = rows @ block.float().T
        least = torch.from_numpy(best.least())
        if len(block) >= k:
            of_block = scores.topk(k, dim=1).values[:, -1].double()
            least = torch.maximum(least, of_block)
        # the margin is far above what is rounded here
        floor = (least - _margin(length, block)).float()
        places, columns = (scores >= floor[:, None]).nonzero().numpy().T
        found = _products(exact, block.numpy(), places, columns)
        best.add(places, columns + start, found)
        start += len(block)
    return best.scores, best.rows


def _products(
    query: np.ndarray, block: np.ndarray, places: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """(n,) float64 products of pairs of rows, row by row, so that each is the same in
    any company.
    """
    found = np.empty(len(places))
    for start in range(0, len(places), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        gathered = block[columns[part]].astype(np.float64)
        found[part] = np.einsum("nd,nd->n", query[places[part]], gathered)
    return found


def _margin(length: Tensor, block: Tensor) -> Tensor:
    """(Q,) how far a product in float32 may be from the exact one."""
    width = block.shape[1]
    eps = torch.finfo(torch.float32).eps
    longest = block.float().norm(dim=1).max()
    margin: Tensor = length.double() * longest * (_ROUNDING * eps * (1 + width**0.5))
    return margin


class _Best:
    """The best rows so far of every query, best first."""

    def __init__(self, n_queries: int, k: int) -> None:
        self.k = k
        self.scores = np.empty((n_queries, 0))
        self.rows = np.empty((n_queries, 0), np.int64)

    def least(self) -> np.ndarray:
        """(Q,) the k-th best product; −∞ where there are fewer."""
        if self.scores.shape[1] < self.k:
            return np.full(len(self.scores), -np.inf)
        return self.scores[:, -1].copy()

    def add(self, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        """Takes candidates, which have later rows than all before."""
        n_queries, n_best = self.scores.shape
        of_best = np.repeat(np.arange(n_queries), n_best)
        queries = np.concatenate([of_best, queries])
        rows = np.concatenate([self.rows.ravel(), rows])
        scores = np.concatenate([self.scores.ravel(), scores])
        order = np.lexsort((rows, -scores, queries))  # by query, best first
        in_order = queries[order]
        start_of_query = np.searchsorted(in_order, np.arange(n_queries))
        rank = np.arange(len(order)) - start_of_query[in_order]
        chosen = order[rank < self.k]
        # blocks come whole: every query has seen as many rows
        self.scores = scores[chosen].reshape(n_queries, -1)
        self.rows = rows[chosen].reshape(n_queries, -1)
