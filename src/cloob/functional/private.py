"""All undocumented names of torch that this package uses; ``tests/functional/test_private.py`` tests each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["tree_flatten", "tree_map", "tree_unflatten"]  # lists, tuples and mappings as leaves and their places

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
"""Normalisation layers; batch and instance norms have only a private base."""


disable_compiler: Callable[..., Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
"""As ``torch.compiler.disable``, which imports the compiler: that takes a second."""
MODULE_PARTS = ("_modules", "_parameters", "_buffers")
"""The dictionaries in which a module keeps what was assigned to it."""


def transforms() -> list[Any]:
    """The ``torch.func`` transforms around the call, the outermost first."""
    return list(torch._C._functorch.get_interpreter_stack() or ())


def is_vmap(transform: Any) -> bool:
    """Whether one of ``transforms`` is a ``torch.func.vmap``."""
    return bool(transform.key() == torch._C._functorch.TransformType.Vmap)


def backend_config() -> str:
    """The backends of the process group by device, such as ``cpu:gloo,cuda:nccl``."""
    return str(torch.distributed.get_backend_config())


def loss_scale(scaler: torch.amp.GradScaler) -> Tensor | None:
    """The loss scale where it is, which ``get_scale()`` would read; None without, or before the first loss."""
    return scaler._scale if scaler.is_enabled() else None


def loss_scale_state(scaler: torch.amp.GradScaler) -> list[Tensor]:
    """The tensors that ``GradScaler.update`` changes."""
    state = (scaler._scale, scaler._growth_tracker) if scaler.is_enabled() else ()
    return [tensor for tensor in state if tensor is not None]


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step that changes neither weights nor moments nor their count if the 0-d ``bad`` is true.

    Sets the attribute through which GradScaler skips the step of a fused optimiser; others wait for the device.
    """
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
    """``size`` bytes in shared memory, which workers send without a copy; RuntimeError where it is full."""
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return storage


def archive(path: str) -> Any:
    """A reader of the records of a TorchScript archive, with their offsets."""
    return torch._C.PyTorchFileReader(path)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own dictionary of its buffers, in which one is replaced without hooks."""
    return module._buffers
