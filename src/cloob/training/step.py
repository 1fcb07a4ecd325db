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
from torch.optim import Optimizer

from cloob.data.batch import micro_batches, rows_of
from cloob.distributed import Layout, world_size
from cloob.functional.private import scaler_state, step_unless
from cloob.objective import ContrastiveObjective
from cloob.objective.batch import acceptable
from cloob.training import sharding
from cloob.training.gradcache import Buffers, cached_backward
from cloob.training.optim import Average

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

    def forward(
        self,
        images: Any,
        tokens: Any,
        ids: Tensor | None = None,
        *,
        loss: bool = True,
        **how: Any,
    ) -> tuple[Tensor, ...]:
        """The 0-d loss and the detached (n, D) features of a batch; without ``loss``
        the features, with their graph.
        """
        low = _AUTOCAST.get(self.precision)
        device = next(self.encoder.parameters()).device.type
        with torch.autocast(device, dtype=low, enabled=low is not None):
            image_features, text_features = self.encoder(images, tokens)
        # float32, or float64 of such towers, whatever autocast makes of them.
        image_features, text_features = (
            side.to(torch.promote_types(side.dtype, torch.float32))
            for side in (image_features, text_features)
        )
        if not loss:
            return image_features, text_features
        value = self.loss_of(image_features, text_features, ids, **how)
        return value, image_features.detach(), text_features.detach()

    def loss_of(
        self,
        image_features: Tensor,
        text_features: Tensor,
        ids: Tensor | None,
        **how: Any,
    ) -> Tensor:
        """The 0-d loss of (n, D) features, float32 or float64; ``hopfield`` and
        ``trusted`` as of ``forward``.
        """
        with torch.autocast(image_features.device.type, enabled=False):
            value: Tensor = self.objective(
                image_features, text_features, ids=ids, **how
            )
        return value


@dataclass(frozen=True)
class StepResult:
    loss: float  # over all ranks; may be NaN or infinite
    # before clipping, without the loss scale; NaN when there was no backward pass
    grad_norm: float
    finite: bool  # loss and gradient; if not, the step changed no weight
    features: (
        tuple[Tensor, Tensor] | None
    )  # (n, D) of images and texts of this rank, where they were kept
    # in fp16 the gradient overflowed, and the loss scale was lowered: no fault
    overflow: bool = False
    loss_scale: float = 1.0
    scales: Mapping[str, float] = field(
        default_factory=dict
    )  # learned inv_tau, beta and bias after the step


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
        self._modules = list(
            module.modules()
        )  # to walk over them takes longer than a small step
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
        self, images: Any, tokens: Any, ids: Tensor | None, lr: float, **how: Any
    ) -> StepResult:
        """As ``launch``, but waits for the numbers."""
        launched = self.launch(images, tokens, ids, lr, **how)
        return launched.result(launched.numbers.tolist())

    def launch(
        self,
        images: Any,
        tokens: Any,
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
        positive = [
            scale for name, scale in _learned(objective).items() if name != "bias"
        ]  # a bad one spoils the loss
        layout = (
            Layout((rows_of(images),))
            if layout is None and world_size() == 1
            else layout
        )
        if self._sharded:
            sharding.share_buffers(self.module)
        if self.micro_batch_size:
            loss, *features = self._cached_backward(
                images, tokens, ids, hopfield, layout
            )
        else:
            loss, *features = self._wrapped(
                images, tokens, ids, hopfield=hopfield, trusted=layout
            )
            torch.autograd.backward(self.scaler.scale(loss))
        if self._sharded:
            sharding.average_gradients(self._parameters)
        # Not torch.where: it would copy the number to the device, and wait for that.
        loss = loss.detach().masked_fill(
            ~acceptable(features[0], features[1], *positive), math.nan
        )
        state = scaler_state(self.scaler)
        before = state[0].clone() if state else torch.ones_like(loss)
        self.scaler.unscale_(self.optimizer)
        total = sharding.total_norm(
            [p.grad for p in self._parameters if p.grad is not None]
        )
        norm = total.masked_fill(~loss.isfinite(), math.nan)
        finite = norm.isfinite()
        if self.clip_grad_norm > 0:
            sharding.clip(self._parameters, self.clip_grad_norm, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        step_unless(~finite, self.optimizer)
        objective.clamp_()
        buffers.restore_unless(finite)
        if self.average is not None:
            self.average.update(self.module.encoder, finite)
        backup = [tensor.clone() for tensor in state]
        self.scaler.update()
        for tensor, former in zip(
            state, backup, strict=True
        ):  # a loss that is not finite leaves the scale alone
            torch.where(loss.isfinite(), tensor, former, out=tensor)
        self.optimizer.zero_grad(set_to_none=True)
        scales = _learned(objective)
        known = (
            loss,
            norm,
            finite,
            before,
            state[0] if state else before,
            *scales.values(),
        )
        numbers = torch.stack([number.float() for number in known])
        return Launched(numbers, tuple(scales), (features[0], features[1]))

    def _cached_backward(
        self,
        images: Any,
        tokens: Any,
        ids: Tensor | None,
        hopfield: bool | None,
        layout: Layout | None,
    ) -> tuple[Tensor, ...]:
        # As even as can be: where samples are left out, none is alone in a micro-batch,
        # which has no spread to norm by.
        parts, features = max(1, -(-rows_of(images) // self.micro_batch_size)), []

        def encode(part: tuple[Any, Any]) -> tuple[Tensor, ...]:
            embedded: tuple[Tensor, ...] = self._wrapped(*part, loss=False)
            if not torch.is_grad_enabled():  # the first of the two passes
                features.append(embedded)
            return embedded

        loss = cached_backward(
            encode,
            self.module.objective,
            list(
                zip(
                    micro_batches(images, parts),
                    micro_batches(tokens, parts),
                    strict=True,
                )
            ),
            towers=self.module.encoder,
            ids=ids,
            no_sync=getattr(self._wrapped, "no_sync", nullcontext),
            scale=self.scaler.scale,
            hopfield=hopfield,
            trusted=layout,
        )
        return loss, *(torch.cat(side) for side in zip(*features, strict=True))


def _learned(objective: ContrastiveObjective) -> dict[str, Tensor]:
    return {
        name: scale.detach()
        for name, scale in objective.scale_values().items()
        if isinstance(scale, Tensor)
    }
