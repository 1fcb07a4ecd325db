"""Exact search: the rows with the largest dot products, found in float32 blocks and scored again in float64.

Legend: n rows, Q queries, D their width, k = top. A float32 product of unit rows is off by at most about D·2⁻²⁴; so the
k best are among the rows that come within twice that of the k-th best product. These few are scored again one by
one, so that a row's score depends on nothing but the row and the query, and equal rows tie exactly: the lower id first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloob.search.store import Ids, Vectors

BLOCK = 32_768
"""Rows that are multiplied at once: 64 MB at D = 512."""

_HALF_ULP = 2.0**-24


@dataclass(frozen=True, eq=False)
class Part:
    """Rows to search, perhaps not all of them.

    Attributes:
        ids: (n,) ascending.
        rows: (n, D) float32.
        positions: (m,) int64 ascending, the rows that count; None: all.
    """

    ids: Ids
    rows: Vectors
    positions: Ids | None = None

    def __len__(self) -> int:
        return len(self.ids) if self.positions is None else len(self.positions)

    def only(self, ids: Ids) -> Part:
        """Those of its rows whose id is in an ascending list."""
        places = np.searchsorted(self.ids, ids)
        there = places < len(self.ids)
        there[there] = self.ids[places[there]] == ids[there]
        found = places[there]
        if self.positions is not None:
            found = np.intersect1d(found, self.positions, assume_unique=True)
        return Part(self.ids, self.rows, found.astype(np.int64))


def nearest(parts: Sequence[Part], queries: Vectors, top: int) -> tuple[Ids, Vectors]:
    """The k rows nearest to each query, best first, equal ones by id.

    Args:
        parts: What is searched.
        queries: (Q, D).
        top: k.

    Returns:
        Ids and scores, (Q, k) each; where there are fewer rows than k, id 0 and score −inf.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    margin = 2 * queries.shape[1] * _HALF_ULP * max(1.0, float(np.linalg.norm(queries, axis=1).max(initial=0)))
    pools = [_Pool(top, margin) for _ in queries]
    for number, part in enumerate(parts):
        for positions, rows in _blocks(part):
            products = np.nan_to_num(queries @ rows.T, nan=-np.inf)
            for pool, row in zip(pools, products, strict=True):
                pool.add(number, positions, row)
    ids = np.zeros((len(queries), top), np.int64)
    scores = np.full((len(queries), top), -np.inf, np.float32)
    for i, (pool, query) in enumerate(zip(pools, queries, strict=True)):
        found = [(parts[number], pool.positions[pool.parts == number]) for number in np.unique(pool.parts)]
        if found:
            best = rescore(found, query, top)
            ids[i, : len(best[0])], scores[i, : len(best[0])] = best
    return ids, scores


def rescore(found: Sequence[tuple[Part, Ids]], query: Vectors, top: int) -> tuple[Ids, Vectors]:
    """The best of some rows by float64 products, best first; at most ``top``."""
    exact = query.astype(np.float64)
    ids = np.concatenate([part.ids[positions] for part, positions in found])
    scores = np.concatenate([_products(part.rows, positions, exact) for part, positions in found])
    order = np.lexsort((ids, -scores))[:top]
    order = order[np.isfinite(scores[order])]
    return ids[order], scores[order]


def _products(rows: Vectors, positions: Ids, query: npt.NDArray[np.float64]) -> Vectors:
    """Each row's own sum, in an order that depends on D alone."""
    parts = [
        (rows[positions[start : start + BLOCK]].astype(np.float64) * query).sum(1)
        for start in range(0, max(1, len(positions)), BLOCK)
    ]
    result: Vectors = np.concatenate(parts).astype(np.float32)
    return result


class _Pool:
    """Of one query, the rows that may be among the k best."""

    def __init__(self, top: int, margin: float) -> None:
        self._top, self._margin = top, margin
        self._least = -np.inf
        self.parts = np.empty(0, np.int64)
        self.positions = np.empty(0, np.int64)
        self._products = np.empty(0, np.float32)

    def add(self, part: int, positions: Ids, products: Vectors) -> None:
        """Looks at one block."""
        least = self._least
        if len(products) > self._top:
            least = max(least, float(np.partition(products, -self._top)[-self._top]) - self._margin)
        near = np.flatnonzero(products >= least)
        self.parts = np.concatenate([self.parts, np.full(len(near), part)])
        self.positions = np.concatenate([self.positions, positions[near]])
        self._products = np.concatenate([self._products, products[near]])
        if len(self._products) > self._top:
            self._least = float(np.partition(self._products, -self._top)[-self._top]) - self._margin
            kept = self._products >= self._least
            self.parts, self.positions = self.parts[kept], self.positions[kept]
            self._products = self._products[kept]


def _blocks(part: Part) -> Iterator[tuple[Ids, Vectors]]:
    for start in range(0, len(part), BLOCK):
        if part.positions is None:
            stop = min(start + BLOCK, len(part))
            yield np.arange(start, stop), part.rows[start:stop]
        else:
            positions = part.positions[start : start + BLOCK]
            yield positions, part.rows[positions]
