"""InfoLOOB, InfoNCE and SigLIP's sigmoid loss of anchors and candidates without an N×M
matrix: one direction, or two in one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.family import Contrast
from cloob.functional.checks import as_rows, check_ids, scalar
from cloob.functional.private import Context
from cloob.functional.reference import Pairing, check_contrast
from cloob.functional.streamed.tiles import (
    accumulate,
    blocks,
    eager,
    exp_,
    first_order,
    matmul_dtype,
    strip_size,
)


class Options(Pairing, total=False):
    """How a contrast is computed; ``matmul`` as in :func:`hopfield_retrieval`."""

    matmul: torch.dtype | None


class Settings(NamedTuple):
    """The same, checked: anchor i is contrasted with candidate ``i + offset``."""

    leave_out: bool  # the positive, from the denominator
    offset: int
    ids: tuple[Tensor, Tensor] | None  # of the anchors, and of the candidates
    exclude_above: float | None
    matmul: torch.dtype
    differentiable: bool


def read_settings(
    inputs: Sequence[Tensor],
    *,
    leave_out: bool,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
    matmul: torch.dtype | None = None,
) -> Settings:
    """The settings of a contrast of (…, N, D) anchors and (…, M, D) candidates, the
    first two of the ``inputs``; the others are its scales.
    """
    anchors, candidates, *_ = inputs
    n, m = anchors.shape[-2], candidates.shape[-2]
    needs_gradient = any(tensor.requires_grad for tensor in inputs)
    return Settings(
        leave_out=leave_out,
        offset=positive_offset,
        ids=check_ids(ids, candidate_ids, n, m, anchors.device),
        exclude_above=exclude_above,
        matmul=matmul_dtype(matmul, anchors),
        differentiable=torch.is_grad_enabled() and needs_gradient,
    )


class _Logits:
    """The (B, N, M) logits of B directions, strip by strip.

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
        settings: Settings,
    ) -> None:
        self.settings = settings
        scaled = inv_tau * anchors
        self.mean_candidate = candidates.mean(dim=1, keepdim=True)
        self.centred_candidates = candidates - self.mean_candidate
        self.mean_anchor = scaled.mean(dim=1, keepdim=True)
        self.centred_anchors = scaled - self.mean_anchor
        self.low_anchors = scaled.to(settings.matmul)
        self.low_candidates = self.centred_candidates.to(settings.matmul)
        self.low_centred_anchors = self.centred_anchors.to(settings.matmul)

        n = anchors.shape[1]
        positives = self.centred_candidates[:, settings.offset : settings.offset + n]
        self.positive = (scaled * positives).sum(dim=2, keepdim=True)  # (B, N, 1)
        self.constant: Tensor | None = None
        if bias is not None:
            shared = (scaled * self.mean_candidate).sum(dim=2, keepdim=True)
            self.constant = shared + bias
            self.positive += self.constant
        self.limits: Tensor | None = None
        if settings.exclude_above is not None:
            self.limits = self.positive + inv_tau * settings.exclude_above

    def strip(self, rows: slice) -> Tensor:
        """The logits of some anchors, −∞ where a candidate is no negative."""
        products = self.low_anchors[:, rows] @ self.low_candidates.mT
        logits = products.to(self.mean_candidate.dtype)
        if self.constant is not None:
            logits += self.constant[:, rows]
        first = rows.start + self.settings.offset
        logits.diagonal(first, dim1=1, dim2=2).fill_(-torch.inf)
        if self.settings.ids is not None:
            of_anchors, of_candidates = self.settings.ids
            same = of_anchors[rows, None] == of_candidates
            logits.masked_fill_(same, -torch.inf)
        if self.limits is not None:
            logits.masked_fill_(logits > self.limits[:, rows], -torch.inf)
        return logits


class _Gradients:
    """Sums over strips of the gradients by anchors / τ⁻¹, candidates and bias."""

    def __init__(self, logits: _Logits) -> None:
        self.logits = logits
        self.anchors = torch.zeros_like(logits.centred_anchors)
        self.candidates = torch.zeros_like(logits.centred_candidates)
        self.by_anchor = torch.zeros_like(logits.positive)
        self.by_candidate = torch.zeros_like(logits.centred_candidates[..., :1])

    def add(self, rows: slice, p: Tensor, pull: Tensor) -> None:
        """Adds a strip: the loss's derivatives ``p`` by its logits, and ``pull`` by its
        positives.
        """
        logits = self.logits
        offset = logits.settings.offset
        positives = slice(rows.start + offset, rows.stop + offset)
        self.by_candidate += p.sum(dim=1)[..., None]
        self.by_candidate[:, positives] += pull
        if logits.constant is not None:  # of a softmax this sum is 0
            self.by_anchor[:, rows] = p.sum(dim=2, keepdim=True) + pull
        p = p.to(logits.settings.matmul)
        d_anchors = self.anchors[:, rows]
        accumulate(d_anchors, p, logits.low_candidates)
        accumulate(self.candidates, p.mT, logits.low_centred_anchors[:, rows])
        d_anchors.addcmul_(pull, logits.centred_candidates[:, positives])
        self.candidates[:, positives].addcmul_(pull, logits.centred_anchors[:, rows])

    def add_means(self) -> None:
        """Adds what the means that were left out give."""
        self.candidates.addcmul_(self.by_candidate, self.logits.mean_anchor)
        if self.logits.constant is not None:
            self.anchors.addcmul_(self.by_anchor, self.logits.mean_candidate)


