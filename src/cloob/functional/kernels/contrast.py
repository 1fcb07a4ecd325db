"""One direction of InfoLOOB and of InfoNCE by kernels; values and gradients as in :mod:`cloob.functional.streamed`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cloob.functional.checks import outside_autocast
from cloob.functional.kernels.launch import check_rows
from cloob.functional.kernels.products import Side, accumulate
from cloob.functional.kernels.softmax import Excluded, as_int64, rescaled, strip_of, strips
from cloob.functional.streamed import contrast
from cloob.functional.streamed.contrast import to_softmax
from cloob.functional.streamed.tiles import first_order


class _Contrast(torch.autograd.Function):
    """One direction of InfoLOOB (``leave_out``) or InfoNCE, and its gradient up to the factor that comes back to it."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        offset: int,
        ids: tuple[Tensor, Tensor] | None,
        leave_out: bool,
        differentiable: bool,
        matmul: torch.dtype,
    ) -> Tensor:
        check_rows(anchors)
        n, ids = len(anchors), as_int64(ids)
        # A softmax ignores what the candidates have in common, and low precision does not round it if it is not there;
        # what the anchors have in common is put back in float32.
        mean, common = candidates.mean(dim=0), anchors.mean(dim=0)
        c, own = (candidates - mean).to(matmul).contiguous(), (anchors - common).to(matmul).contiguous()
        a = anchors.to(matmul).contiguous()
        losses = anchors.new_empty(n, 1)
        sides = (anchors, candidates) if differentiable else (anchors[:0], candidates[:0])
        d_anchors, d_candidates = (side.new_zeros(side.shape) for side in sides)
        share = candidates.new_zeros(len(candidates))
        for rows in strips(anchors, len(candidates)):
            positives = slice(rows.start + offset, rows.stop + offset)
            own_positives = candidates[positives] - mean
            positive = inv_tau * (anchors[rows] * own_positives).sum(dim=1, keepdim=True)
            excluded = Excluded(rows.start + offset, *([] if ids is None else [ids[0][rows], ids[1]]))
            e, highest, total = strip_of(a[rows], c, inv_tau, excluded, keep=differentiable)
            # Blocks by their log-sum-exp are a softmax too: that of the logits, summed block by block.
            probability = highest + total.log()
            losses[rows], pull = to_softmax(probability, positive, leave_out)
            if e is None:
                continue
            share += rescaled(e, torch.where(total > 0, probability / total, 0.0))
            share[positives] += pull[:, 0]
            accumulate(e, Side(d_anchors[rows], c), Side(d_candidates, own[rows]))
            d_anchors[rows].addcmul_(pull, own_positives)
            d_candidates[positives].addcmul_(pull, anchors[rows] - common)
        if differentiable:
            d_candidates.addcmul_(share[:, None], common)
            # The logits are τ⁻¹ a·c: what a gains along itself, τ⁻¹ gains.
            d_inv_tau = (d_anchors * anchors).sum().div_(n) if ctx.needs_input_grad[2] else torch.zeros_like(inv_tau)
            ctx.save_for_backward(d_anchors.mul_(inv_tau / n), d_candidates.mul_(inv_tau / n), d_inv_tau)
        return losses.mean()

    @staticmethod
    @first_order
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None, None, None


info_loob = partial(contrast.info_loob, function=_Contrast)
info_nce = partial(contrast.info_nce, function=_Contrast)
