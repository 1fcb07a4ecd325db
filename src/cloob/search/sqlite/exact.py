"""Exact search: the rows with the largest dot products, found in float32 and scored again in float64.

Legend: n rows, D their width, k = top. A float32 product of unit rows is off by at most about D·2⁻²⁴; so the k best are
among the rows that come within twice that of the k-th best product. These few are scored again one by one, so that a
row's score depends on nothing but the row and the query, and equal rows tie exactly: the lower id first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cloob.search.store import Ids, Vectors

BLOCK = 32_768
"""Rows that are copied at once: 64 MB at D = 512."""

_HALF_ULP = 2.0**-24


@dataclass(frozen=True, eq=False)
class Part:
    """Rows to search, perhaps not all of them."""

    ids: Ids  # (n,) ascending
    rows: Vectors  # (n, D)
    positions: Ids | None = None  # (m,) ascending, the rows that count; None: all

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
        return Part(self.ids, self.rows, found if len(found) < len(self.ids) else None)

    def products(self, query: Vectors) -> Vectors:
        """The dot product of each of its rows with a query."""
        products: Vectors
        if self.positions is None:
            products = self.rows @ query
        else:
            starts = range(0, max(1, len(self.positions)), BLOCK)
            products = np.concatenate([self.rows[self.positions[at : at + BLOCK]] @ query for at in starts])
        products[np.isnan(products)] = -np.inf
        return products


def nearest(parts: Sequence[Part], queries: Vectors, top: int) -> tuple[Ids, Vectors]:
    """The k rows nearest to each query, best first, equal ones by id.

    Returns:
        Ids and scores, (Q, k) each; where there are fewer rows than k, id 0 and score −inf.
    """
    ids = np.zeros((len(queries), top), np.int64)
    scores = np.full((len(queries), top), -np.inf, np.float32)
    for i, query in enumerate(np.asarray(queries, np.float32)):
        near, exact = _candidates(parts, query, top)
        order = np.lexsort((near, -exact))[:top]
        ids[i, : len(order)], scores[i, : len(order)] = near[order], exact[order]
    return ids, scores


def _candidates(parts: Sequence[Part], query: Vectors, top: int) -> tuple[Ids, Vectors]:
    """Ids and exact scores of the rows that may be among the k best."""
    products = [part.products(query) for part in parts]
    together, least = np.concatenate(products), -np.inf
    if len(together) > top:
        margin = 2 * len(query) * _HALF_ULP * max(1.0, float(np.linalg.norm(query)))
        least = float(np.partition(together, -top)[-top]) - margin
    ids, scores = [], []
    for part, some in zip(parts, products, strict=True):
        near = np.flatnonzero(some >= least)
        positions = near if part.positions is None else part.positions[near]
        for start in range(0, len(positions), BLOCK):
            block = positions[start : start + BLOCK]
            ids.append(part.ids[block])
            scores.append((part.rows[block].astype(np.float64) * query.astype(np.float64)).sum(1).astype(np.float32))
    found, exact = np.concatenate([np.empty(0, np.int64), *ids]), np.concatenate([np.empty(0, np.float32), *scores])
    return found[np.isfinite(exact)], exact[np.isfinite(exact)]
