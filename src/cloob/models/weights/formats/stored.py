"""Tensors that are still on the disk: where their bytes lie, checked against the file before any memory is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cloob.errors import InputError

MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        path: The file.
        start: Byte of the file at which the tensor's first element lies.
        dtype: Of its elements, which are little-endian.
        shape: Its sizes.
        strides: In elements.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize

    def read(self, file: BinaryIO) -> Tensor:
        """The tensor, contiguous, in memory of its own.

        Args:
            file: The file, open for reading.

        Raises:
            InputError: The file has become shorter.
        """
        span = _span(self.shape, self.strides)
        flat = torch.empty(span, dtype=self.dtype)
        file.seek(self.start)
        into = memoryview(flat.view(torch.uint8).numpy().data) if span else memoryview(b"")
        done = 0
        while done < len(into):
            count = file.readinto(into[done:])  # type: ignore[attr-defined]
            if not count:
                raise InputError(f"{self.path}: cut short while it was read")
            done += count
        return flat.as_strided(self.shape, self.strides).contiguous()


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose last dimension is the fastest."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


def stored(
    path: Path,
    where: str,
    area: tuple[int, int],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
) -> Stored:
    """A tensor inside an area of a file, once its sizes are held against that area.

    Args:
        path: The file.
        where: What the error calls the tensor.
        area: First byte and number of bytes that the tensor may use.
        dtype: Of its elements.
        shape: As the file says.
        strides: As the file says; None: contiguous.
        offset: Elements of the area before the first one.

    Raises:
        InputError: They do not fit.
    """
    strides = contiguous_strides(shape) if strides is None else strides
    begin, size = area
    if len(shape) > MAX_DIMENSIONS or len(strides) != len(shape) or min((*shape, *strides, offset), default=0) < 0:
        raise InputError(f"{path}: {where} has shape {_few(shape)} and strides {_few(strides)}, which no tensor has")
    numel, span = math.prod(shape), _span(shape, strides)
    available = size // dtype.itemsize
    if offset + span > available or numel > span:
        raise InputError(f"{path}: {where} of shape {_few(shape)} claims more than the {size} bytes that are its own")
    return Stored(path, begin + offset * dtype.itemsize, dtype, shape, strides)


def check_total(path: Path, tensors: Iterable[Stored], size: int) -> None:
    """Refuses tensors that together claim more bytes than their file has, as those that share storage do."""
    total = sum(tensor.nbytes for tensor in tensors)
    if total > size:
        raise InputError(f"{path}: its tensors claim {total} bytes, and the file has {size}")


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _few(numbers: tuple[int, ...]) -> str:
    """Numbers of a file in a line: a long one cut."""
    text = str(tuple(numbers)) if all(abs(number) < 1 << 64 for number in numbers) else "(a number beyond 2^64)"
    return text if len(text) <= 80 else f"{text[:79]}…"
