"""A call of the objective that waits for no device, and what takes the place of the look at its values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from cloob.distributed import Layout, world_size
from cloob.objective.module import ContrastiveObjective


@contextlib.contextmanager
def without_waiting(objective: ContrastiveObjective, layout: Layout | None = None) -> Iterator[None]:
    """Inside, a call reads nothing from a device: values are not looked at, rows taken to be unit rows.

    :func:`acceptable` says on the device what the look would have said. Much longer rows than those of unit length may
    overflow to a loss that is not finite.

    Args:
        objective: The objective.
        layout: How many rows each rank will bring, for an objective that gathers; ranks then tell each other nothing
            of their arguments, and one whose arguments are wrong leaves the others waiting. None: they do, which waits
            for the device.
    """
    before = objective.check, objective.trusts_lengths, objective.layout
    objective.check, objective.trusts_lengths, objective.layout = False, True, layout
    try:
        yield
    finally:
        objective.check, objective.trusts_lengths, objective.layout = before


@torch.no_grad()
def acceptable(x: Tensor, y: Tensor, *scales: Tensor) -> Tensor:
    """Whether the objective with ``check=True`` takes these values, on all ranks; nothing is waited for.

    Args:
        x: (N, D) image embeddings.
        y: (N, D) text embeddings.
        scales: 0-d learned τ⁻¹ and β, if any.

    Returns:
        0-d bool on the rows' device: no row is NaN, infinite or zero, and every scale is positive and finite.
    """
    numbers = torch.cat([x.norm(dim=1), y.norm(dim=1), *(scale.reshape(1) for scale in scales)])
    good = (numbers.isfinite() & (numbers > 0)).all()
    if world_size() > 1:
        least = good.float()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        good = least > 0
    return good
