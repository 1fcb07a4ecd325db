"""One direction of InfoLOOB and of InfoNCE without an N×M matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cloob.functional.checks import as_rows, check_ids, outside_autocast, positive_scalar
from cloob.functional.contrast import check_contrast
from cloob.functional.streamed.tiles import accumulate, apply, blocks, eager, product


class _Contrast(torch.autograd.Function):
    """One direction of InfoLOOB (``leave_out``) or InfoNCE, with a running log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        offset: int,
        ids: tuple[Tensor, Tensor] | None,
        leave_out: bool,
        matmul: torch.dtype,
    ) -> Tensor:
        a, c = anchors.to(matmul), candidates.to(matmul)
        positive = inv_tau * (anchors * candidates[offset : offset + len(anchors)]).sum(dim=1)
        log_sum = torch.full_like(positive, -torch.inf) if leave_out else positive.clone()
        for rows in blocks(anchors):
            for columns in blocks(candidates):
                logits = product(a[rows], c[columns].T, anchors).mul_(inv_tau)
                _exclude(logits, rows, columns, offset, ids)
                log_sum[rows] = torch.logaddexp(log_sum[rows], logits.logsumexp(dim=1))
        lone = log_sum == -torch.inf
        log_sum = torch.where(lone, positive, log_sum)
        ctx.save_for_backward(anchors, candidates, inv_tau, log_sum, positive, lone)
        ctx.offset, ctx.ids, ctx.leave_out, ctx.matmul = offset, ids, leave_out, matmul
        return (log_sum - positive).mean()

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        anchors, candidates, inv_tau, log_sum, positive, lone = ctx.saved_tensors
        offset, ids, matmul = ctx.offset, ctx.ids, ctx.matmul
        n = len(anchors)
        a, c = anchors.to(matmul), candidates.to(matmul)
        weight = grad * inv_tau / n
        # The positives by themselves: their softmax probability (InfoNCE only) less one, nothing for a lone anchor.
        p = torch.zeros_like(positive) if ctx.leave_out else (positive - log_sum).exp()
        pull = torch.where(lone, 0.0, weight * (p - 1))[:, None]
        d_anchors, d_candidates = pull * candidates[offset : offset + n], torch.zeros_like(candidates)
        d_candidates[offset : offset + n] = pull * anchors
        for rows in blocks(anchors):
            for columns in blocks(candidates):
                logits = product(a[rows], c[columns].T, anchors).mul_(inv_tau)
                _exclude(logits, rows, columns, offset, ids)
                p = logits.sub_(log_sum[rows, None]).exp_().mul_(weight).to(matmul)
                accumulate(d_anchors[rows], p, c[columns])
                accumulate(d_candidates[columns], p.T, a[rows])
        # The logits are τ⁻¹ a·c: what a gains along itself, τ⁻¹ gains.
        d_inv_tau = (anchors * d_anchors).sum() / inv_tau
        return d_anchors, d_candidates, d_inv_tau, None, None, None, None


def _exclude(logits: Tensor, rows: slice, columns: slice, offset: int, ids: tuple[Tensor, Tensor] | None) -> None:
    """Sets the logits of positives, and of candidates that share the anchor's id, to −∞; in place."""
    logits.diagonal(rows.start + offset - columns.start).fill_(-torch.inf)
    if ids is not None:
        logits.masked_fill_(ids[0][rows, None] == ids[1][None, columns], -torch.inf)


@eager
@outside_autocast
def _contrast(
    leave_out: bool,
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    offset: int,
    ids: Tensor | None,
    candidate_ids: Tensor | None,
    matmul: torch.dtype | None,
) -> Tensor:
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, offset)
    both = check_ids(ids, candidate_ids, n, m)
    scale = positive_scalar("inv_tau", inv_tau, anchors)
    loss: Tensor = apply(_Contrast, anchors, candidates, scale, offset, both, leave_out, matmul or anchors.dtype)
    return loss


def info_loob(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """:func:`cloob.functional.info_loob` in O((N + M)·D) memory; ``matmul`` as in :func:`hopfield_retrieval`."""
    return _contrast(True, anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, matmul)


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """:func:`cloob.functional.info_nce` in O((N + M)·D) memory; ``matmul`` as in :func:`hopfield_retrieval`."""
    return _contrast(False, anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, matmul)
