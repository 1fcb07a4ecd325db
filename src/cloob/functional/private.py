"""Modes of torch around a call, and undocumented names of torch, tested in
``tests/functional/test_private.py``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# lists, tuples and mappings as leaves and their places
__all__ = [
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
]

P = ParamSpec("P")
R = TypeVar("R")


def outside_compiler(function: Callable[P, R]) -> Callable[P, R]:
    """As ``torch.compiler.disable``, which imports the compiler: that takes a
    second, and is done here where something is compiled.
    """
    outside: Callable[P, R] = getattr(torch, "_disable_dynamo", torch.compiler.disable)(
        function
    )

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Runs ``function`` with autocast off: logits of unit rows times τ⁻¹ = 30 are off
    by 0.1 in bfloat16.
    """
    # torch.compile would run the backward pass in the autocast around the call
    eager = outside_compiler(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next(
            (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None
        )
        if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
            return function(*args, **kwargs)
        compiled = torch.compiler.is_compiling() and not is_exporting()
        with torch.autocast(tensor.device.type, enabled=False):
            return (eager if compiled else function)(*args, **kwargs)

    return wrapper


# From torch 2.9 on; its older interface raises where the newer one was used.
_MATMULS: list[Any] = [
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(getattr(backend, "matmul", None), "fp32_precision")
]


def lowers_products() -> bool:
    """Whether torch rounds the inputs of float32 matrix products, to TF32 or
    bfloat16.
    """
    if not _MATMULS:
        return torch.get_float32_matmul_precision() != "highest"
    return any(backend.fp32_precision not in ("none", "ieee") for backend in _MATMULS)


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    """Inside, float32 matrix products are computed in float32."""
    with contextlib.ExitStack() as stack:
        if not _MATMULS:
            precision = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        for backend in _MATMULS:
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        yield


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs ``function`` with float32 matrix products in float32, whatever autocast and
    TF32 say.
    """
    outside = outside_autocast(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not lowers_products():
            return outside(*args, **kwargs)
        with _full_products():
            return outside(*args, **kwargs)

    return wrapper


class Context(Protocol):
    """What a ``torch.autograd.Function`` keeps for its backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    matmul: torch.dtype

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps tensors, the gaps between them included."""


def refuse_second_derivatives(message: str) -> None:
    """For the start of a backward pass, whose derivatives (``create_graph=True``) would
    be wrong without a warning.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(message)


def readable() -> bool:
    """Whether tensors have values: not while torch.compile or torch.export trace, nor
    inside vmap.
    """
    if torch.compiler.is_compiling():  # first, as dynamo does not trace what follows
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return all(
        transform.key() != vmap
        for transform in torch._C._functorch.get_interpreter_stack() or ()
    )


def is_exporting() -> bool:
    """Whether torch.export traces; torch 2.6 cannot say so."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def in_transform() -> bool:
    """Whether ``torch.func`` transforms the call (grad, jvp, vmap, …)."""
    return bool(torch._C._functorch.get_interpreter_stack())


def in_program() -> bool:
    """Whether the call becomes part of a program: of ``torch.compile``,
    ``torch.export``, or a transform of ``torch.func``.
    """
    return torch.compiler.is_compiling() or in_transform()


NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
"""Normalisation layers; batch and instance norms have only a private base."""


def backend_config() -> str:
    """The backends of the process group by device, such as ``cpu:gloo,cuda:nccl``."""
    return str(torch.distributed.get_backend_config())


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step that changes neither weights nor moments nor their count if the 0-d
    ``bad`` is true.
    """
    # GradScaler skips the step of a fused optimiser through ``found_inf``; others wait
    # for the device.
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not bad:
            optimizer.step()
        return
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def worker_processes(batches: Any) -> list[Any]:
    """The workers of a DataLoader's iterator."""
    return list(batches._workers)


def shut_down(loader: torch.utils.data.DataLoader[Any]) -> None:
    """Ends persistent workers now rather than when the loader is freed."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def shared_storage(size: int) -> torch.UntypedStorage:
    """``size`` bytes in shared memory, which workers send without a copy; RuntimeError
    where it is full.
    """
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return storage


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's dictionary of its buffers, in which one is replaced without
    hooks.
    """
    return module._buffers
