"""Tiles of a matrix product: which there are, and how they are multiplied and summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def tile_rows(device: torch.device) -> int:
    """Rows of a tile: on a CPU its buffers stay in the outer cache, an accelerator wants to be filled."""
    return 1024 if device.type == "cpu" else 4096


def blocks(matrix: Tensor) -> list[slice]:
    """Slices of at most a tile's rows that cover ``matrix``."""
    n, size = len(matrix), tile_rows(matrix.device)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def tile_pairs(left: Tensor, right: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Every tile of left · rightᵀ; with ``right`` None the tiles on and above the diagonal of left · leftᵀ."""
    above = blocks(left)
    for i, rows in enumerate(above):
        for columns in above[i:] if right is None else blocks(right):
            yield rows, columns


def product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``a @ b`` in the dtype of ``like``; low-precision factors are multiplied with float32 accumulation inside."""
    return (a @ b).to(like.dtype)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, the sum in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps ``function`` out of the graphs of ``torch.compile``: its loops over tiles are no gain there."""
    return cast(Callable[P, R], cast(Any, torch.compiler.disable)(function))


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, which torch leaves untyped."""
    return cast(Any, function).apply(*args)
