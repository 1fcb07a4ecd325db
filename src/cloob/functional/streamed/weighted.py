"""One direction of a contrast with soft targets or weights, without an N×M matrix
beside the targets themselves.

A strip of anchors is contrasted by the reference and differentiated at once, in the
forward pass: the loss is a number, so its gradient is known up to the factor that comes
back to it, and no strip is computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cloob.family import CONTRASTS, Contrast
from cloob.functional import reference
from cloob.functional.checks import as_rows, check_ids, scalar
from cloob.functional.private import Context
from cloob.functional.reference import check_contrast
from cloob.functional.scores import (
    Positives,
    Targets,
    is_readable,
    read_targets,
    read_weights,
)
from cloob.functional.streamed.tiles import blocks, eager, first_order, strip_size

StripLoss = Callable[[slice, Tensor, Tensor, Tensor, Tensor], Tensor]
"""The share of some anchors in the loss, from their rows, all candidates, τ⁻¹, bias."""


class _Strips(torch.autograd.Function):
    """The sum of a loss over strips of anchors, and its gradient by rows and scales."""

    @staticmethod
    def forward(
        ctx: Context,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        bias: Tensor,
        strip_loss: StripLoss,
        differentiable: bool,
    ) -> Tensor:
        total = anchors.new_zeros(())
        gradients = [torch.zeros_like(t) for t in (anchors, candidates, inv_tau, bias)]
        d_anchors, *shared = gradients
        for rows in blocks(len(anchors), strip_size(anchors)):
            inputs = [anchors[rows], candidates, inv_tau, bias]
            leaves = [t.detach().requires_grad_(differentiable) for t in inputs]
            with torch.set_grad_enabled(differentiable):
                loss = strip_loss(rows, *leaves)
            total += loss.detach()
            if differentiable:
                anchor_gradient, *shared_gradients = torch.autograd.grad(loss, leaves)
                d_anchors[rows] = anchor_gradient
                for whole, part in zip(shared, shared_gradients, strict=True):
                    whole += part
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None


@eager
def weighted_contrast(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    *,
    contrast: Contrast,
    bias: float | Tensor = 0.0,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
    targets: Targets | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """:func:`cloob.functional.reference.weighted_contrast` in O((N + M)·D) memory.

    No gradient goes to targets or weights.
    """
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    inputs_with_scales = (
        anchors,
        candidates,
        scalar("inv_tau", inv_tau, anchors),
        scalar("bias", bias, anchors, positive=False),
    )
    if check_ids(ids, candidate_ids, n, m, anchors.device) is not None:
        candidate_ids = ids if candidate_ids is None else candidate_ids
    may_read = is_readable(anchors)
    read_weights(weights, (n, m), anchors, may_read=may_read)
    positives = None
    if targets is not None:
        softmax = CONTRASTS[contrast].softmax
        positives = read_targets(
            targets, (n, m), anchors, sum_to_1=softmax, may_read=may_read
        )

    def strip_loss(rows: slice, *inputs: Tensor) -> Tensor:
        a, c, tau, b = inputs
        mean = reference.weighted_contrast(
            a,
            c,
            tau,
            contrast=contrast,
            bias=b,
            positive_offset=positive_offset + rows.start,
            ids=None if ids is None else ids[rows],
            candidate_ids=candidate_ids,
            targets=rows_of(positives, rows),
            weights=None if weights is None else weights[rows],
            exclude_above=exclude_above,
        )
        return mean * (len(a) / n)

    differentiable = torch.is_grad_enabled() and any(
        t.requires_grad for t in inputs_with_scales
    )
    loss: Tensor = _Strips.apply(*inputs_with_scales, strip_loss, differentiable)  # type: ignore[no-untyped-call]
    return loss


def rows_of(positives: Positives | None, rows: slice) -> Positives | None:
    """The positives of some of the anchors."""
    if positives is None:
        return None
    columns, shares = positives
    return Positives(None if columns is None else columns[rows], shares[rows])
