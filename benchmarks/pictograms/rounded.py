"""bfloat16 where the processor has no instructions for it: rounded operands, float32 products, rounded results.

Instructions for bfloat16 (AVX512_BF16, AMX) multiply rounded numbers, sum in float32 and round the sum. Where there are
none, PyTorch does the same one by one, eleven times as slowly as in float32. Here the operands, rounded and widened
again, are multiplied by float32's instructions, and the result is rounded: the same but for the order of the sums, in
the backward pass too, since the gradient of a cast is a cast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = ("conv2d", "linear", "matmul")
"""What the towers multiply under autocast; attention's own products are in float32 anyway (PyTorch's plain form)."""


@contextmanager
def rounded_products() -> Iterator[None]:
    """Within it, autocast to bfloat16 on a CPU multiplies in float32."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced, which is the purpose
            for name in _PRODUCTS:
                library.impl(name, _rounded(getattr(torch.ops.aten, name)), "AutocastCPU")
        yield


def _rounded(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(value: Any) -> Any:
        return value.to(torch.bfloat16).float() if isinstance(value, Tensor) else value

    def call(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            found = product(*map(widened, args), **{key: widened(value) for key, value in kwargs.items()})
            return found.to(torch.bfloat16)

    return call
