"""Modes of torch around a call: autocast, low-precision products, compilation, function transforms, derivatives."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from cloob.functional import private

P = ParamSpec("P")
R = TypeVar("R")


def outside_compiler(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps ``function`` out of the graphs of ``torch.compile``: it breaks the graph, and runs eagerly."""
    return cast(Callable[P, R], private.disable_compiler(function))


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Runs ``function`` with autocast off on the device of its first tensor argument.

    Logits of unit rows times τ⁻¹ = 30 are off by 0.1 in bfloat16; the towers may run in it, this maths does not.
    torch.compile would run the backward pass in the autocast around the call: there the call breaks the graph.
    """
    eager = outside_compiler(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
            return function(*args, **kwargs)
        compiled = torch.compiler.is_compiling() and not is_exporting()
        with torch.autocast(tensor.device.type, enabled=False):
            return (eager if compiled else function)(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, float32 matrix products are as ``torch.set_float32_matmul_precision`` takes it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# From torch 2.9 on; its older interface raises where the newer one was used.
_MATMULS: list[Any] = [
    backend
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(backend, "fp32_precision")
]


def lowers_products() -> bool:
    """Whether torch rounds the inputs of float32 matrix products, to TF32 or bfloat16."""
    if not _MATMULS:
        return torch.get_float32_matmul_precision() != "highest"
    return any(backend.fp32_precision not in ("none", "ieee") for backend in _MATMULS)


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Inside, float32 matrix products are computed in float32, whatever TF32 says; a decorator as well."""
    if not lowers_products():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not _MATMULS:
            stack.enter_context(float32_products("highest"))
        for backend in _MATMULS:
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        yield


def differentiable_once(refusal: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a backward pass: refuses ``create_graph=True``, whose second derivatives would be wrong without a word."""

    def decorate(backward: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(backward)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.is_grad_enabled():
                raise RuntimeError(refusal)
            return backward(*args, **kwargs)

        return wrapper

    return decorate


def readable() -> bool:
    """Whether tensors have values to look at: not while torch.compile or torch.export trace, nor inside vmap."""
    if torch.compiler.is_compiling():
        return False
    return not any(map(private.is_vmap, private.transforms()))


def is_exporting() -> bool:
    """Whether torch.export traces; torch 2.6 cannot say so."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def in_transform() -> bool:
    """Whether ``torch.func`` transforms the call (grad, jvp, vmap, …)."""
    return bool(private.transforms())
