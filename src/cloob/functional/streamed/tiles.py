"""Tiles of a matrix product: which there are, and how they are multiplied and
summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from cloob.functional import private
from cloob.functional.private import P, R, full_products, outside_autocast

# rows of a tile, whose buffers stay in the cache; 4096 on an accelerator, which they
# fill
TILE = {"cpu": 512}
# rows of a strip, whose columns are all candidates; 4096 on an accelerator
STRIP = {"cpu": 1024}


Tile = tuple[int, slice]
"""Rows of a tile and the side that they are of."""


def first_order(backward: Callable[P, R]) -> Callable[P, R]:
    """Runs a backward pass of the streamed path in float32, and refuses derivatives of
    it.
    """
    computed = full_products()(outside_autocast(backward))

    @functools.wraps(backward)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        once = (
            "the streamed path can be differentiated once; backend='reference' has more"
            " derivatives"
        )
        private.refuse_second_derivatives(once)
        return computed(*args, **kwargs)

    return checked


def blocks(matrix: Tensor, size: int = 0) -> list[slice]:
    """Slices of at most ``size`` rows, a tile's if not given, that cover ``matrix``."""
    n, size = len(matrix), size or TILE.get(matrix.device.type, 4096)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def tile_pairs(*sides: Tensor) -> list[tuple[Tile, Tile]]:
    """The tiles on and above the diagonal of Z · Zᵀ, where Z are the rows of all sides,
    one above the other.
    """
    tiles: list[Tile] = []
    start = 0
    for side, matrix in enumerate(sides):
        own = blocks(matrix)
        tiles += [(side, slice(start + r.start, start + r.stop)) for r in own]
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
    """``total += a @ b``, the sum in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """``out = a @ b``, or, to ``add``, ``out += a @ b``."""
    if add:
        accumulate(out, a, b)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Runs ``function`` in float32 and outside of the graphs of ``torch.compile``,
    where loops over tiles gain nothing.

    RuntimeError inside ``torch.func`` and ``torch.export``, which would have to go
    through it.
    """
    computed = full_products()(outside_autocast(function))

    @functools.wraps(function)
    def direct(*args: P.args, **kwargs: P.kwargs) -> R:
        if private.in_program():
            refused = (
                "the streamed path goes through neither torch.func (grad, vmap, …) nor"
                " torch.export"
            )
            raise RuntimeError(f"{refused}; backend='reference' does")
        return computed(*args, **kwargs)

    return private.outside_compiler(direct)
