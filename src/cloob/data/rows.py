"""Rows of one side: a matrix, which may be sparse, or a table that training rows will
encode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import Skip
from cloob.data.source import digest
from cloob.data.table import Matrix, Unencoded

_IN_CACHE = 256  # rows that are looked at together


@dataclass(frozen=True)
class Side:
    """The rows of a side, and what an error calls them."""

    name: str
    content: Matrix | Unencoded

    def __len__(self) -> int:
        n: int = self.cells.shape[0]
        return n

    @property
    def unencoded(self) -> Unencoded | None:
        """The table that is not encoded yet; None of a matrix."""
        return self.content if isinstance(self.content, Unencoded) else None

    @property
    def cells(self) -> Matrix:
        """(n, F) numbers, of a table those that are equal for equal rows."""
        if isinstance(self.content, Unencoded):
            return self.content.cells
        return self.content

    def is_unusable(self) -> np.ndarray:
        """(n,) bool: the rows that hold what float32 cannot, or nothing."""
        parts = []
        for block in _blocks(self.cells):
            with np.errstate(over="ignore"):
                numbers = block.astype(np.float32, copy=False)
            if self.unencoded is None:
                parts.append(~np.isfinite(numbers).all(1))
            else:  # cells may be missing
                parts.append(np.isinf(numbers).any(1) | np.isnan(numbers).all(1))
        return np.concatenate(parts)

    def skip(self, row: int) -> Skip:
        """Why an unusable row is left out."""
        detail = "holds NaN, infinity or a number that float32 cannot hold"
        return Skip(f"{self.name} row {row}", "not finite", detail)


def gather(side: Matrix, rows: np.ndarray) -> np.ndarray:
    """Some rows of a matrix, which may be sparse."""
    if isinstance(side, np.ndarray):
        return side.take(rows, 0)
    return side[rows].toarray()


def digest_of(side: Matrix, rows: np.ndarray) -> str:
    """Of some rows, of which few are in memory at a time."""
    starts = range(0, len(rows), _IN_CACHE)
    return digest(gather(side, rows[start : start + _IN_CACHE]) for start in starts)


def _blocks(side: Matrix) -> Iterator[np.ndarray]:
    """The rows of a matrix, which may be sparse, in blocks."""
    for start in range(0, side.shape[0], _IN_CACHE):
        block = side[start : start + _IN_CACHE]
        yield block if isinstance(block, np.ndarray) else block.toarray()


def row_digests(side: Matrix) -> np.ndarray:
    """(n,) uint64 digests of the rows of a matrix, equal for equal bytes."""
    draws = np.random.PCG64(0)
    factors = np.zeros(0, np.uint64)
    parts = []
    for block in _blocks(side):
        content = np.ascontiguousarray(block).view(np.uint8)
        if content.shape[1] % 8:
            content = np.pad(content, ((0, 0), (0, -content.shape[1] % 8)))
        words = content.view(np.uint64)
        if not len(factors):
            factors = np.asarray(draws.random_raw(words.shape[1])) | np.uint64(1)
        mixed = words ^ (words >> np.uint64(32))
        parts.append((mixed * factors).sum(1, dtype=np.uint64))
    return np.concatenate(parts)


def as_numbers(rows: Matrix | Tensor) -> Tensor:
    """Rows of any numbers as float32, or as float64 where float32 would lose digits
    before a head takes their mean away; memory is shared where it can be.
    """
    if isinstance(rows, Tensor):
        return rows if rows.dtype == torch.float64 else rows.float()
    if not isinstance(rows, np.ndarray):
        rows = rows.toarray()
    if rows.dtype == np.float16:  # a hundred times as fast as by numpy
        return torch.from_numpy(np.require(rows, None, ["C", "W"])).float()
    most_bytes = 2 if rows.dtype.kind in "iu" else 4  # that float32 holds exactly
    dtype = np.float32 if rows.dtype.itemsize <= most_bytes else np.float64
    return torch.from_numpy(np.require(rows, dtype, ["C", "W"]))
