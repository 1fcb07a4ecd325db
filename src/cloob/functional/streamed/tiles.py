"""Tiles of a matrix product: which there are, and how they are multiplied and
summed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from cloob.functional import private
from cloob.functional.private import P, R, in_full_precision

# rows of a tile, whose buffers stay in the cache; of an accelerator, which they fill
TILE = {"cpu": 512}
# rows of a strip, whose columns are all candidates
STRIP = {"cpu": 1024}
ON_ACCELERATOR = 4096
LOG2_E = math.log2(math.e)

Tile = tuple[int, slice]
"""Rows of a tile and the side that they are of."""


def tile_size(matrix: Tensor) -> int:
    """Rows of a tile on the matrix' device."""
    return TILE.get(matrix.device.type, ON_ACCELERATOR)


def strip_size(matrix: Tensor) -> int:
    """Rows of a strip on the matrix' device."""
    return STRIP.get(matrix.device.type, ON_ACCELERATOR)


def blocks(n: int, size: int) -> list[slice]:
    """Slices of at most ``size`` rows that cover n."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def tile_pairs(*sides: Tensor) -> list[tuple[Tile, Tile]]:
    """The tiles on and above the diagonal of Z · Zᵀ, where Z are the rows of all sides,
    one above the other.
    """
    tiles: list[Tile] = []
    start = 0
    for side, matrix in enumerate(sides):
        of_side = blocks(len(matrix), tile_size(matrix))
        tiles += [(side, slice(start + r.start, start + r.stop)) for r in of_side]
        start += len(matrix)
    return list(combinations_with_replacement(tiles, 2))


def matmul_dtype(matmul: torch.dtype | None, rows: Tensor) -> torch.dtype:
    """The dtype to multiply in; ValueError for float16, which cannot hold exp(β), and
    all others.
    """
    if matmul not in (None, torch.bfloat16, rows.dtype):
        raise ValueError(f"matmul is {matmul}; torch.bfloat16 or None is expected")
    return matmul or rows.dtype


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` of matrices or stacks of them, in the dtype of ``total``."""
    if a.dtype != total.dtype:
        total.add_(a @ b)
    elif a.ndim == 3:
        total.baddbmm_(a, b)
    else:
        total.addmm_(a, b)


def exp_(exponents: Tensor) -> Tensor:
    """The exponential in place; 0 for −∞.

    On a CPU it is a power of 2. torch.exp is MKL's there, which takes three times as
    long on AMD's processors, and 6 to 40 times where results underflow, as those of
    pairs that are no negatives do.
    """
    if exponents.device.type == "cpu":
        return exponents.mul_(LOG2_E).exp2_()
    return exponents.exp_()


def first_order(backward: Callable[P, R]) -> Callable[P, R]:
    """Runs a backward pass of the streamed path in float32, and refuses derivatives of
    it.
    """
    computed = in_full_precision(backward)

    @functools.wraps(backward)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        private.refuse_second_derivatives(
            "the streamed path can be differentiated once; backend='reference' has more"
            " derivatives"
        )
        return computed(*args, **kwargs)

    return checked


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Runs ``function`` in float32 and outside of the graphs of ``torch.compile``,
    where loops over tiles gain nothing.

    RuntimeError inside ``torch.func`` and ``torch.export``, which would have to go
    through it.
    """
    computed = in_full_precision(function)

    @functools.wraps(function)
    def direct(*args: P.args, **kwargs: P.kwargs) -> R:
        if private.in_program():
            raise RuntimeError(
                "the streamed path goes through neither torch.func (grad, vmap, …) nor"
                " torch.export; backend='reference' does"
            )
        return computed(*args, **kwargs)

    return private.outside_compiler(direct)
