"""The vectors: a file of rows that processes map, and exact search in it.

Rows are added at the end and never changed, so what a reader has mapped stays as it
is. The database says how many of them count.

A float32 product of unit rows (width D) is off by at most about D·2⁻²⁴, so the k best
are among the rows within twice that of the k-th best product. These are scored again
one by one: equal rows tie exactly, the lower id first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_BLOCK = 32_768  # rows that are scored again at once: 128 MB at D = 512
_FEW_PART = 20  # one in so many rows is few


class Neighbours(NamedTuple):
    """The items nearest to a query, best first."""

    ids: Ids  # (k,)
    scores: Vectors  # (k,) cosines
    searched: int  # items that the filter lets through


@dataclass(frozen=True)
class Matrix:
    """The items that have a vector, in one state of the index."""

    revision: int
    items: Ids  # (n,) ascending
    places: Ids  # (n,) of their rows; equal bytes have one
    rows: Vectors  # (m, D)

    def vectors(self, ids: Ids) -> Vectors:
        """(k, D) in the order of the ids; rows of NaN where there is no vector."""
        result = np.full((len(ids), self.rows.shape[1]), np.nan, np.float32)
        has_row = is_among(ids, self.items)
        result[has_row] = self.rows[
            self.places[np.searchsorted(self.items, ids[has_row])]
        ]
        return result

    def nearest(self, query: Vectors, top: int, allowed: Ids | None) -> Neighbours:
        """The items nearest to a query (D,), of ascending ``allowed`` ids if these are
        given.
        """
        query = np.asarray(query, np.float32)
        items, places = self.items, self.places
        if allowed is not None:
            mask = is_among(items, allowed)
            items, places = items[mask], places[mask]
        products = self._products(places, query)
        near = np.flatnonzero(products >= self._least(products, query, top))
        scores = self._exact(places[near], query)
        order = np.lexsort((items[near], -scores))[:top]
        return Neighbours(items[near][order], scores[order], len(items))

    def _products(self, places: Ids, query: Vectors) -> Vectors:
        """Products of some rows with a query; −∞ of what is no number."""
        if len(places) < len(self.rows) // _FEW_PART:
            products = self.rows[places] @ query
        else:  # half of what OpenBLAS takes
            products = np.einsum("ij,j->i", self.rows, query)[places]
        products[np.isnan(products)] = -np.inf
        return products

    def _least(self, products: Vectors, query: Vectors, top: int) -> float:
        """The product below which no row is among the best, for all its rounding."""
        least = float(np.finfo(np.float32).min)  # above that of what is no number
        if len(products) > top:
            margin = 2 * len(query) * 2.0**-24 * max(1.0, float(np.linalg.norm(query)))
            least = max(least, float(np.partition(products, -top)[-top]) - margin)
        return least

    def _exact(self, places: Ids, query: Vectors) -> Vectors:
        """Products of some rows, each summed in float64."""
        scores = np.empty(len(places), np.float32)
        wide = query.astype(np.float64)
        for start in range(0, len(places), _BLOCK):
            block = self.rows[places[start : start + _BLOCK]].astype(np.float64)
            scores[start : start + _BLOCK] = (block * wide).sum(1)
        return scores


def is_among(ids: Ids, ascending: Ids) -> Mask:
    """Which ids are among ascending ones."""
    places = np.searchsorted(ascending, ids)
    found = places < len(ascending)
    found[found] = ascending[places[found]] == ids[found]
    return found


def map_rows(path: Path, count: int, dim: int) -> Vectors:
    """(count, D) of a file; ValueError where it is too short, or no file of its own."""
    if not count:
        return np.empty((0, dim), np.float32)
    if path.is_symlink() or path.stat().st_size < 4 * count * dim:
        raise ValueError(path)
    return np.asarray(np.memmap(path, "<f4", "r", shape=(count, dim)))


def write_rows(path: Path, start: int, rows: Vectors) -> None:
    """Writes rows from a place of a file on; they are on the disk at the end."""
    # not by a writable map: on a full disk that ends the process
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(start * 4 * rows.shape[1])
        file.write(np.ascontiguousarray(rows, "<f4").data)
        file.flush()
        os.fsync(file.fileno())
