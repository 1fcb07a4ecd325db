"""One optimiser step: towers (perhaps in autocast), loss in float32, backward,
clipping, update.

A step waits for no device, decides there whether loss and gradient are finite, and
leaves no trace where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cloob.data.batch import micro_batches, rows_of
from cloob.distributed import Layout, world_size
from cloob.errors import InputError
from cloob.functional.private import step_unless
from cloob.objective import ContrastiveObjective
from cloob.objective.values import acceptable
from cloob.training import sharding
from cloob.training.gradcache import Buffers, cached_backward
from cloob.training.optim import Average

# Rows (n, …) by name, of which the first two are the sides (n, D).
Features = Mapping[str, Tensor]


class TowersWithLoss(nn.Module):
    """Both towers, in autocast, and the objective, in float32, as one module, so that
    DDP averages all gradients.
    """

    def __init__(
        self,
        encoder: nn.Module,
        objective: ContrastiveObjective,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.objective, self.precision = encoder, objective, precision
        self.sees_batch = bool(getattr(objective, "sees_batch", False))

    def forward(
        self,
        parts: Any,
        ids: Tensor | None = None,
        *,
        loss: bool = True,
        hopfield: bool | None = None,
        trusted: Layout | None = None,
    ) -> Any:
        """The 0-d loss and the detached (n, D) rows of both sides of a batch; without
        ``loss`` the features, with their graph.
        """
        device = next(self.encoder.parameters()).device.type
        low = self.precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=low):
            rows = self.encoder(*tower_inputs(self.encoder, parts))
        features = self._features(rows)
        if not loss:
            return features
        value = self.loss_of(features, parts, ids, hopfield=hopfield, trusted=trusted)
        return value, *(side.detach() for side in self.sides(features))

    def _features(self, rows: Any) -> Features:
        """What towers gave, in float32 or float64 whatever autocast made of it: x and
        y, or rows by name.
        """
        named = (
            rows if isinstance(rows, Mapping) else dict(zip("xy", rows, strict=True))
        )
        named = {name: at_least_float32(side) for name, side in named.items()}
        if self.sees_batch or not isinstance(rows, Mapping):
            return named
        if len(named) > 2:
            raise InputError(
                f"the towers returned {', '.join(named)}; a loss of (x, y) takes"
                " two, one whose forward takes (features, batch) gets all"
            )
        return {name: F.normalize(side, dim=1) for name, side in named.items()}

    def sides(self, features: Features) -> tuple[Tensor, Tensor]:
        """The (n, D) unit rows of both sides."""
        x, y, *_ = features.values()
        if self.sees_batch:  # else they are of unit length
            return F.normalize(x, dim=1), F.normalize(y, dim=1)
        return x, y

    def loss_of(
        self,
        features: Features,
        parts: Any,
        ids: Tensor | None,
        *,
        hopfield: bool | None = None,
        trusted: Layout | None = None,
    ) -> Tensor:
        """The 0-d loss of features in float32 or float64."""
        options: dict[str, Any] = {"hopfield": hopfield, "trusted": trusted}
        rows = list(features.values())
        with torch.autocast(rows[0].device.type, enabled=False):
            if self.sees_batch:
                value: Tensor = self.objective(features, batch=parts, **options)
            else:
                value = self.objective(*rows, ids=ids, **options)
        return value


def tower_inputs(encoder: nn.Module, parts: Any) -> tuple[Any, ...]:
    """What the towers are called with: the whole batch where they take it, else its
    first two parts.
    """
    if getattr(encoder, "takes_batch", False):
        return (parts,)
    if isinstance(parts, Mapping):
        raise InputError(
            f"items have the names {', '.join(map(str, parts))}, but the towers take"
            " (a, b); a forward(batch) gets them by name"
        )
    return tuple(parts[:2])


def at_least_float32(rows: Tensor) -> Tensor:
    if not rows.is_floating_point():
        return rows
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def joined(pieces: Sequence[Features]) -> Features:
    """The features of micro-batches as those of one batch."""
    return {name: torch.cat([rows[name] for rows in pieces]) for name in pieces[0]}


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
    sides: Any  # (n, D) of images and texts of this rank; None if not kept

    def result(self, numbers: Sequence[float]) -> StepResult:
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
        self.device = device = self._parameters[0].device
        self.options = [
            {key: x for key, x in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self.average = None if ema is None else Average(module.encoder, ema)
        self._sharded = sharding.is_sharded(module.encoder)
        self._wrapped: nn.Module = module
        if world_size() > 1 and not self._sharded:
            ids = [device] if device.type == "cuda" else None
            self._wrapped = nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def __call__(
        self,
        parts: Any,
        ids: Tensor | None,
        lr: float,
        *,
        hopfield: bool | None = None,
    ) -> StepResult:
        """As ``launch``, but waits for the numbers."""
        launched = self.launch(parts, ids, lr, hopfield=hopfield)
        return launched.result(launched.numbers.tolist())

    def launch(
        self,
        parts: Any,
        ids: Tensor | None,
        lr: float,
        *,
        hopfield: bool | None = None,
        layout: Layout | None = None,
    ) -> Launched:
        """Takes one step without waiting for the device; ranks without a ``layout``
        exchange their sizes.
        """
        buffers = Buffers(self._modules)
        objective = self.module.objective
        if layout is None and world_size() == 1:
            layout = Layout((rows_of(parts),))
        loss, sides = self._backward(parts, ids, hopfield, layout)
        loss = nan_unless_acceptable(loss, sides, objective)

        norm = self._clipped_norm().masked_fill(~loss.isfinite(), math.nan)
        finite = norm.isfinite()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        step_unless(~finite, self.optimizer)
        objective.clamp_()
        buffers.restore_unless(finite)
        if self.average is not None:
            self.average.update(self.module.encoder, finite)
        self.optimizer.zero_grad(set_to_none=True)

        scales = _learned(objective)
        numbers_to_read = (loss, norm, finite, *scales.values())
        numbers = torch.stack([number.float() for number in numbers_to_read])
        return Launched(numbers, tuple(scales), sides)

    def _backward(
        self,
        parts: Any,
        ids: Tensor | None,
        hopfield: bool | None,
        layout: Layout | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of a batch and the rows of both sides; gradients are added."""
        if self._sharded:
            sharding.share_buffers(self.module)
        if self.micro_batch_size:
            loss, x, y = self._cached_backward(parts, ids, hopfield, layout)
        else:
            loss, x, y = self._wrapped(parts, ids, hopfield=hopfield, trusted=layout)
            torch.autograd.backward(loss)
        if self._sharded:
            sharding.average_gradients(self._parameters)
        return loss, (x, y)

    def _clipped_norm(self) -> Tensor:
        """The 0-d norm of the gradient before it is clipped."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = sharding.total_norm(gradients)
        if self.clip_grad_norm > 0:
            sharding.clip(self._parameters, self.clip_grad_norm, norm)
        return norm

    def _cached_backward(
        self,
        parts: Any,
        ids: Tensor | None,
        hopfield: bool | None,
        layout: Layout | None,
    ) -> tuple[Tensor, ...]:
        """The loss and rows of a batch by gradient caching; gradients are added."""
        # As even as can be: where samples are left out, none is alone in a micro-batch,
        # which has no spread to norm by.
        number = max(1, -(-rows_of(parts) // self.micro_batch_size))
        pieces: list[Features] = []

        by_name = self.module.sees_batch

        def encode(micro_batch: Any) -> Any:
            features: Features = self._wrapped(micro_batch, loss=False)
            if not torch.is_grad_enabled():  # the first of the two passes
                pieces.append(features)
            return features if by_name else tuple(features.values())

        options: dict[str, Any] = {"hopfield": hopfield, "trusted": layout}
        options |= {"batch": parts} if by_name else {"ids": ids}
        loss = cached_backward(
            encode,
            self.module.objective,
            micro_batches(parts, number),
            towers=self._wrapped,
            **options,
        )
        return loss, *self.module.sides(joined(pieces))


def nan_unless_acceptable(
    loss: Tensor, sides: tuple[Tensor, Tensor], objective: ContrastiveObjective
) -> Tensor:
    """The 0-d loss without its graph, NaN on all ranks if a row of one is NaN, infinite
    or zero, or if a learned scale is not positive; the device is not waited for.
    """
    positive = [x for name, x in _learned(objective).items() if name != "bias"]
    # Not torch.where: it would copy the number to the device, and wait for that.
    return loss.detach().masked_fill(~acceptable(*sides, *positive), math.nan)


def _learned(objective: ContrastiveObjective) -> dict[str, Tensor]:
    return {
        name: scale.detach()
        for name, scale in objective.scale_values().items()
        if isinstance(scale, Tensor)
    }
