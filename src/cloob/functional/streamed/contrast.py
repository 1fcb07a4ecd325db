"""One direction of InfoLOOB, of InfoNCE and of SigLIP's sigmoid loss without an N×M
matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

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


class _Options(NamedTuple):
    """What is contrasted with what; ``offset`` is the row of the first positive."""

    leave_out: bool
    offset: int
    ids: tuple[Tensor, Tensor] | None
    exclude_above: float | None
    differentiable: bool
    matmul: torch.dtype


class _Logits:
    """The (N, M) logits of a direction, strip by strip.

    Without their mean, close candidates differ in more of the digits that low precision
    keeps. A softmax ignores what the logits of a row share; the sigmoid loss gets it
    back with its bias, as a constant of the row. In a candidate's gradient the mean of
    the anchors all but cancels, so it is kept apart too.
    """

    def __init__(
        self,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        bias: Tensor | None,
        options: _Options,
    ) -> None:
        self.options = options
        n = len(anchors)
        scaled = inv_tau * anchors
        self.mean = candidates.mean(dim=0)
        self.centred = candidates - self.mean
        self.common = scaled.mean(dim=0)
        self.own_part = scaled - self.common
        self.low_anchors = scaled.to(options.matmul)
        self.low_candidates = self.centred.to(options.matmul)
        self.low_own_part = self.own_part.to(options.matmul)

        own = self.centred[options.offset : options.offset + n]
        self.positive = (scaled * own).sum(dim=1, keepdim=True)
        self.constant: Tensor | None = None
        if bias is not None:
            self.constant = (scaled @ self.mean)[:, None] + bias
            self.positive += self.constant
        self.limits: Tensor | None = None
        if options.exclude_above is not None:
            self.limits = self.positive + inv_tau * options.exclude_above

    def strip(self, rows: slice) -> Tensor:
        """The logits of some anchors, −∞ where a candidate is no negative."""
        logits = (self.low_anchors[rows] @ self.low_candidates.T).to(self.mean.dtype)
        if self.constant is not None:
            logits += self.constant[rows]
        logits.diagonal(rows.start + self.options.offset).fill_(-torch.inf)
        if self.options.ids is not None:
            of_anchors, of_candidates = self.options.ids
            same = of_anchors[rows, None] == of_candidates[None, :]
            logits.masked_fill_(same, -torch.inf)
        if self.limits is not None:
            logits.masked_fill_(logits > self.limits[rows], -torch.inf)
        return logits


class _Gradients:
    """Sums over strips of the gradients by anchors / τ⁻¹, candidates and bias."""

    def __init__(self, logits: _Logits) -> None:
        self.logits = logits
        self.anchors = torch.zeros_like(logits.own_part)
        self.candidates = torch.zeros_like(logits.centred)
        self.by_anchor = torch.zeros_like(logits.positive)
        self.by_candidate = self.candidates.new_zeros(len(self.candidates), 1)

    def add(self, rows: slice, p: Tensor, pull: Tensor) -> None:
        """Adds a strip: the loss's derivatives ``p`` by its logits, and ``pull`` by its
        positives.
        """
        logits = self.logits
        offset = logits.options.offset
        positives = slice(rows.start + offset, rows.stop + offset)
        self.by_candidate += p.sum(dim=0)[:, None]
        self.by_candidate[positives] += pull
        if logits.constant is not None:  # of a softmax this sum is 0
            self.by_anchor[rows] = p.sum(dim=1, keepdim=True) + pull
        p = p.to(logits.options.matmul)
        accumulate(self.anchors[rows], p, logits.low_candidates)
        accumulate(self.candidates, p.T, logits.low_own_part[rows])
        self.anchors[rows].addcmul_(pull, logits.centred[positives])
        self.candidates[positives].addcmul_(pull, logits.own_part[rows])

    def add_means(self) -> None:
        """Adds what the means that were left out give."""
        self.candidates.addcmul_(self.by_candidate, self.logits.common)
        if self.logits.constant is not None:
            self.anchors.addcmul_(self.by_anchor, self.logits.mean)


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
        options: _Options,
    ) -> Tensor:
        n = len(anchors)
        logits = _Logits(anchors, candidates, inv_tau, bias, options)
        gradients = _Gradients(logits) if options.differentiable else None
        weigh = to_sigmoid
        if bias is None:
            weigh = partial(to_softmax, leave_out=options.leave_out)
        losses = torch.empty_like(logits.positive)
        for rows in blocks(anchors, tiles.STRIP.get(anchors.device.type, 4096)):
            p = logits.strip(rows)
            losses[rows], pull = weigh(p, logits.positive[rows])
            if gradients is not None:
                gradients.add(rows, p, pull)
        if gradients is not None:
            gradients.add_means()
            d_bias = None if bias is None else gradients.by_anchor.sum().div_(n)
            d_inv_tau = torch.zeros_like(inv_tau)
            if ctx.needs_input_grad[2]:
                # The logits are τ⁻¹ a·c + b: what a gains along itself, τ⁻¹ gains.
                d_inv_tau = (gradients.anchors * anchors).sum().div_(n)
            d_anchors = gradients.anchors.mul_(inv_tau / n)
            d_candidates = gradients.candidates.div_(n)
            ctx.save_for_backward(d_anchors, d_candidates, d_inv_tau, d_bias)
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
    if leave_out:
        highest = torch.where(lone, positive, highest)
    else:
        highest = torch.maximum(highest, positive)
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
    """The loss of anchors against candidates, in tiles, after its arguments are
    checked; ``leave_out``: without the positive in the denominator.
    """
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    inv_tau = scalar("inv_tau", inv_tau, anchors)
    inputs = [anchors, candidates, inv_tau]
    if bias is not None:
        bias = scalar("bias", bias, anchors, positive=False)
        inputs.append(bias)
    options = _Options(
        leave_out=leave_out,
        offset=positive_offset,
        ids=check_ids(ids, candidate_ids, n, m, anchors.device),
        exclude_above=exclude_above,
        differentiable=torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in inputs),
        matmul=matmul_dtype(matmul, anchors),
    )
    loss: Tensor = _Contrast.apply(anchors, candidates, inv_tau, bias, options)  # type: ignore[no-untyped-call]
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
