"""FSDP2: weights, gradients and optimiser state in shards over the ranks.

Checkpoints have them whole, so a run may go on with or without sharding, on any number
of ranks. Scalars cannot be sharded: open_clip's frozen ``logit_scale``, τ⁻¹ and β are
on every rank. Buffers are, too; like DDP, :func:`share_buffers` copies those of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cloob.distributed import rank, world_size

T = TypeVar("T", bound=Tensor)
OptimizerState = dict[str, Any]
"""``optimizer.state_dict()``: state by the number of a parameter, and groups."""


def shard(encoder: nn.Module, device: torch.device) -> None:
    """Shards the towers' parameters over all ranks, in place; a residual block is
    gathered at a time.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    unsharded = {p for p in encoder.parameters() if p.ndim == 0}
    for parameter in encoder.parameters():
        # Shards are flat: weights lose the channels-last layout here, activations keep
        # it.
        parameter.data = parameter.data.contiguous()
    for block in list(_blocks(encoder)):
        fully_shard(block, mesh=mesh, ignored_params=unsharded)
    # Resharded after a forward pass, so that the parameters are shards whenever nobody
    # computes with them.
    fully_shard(
        encoder, mesh=mesh, reshard_after_forward=True, ignored_params=unsharded
    )


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Residual blocks, or stages of them: the outermost items of lists of modules with
    children.
    """
    for child in module.children():
        in_list = isinstance(module, nn.ModuleList | nn.Sequential)
        if in_list and list(child.children()):
            yield child
        else:
            yield from _blocks(child)


def share_buffers(module: nn.Module) -> None:
    """Rank 0's buffers (running statistics) on every rank, as DDP does before a forward
    pass.
    """
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the ranks of the gradients of unsharded parameters."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world_size())


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """0-d 2-norm of all gradients, the same on every rank; 0 without gradients."""
    norms: list[Tensor] = []
    for kind in _by_kind(gradients):
        if kind:
            norm = nn.utils.get_total_norm(kind)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if len(norms) > 1:
        whole_norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return whole_norm
    return norms[0] if norms else torch.zeros(())


def clip(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scales the gradients, whose 2-norm is ``norm``, by limit/norm where that is below
    1.
    """
    for kind in _by_kind([p for p in parameters if p.grad is not None]):
        nn.utils.clip_grads_with_norm_(kind, limit, norm)


def _by_kind(tensors: Iterable[T]) -> tuple[list[T], list[T]]:
    """Plain tensors and sharded ones: torch's operations on lists take no mixture."""
    kinds: tuple[list[T], list[T]] = ([], [])
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return kinds


def whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """The full tensors of a state on the CPU of rank 0, nothing on the others; every
    rank calls this.
    """
    full = {}
    for name, value in state.items():
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            full[name] = gathered.cpu() if isinstance(gathered, Tensor) else gathered
    return full


def whole_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """``optimizer.state_dict()`` with the moments of whole parameters, on the CPU of
    rank 0; every rank calls this.
    """
    state = optimizer.state_dict()
    moments = {number: whole(entry) for number, entry in state["state"].items()}
    return {**state, "state": moments}


@torch.no_grad()
def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """``module.load_state_dict`` of an unsharded state, for sharded parameters too,
    without communication.
    """
    if is_sharded(module):
        state = {
            name: _like(state[name], like) for name, like in module.state_dict().items()
        }
    module.load_state_dict(state)


def load_whole_optimizer(
    optimizer: torch.optim.Optimizer, state: OptimizerState
) -> None:
    """``optimizer.load_state_dict`` of an unsharded state, for sharded parameters too,
    without communication.

    Moments get the memory layout of their parameters: torch's fused AdamW goes through
    memory in order. Statistics of rows and columns, as of Adafactor, stay as they are.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fused = bool(optimizer.defaults.get("fused"))
    entries = {index: dict(entry) for index, entry in state["state"].items()}
    for index, entry in entries.items():
        like = parameters[index]
        for key, value in entry.items():
            is_array = isinstance(value, Tensor) and value.ndim
            if is_array and (
                fused or isinstance(like, DTensor) or value.shape == like.shape
            ):
                entry[key] = _like(value, like)
    optimizer.load_state_dict({**state, "state": entries})


def _like(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor in the memory format of ``like``, or this rank's shard of it;
    RuntimeError for other sizes.
    """
    if value.shape != like.shape:
        raise RuntimeError(f"{tuple(value.shape)} in place of {tuple(like.shape)}")
    if isinstance(like, DTensor):
        contiguous = value.to(like.device).contiguous()
        return distribute_tensor(
            contiguous, like.device_mesh, like.placements, src_data_rank=None
        )
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
