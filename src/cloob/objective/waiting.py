"""A call of the objective that waits for no device, and what takes the place of the look at its values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from cloob.objective.module import ContrastiveObjective


@contextlib.contextmanager
def without_waiting(objective: ContrastiveObjective) -> Iterator[None]:
    """Inside, a call on one process reads nothing from a device: values are not looked at, rows taken to be unit rows.

    :func:`acceptable` says on the device what the look would have said. Much longer rows than those of unit length may
    overflow to a loss that is not finite.

    Args:
        objective: The objective.
    """
    before = objective.check, objective.trusts_lengths
    objective.check, objective.trusts_lengths = False, True
    try:
        yield
    finally:
        objective.check, objective.trusts_lengths = before


@torch.no_grad()
def acceptable(x: Tensor, y: Tensor, *scales: Tensor) -> Tensor:
    """Whether the objective with ``check=True`` takes these values; nothing is waited for.

    Args:
        x: (N, D) image embeddings.
        y: (N, D) text embeddings.
        scales: 0-d learned τ⁻¹ and β, if any.

    Returns:
        0-d bool on the rows' device: no row is NaN, infinite or zero, and every scale is positive and finite.
    """
    numbers = torch.cat([x.norm(dim=1), y.norm(dim=1), *(scale.reshape(1) for scale in scales)])
    return (numbers.isfinite() & (numbers > 0)).all()
