"""One direction of InfoLOOB, of InfoNCE and of SigLIP's sigmoid loss without an N×M
matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.functional.checks import as_rows, check_ids, scalar
from cloob.functional.reference import check_contrast
from cloob.functional.streamed import tiles
from cloob.functional.streamed.tiles import (
    accumulate,
    blocks,
    eager,
    first_order,
    matmul_dtype,
)


class _Contrast(torch.autograd.Function):
    """One direction of a contrast: a strip of logits, some anchors against all
    candidates, gives value and gradient.

    With a ``bias`` it is the sigmoid loss, without InfoLOOB (``leave_out``) or InfoNCE.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        bias: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        leave_out, offset, ids, exclude_above, differentiable, matmul = options
        n = len(anchors)
        # Without their mean, close candidates differ in more of the digits that low
        # precision keeps. A softmax ignores what the logits of a row share; the sigmoid
        # loss gets it back with its bias, as a constant of the row. In a candidate's
        # gradient the mean of the anchors all but cancels, so it is kept apart too.
        mean, scaled = candidates.mean(dim=0), inv_tau * anchors
        centred, common = candidates - mean, scaled.mean(dim=0)
        own_part = scaled - common
        c, a, a_own = centred.to(matmul), scaled.to(matmul), own_part.to(matmul)
        positive = (scaled * centred[offset : offset + n]).sum(dim=1, keepdim=True)
        constant = None if bias is None else (scaled @ mean)[:, None] + bias
        if constant is not None:
            positive += constant
        losses = torch.empty_like(positive)
        d_anchors, d_candidates = (
            torch.zeros_like(t) if differentiable else None
            for t in (anchors, candidates)
        )
        weigh = partial(to_softmax, leave_out=leave_out) if bias is None else to_sigmoid
        by_anchor, by_candidate = (
            torch.zeros_like(positive),
            candidates.new_zeros(len(candidates), 1),
        )
        for rows in blocks(anchors, tiles.STRIP.get(anchors.device.type, 4096)):
            p = (a[rows] @ c.T).to(anchors.dtype)
            if constant is not None:
                p += constant[rows]
            p.diagonal(rows.start + offset).fill_(-torch.inf)
            if ids is not None:
                p.masked_fill_(ids[0][rows, None] == ids[1][None, :], -torch.inf)
            if exclude_above is not None:
                p.masked_fill_(p > positive[rows] + inv_tau * exclude_above, -torch.inf)
            losses[rows], pull = weigh(p, positive[rows])
            if d_anchors is None or d_candidates is None:
                continue
            positives = slice(rows.start + offset, rows.stop + offset)
            by_candidate += p.sum(dim=0)[:, None]
            by_candidate[positives] += pull
            if bias is not None:  # of a softmax this sum is 0
                by_anchor[rows] = p.sum(dim=1, keepdim=True) + pull
            p = p.to(matmul)
            accumulate(d_anchors[rows], p, c)
            accumulate(d_candidates, p.T, a_own[rows])
            d_anchors[rows].addcmul_(pull, centred[positives])
            d_candidates[positives].addcmul_(pull, own_part[rows])
        if d_anchors is not None and d_candidates is not None:
            d_candidates.addcmul_(by_candidate, common)
            d_bias = None
            if bias is not None:
                d_anchors.addcmul_(by_anchor, mean)
                d_bias = by_anchor.sum().div_(n)
            # The logits are τ⁻¹ a·c + b: what a gains along itself, τ⁻¹ gains.
            d_inv_tau = (
                (d_anchors * anchors).sum().div_(n)
                if ctx.needs_input_grad[2]
                else torch.zeros_like(inv_tau)
            )
            ctx.save_for_backward(
                d_anchors.mul_(inv_tau / n), d_candidates.div_(n), d_inv_tau, d_bias
            )
        return losses.mean()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = (
            None if gradient is None else grad * gradient
            for gradient in ctx.saved_tensors
        )
        return *gradients, None


def to_softmax(
    logits: Tensor, positive: Tensor, leave_out: bool
) -> tuple[Tensor, Tensor]:
    """Turns full rows of logits without their (n, 1) positives into probabilities, in
    place.

    Gives the (n, 1) losses and their derivatives by the positives' logits: p − 1, with
    p = 0 if they are left out; both 0 for an anchor that has no negative.
    """
    highest = logits.amax(dim=1, keepdim=True)
    lone = highest == -torch.inf
    highest = (
        torch.where(lone, positive, highest)
        if leave_out
        else torch.maximum(highest, positive)
    )
    total = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
    # A lone anchor keeps its positive: ln(e^s / e^s) = 0 with zero gradient, as in
    # InfoNCE.
    p = lone.to(logits.dtype) if leave_out else (positive - highest).exp_()
    total += p
    logits.div_(total)
    return total.log() + highest - positive, p.div_(total) - 1


def to_sigmoid(logits: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the sigmoid loss: every probability by itself, the derivative by the
    positive −σ(−s).
    """
    losses = -F.logsigmoid(positive) - F.logsigmoid(-logits).sum(dim=1, keepdim=True)
    logits.sigmoid_()
    return losses, -(-positive).sigmoid()


@eager
def _direction(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    bias: float | Tensor | None = None,
    leave_out: bool = False,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
    matmul: torch.dtype | None = None,
) -> Tensor:
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    both = check_ids(ids, candidate_ids, n, m, anchors.device)
    b = None if bias is None else scalar("bias", bias, anchors, positive=False)
    given = (anchors, candidates, scalar("inv_tau", inv_tau, anchors), b)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in given
    )
    options = (
        leave_out,
        positive_offset,
        both,
        exclude_above,
        differentiable,
        matmul_dtype(matmul, anchors),
    )
    loss: Tensor = _Contrast.apply(*given, options)  # type: ignore[no-untyped-call]
    return loss


def info_loob(
    anchors: Tensor, candidates: Tensor, inv_tau: float | Tensor, **options: Any
) -> Tensor:
    """:func:`cloob.functional.info_loob` in O((N + M)·D) memory; ``matmul`` as in
    :func:`hopfield_retrieval`.
    """
    return _direction(anchors, candidates, inv_tau, leave_out=True, **options)


def info_nce(
    anchors: Tensor, candidates: Tensor, inv_tau: float | Tensor, **options: Any
) -> Tensor:
    """:func:`cloob.functional.info_nce` likewise."""
    return _direction(anchors, candidates, inv_tau, **options)


def sigmoid_loss(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    bias: float | Tensor = -10.0,
    **options: Any,
) -> Tensor:
    """:func:`cloob.functional.sigmoid_loss` likewise."""
    return _direction(anchors, candidates, inv_tau, bias, **options)
