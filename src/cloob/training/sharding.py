"""FSDP2: weights, gradients and optimiser state in shards over the ranks, and whole again for a checkpoint.

A sharded weight is a ``DTensor`` of which each rank holds a part. What is written to a checkpoint is always the whole,
in the same format as without sharding, so a run may go on with or without it, on any number of ranks. Scalars cannot be
sharded: open_clip's frozen ``logit_scale`` and the objective's τ⁻¹ and β stay whole on each rank. Buffers do too; like
DDP, :func:`share_buffers` hands rank 0's to all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from cloob.distributed import rank, world_size


def shard(encoder: nn.Module, device: torch.device) -> None:
    """Shards the towers' parameters over all ranks, in place; each residual block is gathered by itself."""
    mesh = init_device_mesh(device.type, (world_size(),))
    unsharded = {p for p in encoder.parameters() if p.ndim == 0}
    for parameter in encoder.parameters():
        # Shards are flat: weights lose the channels-last layout here, activations keep it.
        parameter.data = parameter.data.contiguous()
    for block in list(_blocks(encoder)):
        fully_shard(block, mesh=mesh, ignored_params=unsharded)
    # Resharded after a forward pass, so that the parameters are shards whenever nobody computes with them.
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True, ignored_params=unsharded)
    for method in ("encode_image", "encode_text"):
        if hasattr(encoder, method):
            register_fsdp_forward_method(encoder, method)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Residual blocks, or stages of them: the outermost items of lists that have modules of their own."""
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential) and any(True for _ in child.children()):
            yield child
        else:
            yield from _blocks(child)


def share_buffers(module: nn.Module) -> None:
    """Rank 0's buffers (running statistics) on every rank, as DDP does before each forward pass."""
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the ranks of the gradients of parameters that are whole on each."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world_size())


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """0-d 2-norm of all gradients together, the same on every rank; 0 without gradients."""
    norms = [nn.utils.get_total_norm(kind) for kind in _by_kind(gradients) if kind]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else (norms or [torch.zeros(())])[0]


def clip(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scales the gradients, whose 2-norm is ``norm``, by limit/norm where that is below 1."""
    for kind in _by_kind([p for p in parameters if p.grad is not None]):
        nn.utils.clip_grads_with_norm_(kind, limit, norm)


def _by_kind(tensors: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Sharded tensors and plain ones: torch's operations on lists take no mixture."""
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return kinds


def whole_state(
    encoder: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """The encoder's weights (None: it has them whole) and the optimiser's state; every rank calls this."""
    if not is_sharded(encoder):
        return None, optimizer.state_dict()
    return _gather(encoder.state_dict()), _gather(optimizer.state_dict())


def _gather(value: Any) -> Any:
    """Nested dicts and lists with every shard replaced by the whole tensor, on rank 0's CPU; None elsewhere."""
    if isinstance(value, dict):
        return {key: _gather(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_gather(item) for item in value)
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if rank() == 0 else None
    return value


@torch.no_grad()
def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """``module.load_state_dict`` of a whole state, for sharded parameters too, without communication."""
    if is_sharded(module):
        state = {name: _like(state[name], like) for name, like in module.state_dict().items()}
    module.load_state_dict(state)


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of a whole state, for sharded parameters too, without communication.

    Moments get the memory layout of their parameters: torch's fused AdamW goes through memory in order and, without a
    word, would pair numbers of other elements when one is channels-last and the other is not. Statistics of rows and
    columns, as Adafactor keeps them, stay as they are.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fused = bool(optimizer.defaults.get("fused"))

    def placed(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        trusts_sizes = fused or isinstance(parameter, DTensor)
        return _like(value, parameter) if trusts_sizes or value.shape == parameter.shape else value

    entries = {
        index: {key: placed(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the memory format of ``like``, or this rank's shard of it; RuntimeError for other sizes."""
    if value.shape != like.shape:
        raise RuntimeError(f"{tuple(value.shape)} found where {tuple(like.shape)} belongs")
    if isinstance(like, DTensor):
        contiguous = value.to(like.device).contiguous()
        return distribute_tensor(contiguous, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