class _Contrast(torch.autograd.Function):
    """The sum over directions of a contrast: a strip of logits, some anchors against
    all candidates, gives value and gradient.

    With a ``bias`` it is the sigmoid loss, without InfoLOOB (``leave_out``) or InfoNCE.
    """

    @staticmethod
    def forward(
        ctx: Context,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        bias: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        n_directions, n, _ = anchors.shape
        logits = _Logits(anchors, candidates, inv_tau, bias, settings)
        gradients = _Gradients(logits) if settings.differentiable else None
        losses = torch.empty_like(logits.positive)
        for rows in blocks(n, max(1, strip_size(anchors) // n_directions)):
            p = logits.strip(rows)
            positive = logits.positive[:, rows]
            if bias is not None:
                losses[:, rows], pull = to_sigmoid(p, positive)
            else:
                losses[:, rows], pull = to_softmax(p, positive, settings.leave_out)
            if gradients is not None:
                gradients.add(rows, p, pull)
        if gradients is not None:
            gradients.add_means()
            d_inv_tau: Tensor | None = None
            d_bias: Tensor | None = None
            if ctx.needs_input_grad[2]:
                # The logits are τ⁻¹ a·c + b: what a gains along itself, τ⁻¹ gains.
                d_inv_tau = (gradients.anchors * anchors).sum().div_(n)
            if bias is not None:
                d_bias = gradients.by_anchor.sum().div_(n)
            d_anchors = gradients.anchors.mul_(inv_tau / n)
            d_candidates = gradients.candidates.div_(n)
            ctx.save_for_backward(d_anchors, d_candidates, d_inv_tau, d_bias)
        return losses.sum().div_(n)

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if d is None else grad * d for d in ctx.saved_tensors]
        return *gradients, None


def to_softmax(
    logits: Tensor, positive: Tensor, leave_out: bool
) -> tuple[Tensor, Tensor]:
    """Turns full rows of logits without their (…, n, 1) positives into probabilities,
    in place.

    Gives the (…, n, 1) losses and their derivatives by the positives' logits: p − 1,
    with p = 0 if they are left out; both 0 for an anchor that has no negative.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    lone = highest == -torch.inf
    if leave_out:
        highest = torch.where(lone, positive, highest)
    else:
        highest = torch.maximum(highest, positive)
    total = exp_(logits.sub_(highest)).sum(dim=-1, keepdim=True)
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
    drawn = -F.logsigmoid(positive)
    pushed = -F.logsigmoid(-logits).sum(dim=-1, keepdim=True)
    logits.sigmoid_()
    return drawn + pushed, -(-positive).sigmoid()


def _contrast(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    bias: float | Tensor | None,
    *,
    leave_out: bool,
    **options: Unpack[Options],
) -> Tensor:
    """The sum over the losses of (B, N, D) anchors against (B, M, D) candidates;
    ``leave_out``: without the positive in the denominator.
    """
    inv_tau = scalar("inv_tau", inv_tau, anchors)
    inputs = [anchors, candidates, inv_tau]
    if bias is not None:
        bias = scalar("bias", bias, anchors, positive=False)
        inputs.append(bias)
    settings = read_settings(inputs, leave_out=leave_out, **options)
    loss: Tensor = _Contrast.apply(anchors, candidates, inv_tau, bias, settings)  # type: ignore[no-untyped-call]
    return loss


@eager
def _direction(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    bias: float | Tensor | None = None,
    *,
    leave_out: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """One direction, after its rows are checked."""
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    check_contrast(anchors, candidates, options.get("positive_offset", 0))
    stacks = anchors[None], candidates[None]
    return _contrast(*stacks, inv_tau, bias, leave_out=leave_out, **options)


def info_loob(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """:func:`cloob.functional.info_loob` in O((N + M)·D) memory; ``matmul`` as in
    :func:`hopfield_retrieval`.
    """
    return _direction(anchors, candidates, inv_tau, leave_out=True, **options)


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """:func:`cloob.functional.info_nce` likewise."""
    return _direction(anchors, candidates, inv_tau, **options)


def sigmoid_loss(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    bias: float | Tensor = -10.0,
    **options: Unpack[Options],
) -> Tensor:
    """:func:`cloob.functional.sigmoid_loss` likewise."""
    return _direction(anchors, candidates, inv_tau, bias, **options)


@eager
def softmax_two(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    *,
    contrast: Contrast,
    **options: Unpack[Options],
) -> Tensor:
    """The sum of two directions of InfoLOOB or InfoNCE, of (2, N, D) retrieved rows."""
    leave_out = contrast == "infoloob"
    return _contrast(anchors, candidates, inv_tau, None, leave_out=leave_out, **options)
