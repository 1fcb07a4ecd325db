"""One direction of InfoLOOB, of InfoNCE and of SigLIP's sigmoid loss without an N×M matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.functional.checks import as_rows, check_ids, outside_autocast, scalar
from cloob.functional.contrast import check_contrast
from cloob.functional.streamed.tiles import accumulate, apply, eager, first_order, matmul_dtype, product, strips


class _Contrast(torch.autograd.Function):
    """One direction of InfoLOOB (``leave_out``) or InfoNCE, and its gradient up to the factor that comes back to it.

    A strip of logits, some anchors against all candidates, has whole rows of the softmax in it: it gives the value and
    the gradient at once, and no product is computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        leave_out: bool,
        offset: int,
        ids: tuple[Tensor, Tensor] | None,
        differentiable: bool,
        matmul: torch.dtype,
    ) -> Tensor:
        n = len(anchors)
        # A shift of all candidates moves whole rows of logits, which a softmax ignores: without their mean, close
        # candidates differ in more of the digits that low precision keeps. In a candidate's gradient what the anchors
        # have in common all but cancels, so it is kept apart too.
        centred, scaled = candidates - candidates.mean(dim=0), inv_tau * anchors
        common = scaled.mean(dim=0)
        own_part = scaled - common
        c, a, a_own = centred.to(matmul), scaled.to(matmul), own_part.to(matmul)
        positive = (scaled * centred[offset : offset + n]).sum(dim=1, keepdim=True)
        losses = torch.empty_like(positive)
        d_anchors, d_candidates = (torch.zeros_like(t) if differentiable else None for t in (anchors, candidates))
        share = candidates.new_zeros(len(candidates), 1)
        for rows in strips(anchors):
            p = product(a[rows], c.T, anchors)
            exclude(p, rows, offset, ids)
            losses[rows], pull = to_softmax(p, positive[rows], leave_out)
            if d_anchors is None or d_candidates is None:
                continue
            positives = slice(rows.start + offset, rows.stop + offset)
            share += p.sum(dim=0)[:, None]
            share[positives] += pull
            p = p.to(matmul)
            accumulate(d_anchors[rows], p, c)
            accumulate(d_candidates, p.T, a_own[rows])
            d_anchors[rows].addcmul_(pull, centred[positives])
            d_candidates[positives].addcmul_(pull, own_part[rows])
        if d_anchors is not None and d_candidates is not None:
            d_candidates.addcmul_(share, common)
            # The logits are τ⁻¹ a·c: what a gains along itself, τ⁻¹ gains.
            d_inv_tau = (d_anchors * anchors).sum().div_(n) if ctx.needs_input_grad[2] else torch.zeros_like(inv_tau)
            ctx.save_for_backward(d_anchors.mul_(inv_tau / n), d_candidates.div_(n), d_inv_tau)
        return losses.mean()

    @staticmethod
    @first_order
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None, None, None


def exclude(logits: Tensor, rows: slice, offset: int, ids: tuple[Tensor, Tensor] | None) -> None:
    """Sets the logits of positives, and of candidates that share the anchor's id, to −∞; in place."""
    logits.diagonal(rows.start + offset).fill_(-torch.inf)
    if ids is not None:
        logits.masked_fill_(ids[0][rows, None] == ids[1][None, :], -torch.inf)


def to_softmax(logits: Tensor, positive: Tensor, leave_out: bool) -> tuple[Tensor, Tensor]:
    """Turns whole rows of logits without their (n, 1) positives into probabilities, in place.

    Gives the (n, 1) losses, and their (n, 1) derivatives by the positives' logits: p − 1, where p is 0 if they are
    left out; both 0 for an anchor that has no negative.
    """
    highest = logits.amax(dim=1, keepdim=True)
    lone = highest == -torch.inf
    highest = torch.where(lone, positive, highest) if leave_out else torch.maximum(highest, positive)
    total = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
    # A lone anchor keeps its positive: ln(e^s / e^s) = 0 with zero gradient, as in InfoNCE.
    p = lone.to(logits.dtype) if leave_out else (positive - highest).exp_()
    total += p
    logits.div_(total)
    return total.log() + highest - positive, p.div_(total) - 1


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
def _direction(
    function: type[torch.autograd.Function],
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    fourth: bool | float | Tensor,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """One direction by an autograd function; ``fourth``: whether to leave the positive out, or the sigmoid's bias."""
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    both = check_ids(ids, candidate_ids, n, m, anchors.device)
    if not isinstance(fourth, bool):
        fourth = scalar("bias", fourth, anchors, positive=False)
    given = (anchors, candidates, scalar("inv_tau", inv_tau, anchors), fourth)
    differentiable = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)
    loss: Tensor = apply(function, *given, positive_offset, both, differentiable, matmul_dtype(matmul, anchors))
    return loss


def info_loob(anchors: Tensor, candidates: Tensor, inv_tau: float | Tensor, **options: Any) -> Tensor:
    """:func:`cloob.functional.info_loob` in O((N + M)·D) memory; ``matmul`` as in :func:`hopfield_retrieval`."""
    return _direction(_Contrast, anchors, candidates, inv_tau, True, **options)


def info_nce(anchors: Tensor, candidates: Tensor, inv_tau: float | Tensor, **options: Any) -> Tensor:
    """:func:`cloob.functional.info_nce` in O((N + M)·D) memory; ``matmul`` as in :func:`hopfield_retrieval`."""
    return _direction(_Contrast, anchors, candidates, inv_tau, False, **options)


def sigmoid_loss(
    anchors: Tensor, candidates: Tensor, inv_tau: float | Tensor, bias: float | Tensor = -10.0, **options: Any
) -> Tensor:
    """:func:`cloob.functional.sigmoid_loss` in O((N + M)·D) memory; ``matmul`` as in :func:`hopfield_retrieval`."""
    return _direction(_Sigmoid, anchors, candidates, inv_tau, bias, **options)
