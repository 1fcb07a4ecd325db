"""One optimiser step: towers (perhaps in autocast), loss in float32, backward,
clipping, update.

A step waits for no device, decides there whether loss and gradient are finite, and
leaves no trace where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cloob.data.batch import micro_batches
from cloob.distributed import Layout, world_size
from cloob.errors import InputError
from cloob.functional.private import step_unless
from cloob.models.encoder import DualEncoder
from cloob.objective import ContrastiveObjective
from cloob.objective.values import acceptable
from cloob.training import sharding
from cloob.training.gradcache import Buffers, backward_in_parts
from cloob.training.optim import Average, Optimizers

Parts = Mapping[str, object] | Sequence[object]
"""A batch as its collation made it."""
Features = Mapping[str, Tensor]
"""Rows (n, …) by name, of which the first two are the sides (n, D)."""
Sides = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepBatch:
    """A batch as its collation made it, and how it is contrasted."""

    parts: Parts
    layout: Layout  # the numbers of rows of all ranks
    ids: Tensor | None = None  # pairs of one id are no negatives of one another
    hopfield: bool | None = (
        None  # whether the objective retrieves; None: its own choice
    )


class TowersWithLoss(nn.Module):
    """Both towers, in autocast, and the objective, in float32, as one module, so that
    DDP averages all gradients.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        objective: ContrastiveObjective,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.objective, self.precision = encoder, objective, precision
        # a caller's loss of all features and the batch
        self.sees_batch = getattr(objective, "sees_batch", False)

    def forward(
        self, parts: Parts, batch: StepBatch | None = None
    ) -> Features | tuple[Tensor, Sides]:
        """The features of parts of a batch, with their graph; with the whole ``batch``
        its 0-d loss and its unit rows.
        """
        features = self.embed(parts)
        if batch is None:
            return features
        return self.loss_of(features, batch), self.sides(features)

    def embed(self, parts: Parts) -> Features:
        """What the towers give, in float32 or float64 whatever autocast made of it: x
        and y, or rows by name. Of unit length but for a loss that sees the batch, which
        gets rows by name as they are.
        """
        device = next(self.encoder.parameters()).device.type
        low = self.precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=low):
            rows = self.encoder(*self._inputs(parts))
        if not isinstance(rows, Mapping):  # the encoder has made them unit rows
            x, y = rows
            return {"x": at_least_float32(x), "y": at_least_float32(y)}
        named = {name: at_least_float32(side) for name, side in rows.items()}
        if self.sees_batch:
            return named
        if len(named) > 2:
            raise InputError(
                f"the towers returned {', '.join(named)}; a loss of (x, y) takes"
                " two, one whose forward takes (features, batch) gets all"
            )
        return {name: F.normalize(side, dim=1) for name, side in named.items()}

    def _inputs(self, parts: Parts) -> tuple[object, ...]:
        """What the towers are called with: the whole batch where they take it, else its
        first two parts.
        """
        if getattr(self.encoder, "takes_batch", False):
            return (parts,)
        if isinstance(parts, Mapping):
            raise InputError(
                f"items have the names {', '.join(map(str, parts))}, but the towers"
                " take (a, b); a forward(batch) gets them by name"
            )
        if len(parts) not in (2, 3) and not self.sees_batch:
            raise InputError(
                f"an item has {len(parts)} parts; (a, b) or (a, b, id) is expected"
                " where neither towers nor loss take `batch`"
            )
        return tuple(parts[:2])

    def sides(self, features: Features) -> Sides:
        """The (n, D) unit rows of both sides, without their graph."""
        x, y, *_ = (side.detach() for side in features.values())
        if self.sees_batch:  # else they are of unit length
            return F.normalize(x, dim=1), F.normalize(y, dim=1)
        return x, y

    def loss_of(self, features: Features, batch: StepBatch) -> Tensor:
        """The 0-d loss of features in float32 or float64."""
        rows = list(features.values())
        loss = partial(self.objective, hopfield=batch.hopfield, trusted=batch.layout)
        with torch.autocast(rows[0].device.type, enabled=False):
            if self.sees_batch:
                value: Tensor = loss(features, batch=batch.parts)
            else:
                value = loss(*rows, ids=batch.ids)
        return value


def at_least_float32(rows: Tensor) -> Tensor:
    if not rows.is_floating_point():
        return rows
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True)
class StepResult:
    loss: float  # over all ranks; may be NaN or infinite
    grad_norm: float  # before clipping; NaN where the loss is not finite
    finite: bool  # loss and gradient; if not, the step changed no weight
    scales: Mapping[str, float]  # learned inv_tau, beta and bias after the step


