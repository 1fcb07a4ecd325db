"""One optimiser step: towers (perhaps in autocast), loss in float32, backward,
clipping, update.

A step waits for no device, decides there whether loss and gradient are finite, and
leaves no trace where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cloob.data.batch import micro_batches, rows_of
from cloob.distributed import Layout, world_size
from cloob.errors import InputError
from cloob.functional.private import scaler_state, step_unless
from cloob.objective import ContrastiveObjective
from cloob.objective.batch import acceptable
from cloob.training import sharding
from cloob.training.gradcache import Buffers, cached_backward
from cloob.training.optim import Average

# Two sides of unit rows (n, D), or rows (n, …) by name, of which the first two are the
# sides.
Features = tuple[Tensor, Tensor] | Mapping[str, Tensor]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        low = _AUTOCAST.get(self.precision)
        device = next(self.encoder.parameters()).device.type
        with torch.autocast(device, dtype=low, enabled=low is not None):
            rows = self.encoder(*tower_inputs(self.encoder, parts))
        features = self._features(rows)
        if not loss:
            return features
        value = self.loss_of(features, parts, ids, hopfield=hopfield, trusted=trusted)
        return value, *(side.detach() for side in sides_of(features))

    def _features(self, rows: Any) -> Features:
        """What towers gave, in float32 or float64 whatever autocast made of it: two
        sides, or rows by name for a loss that sees the batch.
        """
        if isinstance(rows, Mapping):
            named = {name: at_least_float32(side) for name, side in rows.items()}
            if self.sees_batch:
                return named
            if len(named) > 2:
                raise InputError(
                    f"the towers returned {', '.join(named)}; a loss of (x, y) takes"
                    " two, one whose forward takes (features, batch) gets all"
                )
            return sides_of(named)
        x, y = (at_least_float32(side) for side in rows)
        return {"x": x, "y": y} if self.sees_batch else (x, y)

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
        with torch.autocast(sides_of(features)[0].device.type, enabled=False):
            if isinstance(features, Mapping):
                value: Tensor = self.objective(features, batch=parts, **options)
            else:
                value = self.objective(*features, ids=ids, **options)
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


def sides_of(features: Features) -> tuple[Tensor, Tensor]:
    """The (n, D) unit rows of both sides: of features by name the first two."""
    if not isinstance(features, Mapping):
        return features
    first, second, *_ = features.values()
    return F.normalize(first, dim=1), F.normalize(second, dim=1)


def joined(pieces: Sequence[Features]) -> Features:
    """The features of micro-batches as those of one batch."""
    if isinstance(pieces[0], Mapping):
        names = pieces[0].keys()
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}  # type: ignore[call-overload]
    x, y = (torch.cat(side) for side in zip(*pieces, strict=True))
    return x, y


@dataclass(frozen=True)
class StepResult:
    loss: float  # over all ranks; may be NaN or infinite
    # before clipping, without the loss scale; NaN when there was no backward pass
    grad_norm: float
    finite: bool  # loss and gradient; if not, the step changed no weight
    # (n, D) of images and texts of this rank, where they were kept
    features: tuple[Tensor, Tensor] | None
    # in fp16 the gradient overflowed, and the loss scale was lowered: no fault
    overflow: bool = False
    loss_scale: float = 1.0
    # learned inv_tau, beta and bias after the step
    scales: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Launched:
    """A step whose numbers are still on the device."""

    # float32: loss, norm, 1 if both are finite else 0, loss scale before and after the
    # step, and the learned scales
    numbers: Tensor
    names: tuple[str, ...]  # of the learned scales
    features: tuple[Tensor, Tensor] | None

    def result(self, numbers: Sequence[float]) -> StepResult:
        loss, norm, finite, before, after, *scales = numbers
        overflow = finite != 1.0 and before > 1.0 and after < before
        learned = dict(zip(self.names, scales, strict=True))
        return StepResult(
            loss,
            norm,
            finite == 1.0,
            self.features,
            overflow,
            loss_scale=before,
            scales=learned,
        )


class Stepper:
    """Takes optimiser steps on a ``TowersWithLoss``, in DDP over several ranks unless
    its towers are sharded.

    Every rank skips the same steps. In fp16 an overflow lowers the loss scale; at a
    scale of 1 it is a fault, as in fp32. ``micro_batch_size``: pairs of a rank whose
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
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=module.precision == "fp16"
        )
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

        state = scaler_state(self.scaler)
        before = state[0].clone() if state else torch.ones_like(loss)
        norm = self._clipped_norm().masked_fill(~loss.isfinite(), math.nan)
        finite = norm.isfinite()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        step_unless(~finite, self.optimizer)
        objective.clamp_()
        buffers.restore_unless(finite)
        if self.average is not None:
            self.average.update(self.module.encoder, finite)
        self._update_scaler(state, loss)
        self.optimizer.zero_grad(set_to_none=True)

        scales = _learned(objective)
        after = state[0] if state else before
        numbers_to_read = (loss, norm, finite, before, after, *scales.values())
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
            torch.autograd.backward(self.scaler.scale(loss))
        if self._sharded:
            sharding.average_gradients(self._parameters)
        return loss, (x, y)

    def _clipped_norm(self) -> Tensor:
        """The 0-d norm of the gradient, before it is clipped and without the loss
        scale.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = sharding.total_norm(gradients)
        if self.clip_grad_norm > 0:
            sharding.clip(self._parameters, self.clip_grad_norm, norm)
        return norm

    def _update_scaler(self, state: list[Tensor], loss: Tensor) -> None:
        """Updates the loss scale, which a loss that is not finite leaves alone."""
        backup = [tensor.clone() for tensor in state]
        self.scaler.update()
        for tensor, former in zip(state, backup, strict=True):
            torch.where(loss.isfinite(), tensor, former, out=tensor)

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

        def encode(micro_batch: Any) -> Features:
            features: Features = self._wrapped(micro_batch, loss=False)
            if not torch.is_grad_enabled():  # the first of the two passes
                pieces.append(features)
            return features

        options: dict[str, Any] = {"hopfield": hopfield, "trusted": layout}
        if self.module.sees_batch:
            options["batch"] = parts
        loss = cached_backward(
            encode,
            self.module.objective,
            micro_batches(parts, number),
            towers=self.module.encoder,
            ids=None if self.module.sees_batch else ids,
            no_sync=getattr(self._wrapped, "no_sync", nullcontext),
            scale=self.scaler.scale,
            **options,
        )
        return loss, *sides_of(joined(pieces))


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
