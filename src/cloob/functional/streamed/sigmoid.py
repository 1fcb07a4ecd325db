"""SigLIP's sigmoid loss without an N×M matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.functional.checks import as_rows, check_ids, finite_scalar, outside_autocast, positive_scalar
from cloob.functional.contrast import check_contrast
from cloob.functional.streamed.contrast import exclude
from cloob.functional.streamed.tiles import accumulate, apply, eager, first_order, matmul_dtype, product, strips


class _Sigmoid(torch.autograd.Function):
    """The loss and its gradient up to the factor that comes back to it, strip by strip, as the softmax contrasts."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        bias: Tensor,
        offset: int,
        ids: tuple[Tensor, Tensor] | None,
        differentiable: bool,
        matmul: torch.dtype,
    ) -> Tensor:
        n = len(anchors)
        # What the candidates have in common, and the anchors, is kept apart from what low precision rounds. Unlike a
        # softmax, a sigmoid does not ignore it: it comes back with the bias, as a constant of each row.
        mean, scaled = candidates.mean(dim=0), inv_tau * anchors
        centred, common = candidates - mean, scaled.mean(dim=0)
        own_part, constant = scaled - common, (scaled @ mean)[:, None] + bias
        c, a, a_own = centred.to(matmul), scaled.to(matmul), own_part.to(matmul)
        positive = (scaled * centred[offset : offset + n]).sum(dim=1, keepdim=True) + constant
        losses, pull = -F.logsigmoid(positive), -(-positive).sigmoid()  # the loss, and its derivative by the logit
        d_anchors, d_candidates = (torch.zeros_like(t) if differentiable else None for t in (anchors, candidates))
        by_column, d_bias = candidates.new_zeros(len(candidates), 1), torch.zeros_like(bias)
        for rows in strips(anchors):
            p = product(a[rows], c.T, anchors).add_(constant[rows])
            exclude(p, rows, offset, ids)
            losses[rows] -= F.logsigmoid(-p).sum(dim=1, keepdim=True)
            if d_anchors is None or d_candidates is None:
                continue
            positives = slice(rows.start + offset, rows.stop + offset)
            p.sigmoid_()
            by_row = p.sum(dim=1, keepdim=True) + pull[rows]
            by_column += p.sum(dim=0)[:, None]
            by_column[positives] += pull[rows]
            d_bias += by_row.sum()
            p = p.to(matmul)
            accumulate(d_anchors[rows], p, c)
            accumulate(d_candidates, p.T, a_own[rows])
            d_anchors[rows].addcmul_(pull[rows], centred[positives]).addcmul_(by_row, mean)
            d_candidates[positives].addcmul_(pull[rows], own_part[rows])
        if d_anchors is not None and d_candidates is not None:
            d_candidates.addcmul_(by_column, common)
            # The logits are τ⁻¹ a·c + b: what a gains along itself, τ⁻¹ gains.
            d_inv_tau = (d_anchors * anchors).sum().div_(n) if ctx.needs_input_grad[2] else torch.zeros_like(inv_tau)
            ctx.save_for_backward(d_anchors.mul_(inv_tau / n), d_candidates.div_(n), d_inv_tau, d_bias.div_(n))
        return losses.mean()

    @staticmethod
    @first_order
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None, None


@eager
@outside_autocast
def sigmoid_loss(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    bias: float | Tensor = -10.0,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """:func:`cloob.functional.sigmoid_loss` in O((N + M)·D) memory; ``matmul`` as in :func:`hopfield_retrieval`."""
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    both = check_ids(ids, candidate_ids, n, m, anchors.device)
    scalars = (positive_scalar("inv_tau", inv_tau, anchors), finite_scalar("bias", bias, anchors))
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (anchors, candidates, *scalars))
    options = (positive_offset, both, differentiable, matmul_dtype(matmul, anchors))
    loss: Tensor = apply(_Sigmoid, anchors, candidates, *scalars, *options)
    return loss