@dataclass
class Launched:
    """A step whose numbers are still on the device."""

    # float32: loss, norm, 1 if both are finite else 0, and the learned scales
    numbers: Tensor
    names: tuple[str, ...]  # of the learned scales
    sides: Sides | None  # unit rows of this rank; None if not kept

    def read(self) -> StepResult:
        """What the step came to; waits for the device."""
        return self.result(self.numbers.tolist())

    def result(self, numbers: Sequence[float]) -> StepResult:
        """What ``numbers``, read from the device, say."""
        loss, norm, finite, *scales = numbers
        learned = dict(zip(self.names, scales, strict=True))
        return StepResult(loss, norm, finite == 1.0, learned)


class Stepper:
    """Takes optimiser steps on a ``TowersWithLoss``, in DDP over several ranks unless
    its towers are sharded.

    Every rank skips the same steps. ``micro_batch_size``: pairs of a rank whose
    activations are in memory at a time; 0: all.
    """

    def __init__(
        self,
        module: TowersWithLoss,
        optimizer: Optimizer,
        clip_grad_norm: float = 0.0,
        micro_batch_size: int = 0,
        ema: float | None = None,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.clip_grad_norm, self.micro_batch_size = clip_grad_norm, micro_batch_size
        # to walk over them takes longer than a small step
        self._modules = list(module.modules())
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self.device = self._parameters[0].device
        self.average = None if ema is None else Average(module.encoder, ema)
        self._sharded = sharding.is_sharded(module.encoder)
        self._wrapped: nn.Module = module
        if world_size() > 1 and not self._sharded:
            devices = [self.device] if self.device.type == "cuda" else None
            self._wrapped = nn.parallel.DistributedDataParallel(
                module, device_ids=devices
            )

    def launch(self, batch: StepBatch, lr: float) -> Launched:
        """Takes one step without waiting for the device."""
        buffers = Buffers(self._modules)
        objective = self.module.objective
        loss, sides = self._backward(batch)
        loss = nan_unless_acceptable(loss, sides, objective)

        norm = self._clip_gradients().masked_fill(~loss.isfinite(), math.nan)
        finite = norm.isfinite()
        self._update_unless(~finite, lr)
        objective.clamp_()
        buffers.restore_unless(finite)
        if self.average is not None:
            self.average.update(self.module.encoder, finite)
        self.optimizer.zero_grad(set_to_none=True)

        scales = _learned_scales(objective)
        numbers_to_read = (loss, norm, finite, *scales.values())
        numbers = torch.stack([number.float() for number in numbers_to_read])
        return Launched(numbers, tuple(scales), sides)

    def _backward(self, batch: StepBatch) -> tuple[Tensor, Sides]:
        """The loss of a batch and its unit rows; gradients are added."""
        if self._sharded:
            sharding.share_buffers(self.module)
        if self.micro_batch_size:
            loss, sides = self._cached_backward(batch)
        else:
            loss, sides = self._wrapped(batch.parts, batch)
            torch.autograd.backward(loss)
        if self._sharded:
            sharding.average_gradients(self._parameters)
        return loss, sides

    def _cached_backward(self, batch: StepBatch) -> tuple[Tensor, Sides]:
        """As ``_backward``, by gradient caching."""
        parameters = self.module.objective.parameters()
        loss, features = backward_in_parts(
            self._wrapped,
            partial(self.module.loss_of, batch=batch),
            micro_batches(batch.parts, self.micro_batch_size),
            self._wrapped,
            [(p, p) for p in parameters if p.requires_grad],
        )
        return loss, self.module.sides(features)

    def _clip_gradients(self) -> Tensor:
        """Scales the gradient down to the limit, if there is one; its 0-d norm
        before.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = sharding.total_norm(gradients)
        if self.clip_grad_norm > 0:
            sharding.clip(self._parameters, self.clip_grad_norm, norm)
        return norm

    def _update_unless(self, bad: Tensor, lr: float) -> None:
        """The optimiser's step at a rate, unless the 0-d ``bad`` is true."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        parts: Sequence[Optimizer] = [self.optimizer]
        if isinstance(self.optimizer, Optimizers):
            parts = self.optimizer.parts
        for part in parts:
            step_unless(bad, part)


def nan_unless_acceptable(
    loss: Tensor, sides: Sides, objective: ContrastiveObjective
) -> Tensor:
    """The 0-d loss without its graph, NaN on all ranks if a row of one is NaN, infinite
    or zero, or if a learned scale is not positive; the device is not waited for.
    """
    scales = _learned_scales(objective).items()
    positive = [scale for name, scale in scales if name != "bias"]
    # Not torch.where: it would copy the number to the device, and wait for that.
    return loss.detach().masked_fill(~acceptable(*sides, *positive), math.nan)


def _learned_scales(objective: ContrastiveObjective) -> dict[str, Tensor]:
    return {
        name: scale.detach()
        for name, scale in objective.scale_values().items()
        if isinstance(scale, Tensor)
    }
