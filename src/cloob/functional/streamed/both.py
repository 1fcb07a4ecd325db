"""Both directions of InfoLOOB or InfoNCE without retrieval, from one product.

The logits of the second direction are the transpose of the first's. One product L =
τ⁻¹ X Yᵀ gives the sums of its rows and of its columns; what the loss gains by L is one
matrix P, and ``P Y`` and ``Pᵀ X`` are both gradients: 6 N²D operations instead of 12.

InfoLOOB of anchor i is ℓ_i = ln Σ_{j≠i} exp(L_ij) − L_ii. InfoNCE adds exp(L_ii) to the
sum, and ln(exp(L_ii) + Σ_{j≠i} exp(L_ij)) − L_ii = ln(1 + exp ℓ_i): **the InfoNCE of an
anchor is the softplus of its InfoLOOB**, and its gradient is that of InfoLOOB times
σ(ℓ_i). So both leave out the diagonal of L. Nothing cancels where a positive wins by
far, as p − 1 does, and ℓ = −∞, an anchor without negatives, gives InfoNCE its 0.

In a narrow cone all logits are nearly equal, and float32 would spend its digits on what
they share. With x̄ and ȳ the means of τ⁻¹X and Y,
    L_ij − x̄·ȳ = (τ⁻¹x_i − x̄)·(y_j − ȳ) + (τ⁻¹x_i − x̄)·ȳ + x̄·(y_j − ȳ),
of which the first term alone is a product of matrices. The constant x̄·ȳ changes no
softmax. The gradient by τ⁻¹ is Σ P ∘ L / τ⁻¹, and P adds up to nothing, so that the
constant is left out there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.family import Contrast
from cloob.functional.checks import as_rows, check_ids, scalar
from cloob.functional.private import Context
from cloob.functional.reference import check_contrast
from cloob.functional.streamed.tiles import (
    accumulate,
    blocks,
    eager,
    exp_,
    first_order,
    matmul_dtype,
    strip_size,
)

# Logits that are kept for the gradient: 256 MB. Of more, every strip is multiplied once
# again: 8 N²D operations.
MAX_KEPT = 1 << 26


@dataclass(frozen=True)
class _Pairs:
    """What is contrasted with what: anchor i with candidate ``i + offset``.

    ``ids`` are those of the anchors and of the candidates. ``stack_ranks`` stacks a
    tensor of every rank, where a rank has some of the anchors and all candidates.
    """

    leave_out: bool
    offset: int
    ids: tuple[Tensor, Tensor] | None
    exclude_above: float | None
    stack_ranks: Callable[[Tensor], Tensor] | None
    matmul: torch.dtype
    differentiable: bool


class _Logits:
    """The (n, M) logits less their constant, strip by strip, as three terms.

    A logit is ``x @ y.T + of_x[:, None] + of_y``, with ``x`` and ``y`` without their
    means. It is −∞ for what is no negative in either direction.
    """

    def __init__(self, x: Tensor, y: Tensor, inv_tau: Tensor, pairs: _Pairs) -> None:
        self.pairs = pairs
        self.own = slice(pairs.offset, pairs.offset + len(x))
        self.mean_x = inv_tau * x.mean(dim=0)
        self.mean_y = y.mean(dim=0)
        if pairs.stack_ranks is not None:  # all have to leave out the same constant
            self.mean_x = pairs.stack_ranks(self.mean_x).mean(dim=0)
        self.x = torch.addcmul(-self.mean_x, inv_tau, x)
        self.y = y - self.mean_y
        self.of_x = self.x @ self.mean_y
        self.of_y = self.y @ self.mean_x
        self.low_x = self.x.to(pairs.matmul)
        self.low_y = self.y.to(pairs.matmul)

        own = (self.x * self.y[self.own]).sum(dim=1)
        self.positives = own.add_(self.of_x).add_(self.of_y[self.own])
        if pairs.stack_ranks is not None:
            placed = torch.zeros_like(self.of_y)
            placed[self.own] = self.positives
            self.positives = pairs.stack_ranks(placed).sum(dim=0)
        self.limits: Tensor | None = None
        if pairs.exclude_above is not None:
            self.limits = self.positives + inv_tau * pairs.exclude_above

        self.strips = blocks(len(x), strip_size(x))
        self.scratch = x.new_empty(self.strips[0].stop, len(y))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of every strip, and its logits."""
        for rows in self.strips:
            yield rows, self._strip(rows)

    def _strip(self, rows: slice) -> Tensor:
        """The logits of some anchors with all candidates; −∞ where the pair is a
        positive or has the same id.
        """
        if self.low_x.dtype == self.x.dtype:
            strip = torch.addmm(self.of_y, self.low_x[rows], self.low_y.T)
        else:
            strip = (self.low_x[rows] @ self.low_y.T).to(self.x.dtype).add_(self.of_y)
        strip += self.of_x[rows, None]
        strip.diagonal(self.pairs.offset + rows.start).fill_(-torch.inf)
        if self.pairs.ids is not None:
            of_anchors, of_candidates = self.pairs.ids
            same = of_anchors[rows, None] == of_candidates[None, :]
            strip.masked_fill_(same, -torch.inf)
        return strip

    def negatives(self, rows: slice, strip: Tensor) -> tuple[Tensor, Tensor]:
        """A strip by rows and by columns, −∞ where it is above the margin of either."""
        if self.limits is None:
            return strip, strip
        above_row = strip > self.limits[self.own][rows, None]
        above_column = strip > self.limits
        return (
            strip.masked_fill(above_row, -torch.inf),
            strip.masked_fill(above_column, -torch.inf),
        )

    def exponentials(self, strip: Tensor, shift: Tensor) -> Tensor:
        """exp(logit − shift) of a strip; the next call writes over it."""
        return exp_(torch.sub(strip, shift, out=self.scratch[: len(strip)]))

    def sums(self, strip: Tensor, dim: int) -> Tensor:
        """(2, …) the highest logit along a dimension, and Σ exp(logit − highest)."""
        highest = strip.amax(dim=dim, keepdim=True)
        # Finite: without a negative an exponential is 0 then, and not NaN.
        highest.clamp_min_(torch.finfo(strip.dtype).min)
        total = self.exponentials(strip, highest).sum(dim=dim)
        return torch.stack([highest.squeeze(dim), total])


Strips = Iterable[tuple[slice, Tensor]]
"""The rows of strips, and their logits."""


class _BothDirections(torch.autograd.Function):
    """The sum of both directions' losses of the own pairs, a mean over them."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, y: Tensor, inv_tau: Tensor, pairs: _Pairs
    ) -> Tensor:
        logits = _Logits(x, y, inv_tau, pairs)
        strips: Strips = logits  # which multiplies them at every reading
        if pairs.differentiable and len(x) * len(y) <= MAX_KEPT:
            strips = list(logits)
        rows, columns = _softmaxes(logits, strips)
        losses = rows.loss + columns.loss[logits.own]
        if pairs.differentiable:
            gradients = _Gradients(logits)
            for own, strip in strips:
                gradients.add(own, _derivatives(logits, own, strip, rows, columns))
            of_scale = gradients.by_log_inv_tau() if ctx.needs_input_grad[2] else None
            ctx.save_for_backward(inv_tau, *gradients.with_means(), of_scale)
        return losses.mean()

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, d_x, d_y, d_log_inv_tau = ctx.saved_tensors
        grad = grad / len(d_x)
        d_inv_tau = None if d_log_inv_tau is None else grad * d_log_inv_tau / inv_tau
        return grad * inv_tau * d_x, grad * d_y, d_inv_tau, None


class _Softmaxes(NamedTuple):
    """Those of the rows, or of the columns, of all logits."""

    shift: Tensor  # of the exponentials: the highest logit
    factor: Tensor  # what makes an entry of P of an exponential
    pull: Tensor  # the derivative of the loss by ℓ
    loss: Tensor


def _softmaxes(logits: _Logits, strips: Strips) -> tuple[_Softmaxes, _Softmaxes]:
    """Softmaxes of rows and columns, from one reading of the logits."""
    of_rows: list[Tensor] = []
    of_columns: Tensor | None = None
    for own, strip in strips:
        by_row, by_column = logits.negatives(own, strip)
        of_rows.append(logits.sums(by_row, dim=1))
        part = logits.sums(by_column, dim=0)
        if of_columns is not None:
            part = _joined(torch.stack([of_columns, part]))
        of_columns = part
    assert of_columns is not None
    if logits.pairs.stack_ranks is not None:
        of_columns = _joined(logits.pairs.stack_ranks(of_columns))

    shift, total = torch.cat([*of_rows, of_columns], dim=1)
    positives = torch.cat([logits.positives[logits.own], logits.positives])
    loob = (shift - positives) + total.log()
    if logits.pairs.leave_out:
        alone = total == 0
        loss = torch.where(alone, 0.0, loob)
        pull = (~alone).to(loob.dtype)
    else:
        loss = -F.logsigmoid(-loob)
        pull = loob.sigmoid()
    # The highest logit adds 1 to a sum, unless that is empty.
    factor = pull / total.clamp_min(1.0)
    n = len(logits.x)
    of_both = (shift, factor, pull, loss)
    rows = _Softmaxes(*(vector[:n] for vector in of_both))
    return rows, _Softmaxes(*(vector[n:] for vector in of_both))


def _joined(sums: Tensor) -> Tensor:
    """(2, M) highest logits and sums of all rows, from (k, 2, M) of k parts of them."""
    highest, totals = sums.unbind(dim=1)
    of_all = highest.amax(dim=0)
    totals = totals * (highest - of_all).exp()
    return torch.stack([of_all, totals.sum(dim=0)])


def _derivatives(
    logits: _Logits, own: slice, strip: Tensor, rows: _Softmaxes, columns: _Softmaxes
) -> Tensor:
    """P: the losses' derivatives by a strip of logits, over which they are written."""
    of_rows, of_columns = logits.negatives(own, strip)
    p = logits.exponentials(of_rows, rows.shift[own, None])
    p.mul_(rows.factor[own, None])
    exp_(of_columns.sub_(columns.shift))
    p.addcmul_(of_columns, columns.factor)
    pull = rows.pull[own] + columns.pull[logits.own][own]
    p.diagonal(logits.pairs.offset + own.start).sub_(pull)
    return p


class _Gradients:
    """Sums over strips of the gradients by τ⁻¹x and by y, without their means'."""

    def __init__(self, logits: _Logits) -> None:
        self.logits = logits
        self.d_x = torch.zeros_like(logits.x)
        self.d_y = torch.zeros_like(logits.y)
        self.by_row = torch.empty_like(logits.of_x)
        self.by_column = torch.zeros_like(logits.of_y)

    def add(self, own: slice, p: Tensor) -> None:
        """Adds a strip of P, the losses' derivatives by its logits."""
        self.by_row[own] = p.sum(dim=1)
        self.by_column += p.sum(dim=0)
        p = p.to(self.logits.pairs.matmul)
        accumulate(self.d_x[own], p, self.logits.low_y)
        accumulate(self.d_y, p.T, self.logits.low_x[own])

    def by_log_inv_tau(self) -> Tensor:
        """The gradient by ln τ⁻¹: Σ P ∘ L, where every term of L is multiplied."""
        logits = self.logits
        of_products = (self.d_x * logits.x).sum()
        of_terms = self.by_row @ logits.of_x + self.by_column @ logits.of_y
        return of_products + of_terms

    def with_means(self) -> tuple[Tensor, Tensor]:
        """Both gradients, with what the means that were left out give."""
        self.d_x.addcmul_(self.by_row[:, None], self.logits.mean_y)
        self.d_y.addcmul_(self.by_column[:, None], self.logits.mean_x)
        return self.d_x, self.d_y


@eager
def softmax_both(
    x: Tensor,
    y: Tensor,
    inv_tau: float | Tensor,
    *,
    contrast: Contrast,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
    matmul: torch.dtype | None = None,
    stack_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """InfoLOOB or InfoNCE of x against y plus that of y against x, in O((n + M)·D)
    memory above ``MAX_KEPT`` logits.

    Args:
        x: (n, D) anchors, those of one rank.
        y: (M, D) candidates, those of all ranks; the pair of anchor i is candidate
            ``i + positive_offset``. Their contrast against the anchors is the other
            direction.
        inv_tau: Inverse temperature τ⁻¹ > 0 of both directions.
        contrast: ``"infoloob"`` or ``"infonce"``.
        positive_offset: As of :func:`cloob.functional.info_loob`, like ``ids``,
            ``candidate_ids`` and ``exclude_above``.
        ids: Of the anchors.
        candidate_ids: Of the candidates.
        exclude_above: A margin.
        matmul: As of :func:`hopfield_retrieval`.
        stack_ranks: Stacks the tensors that all ranks call it with.

    Returns:
        0-d mean over the n pairs of the losses of both their directions.
    """
    x, y = as_rows(x=x, y=y)
    n, m = check_contrast(x, y, positive_offset)
    inv_tau = scalar("inv_tau", inv_tau, x)
    needs_gradient = any(tensor.requires_grad for tensor in (x, y, inv_tau))
    pairs = _Pairs(
        leave_out=contrast == "infoloob",
        offset=positive_offset,
        ids=check_ids(ids, candidate_ids, n, m, x.device),
        exclude_above=exclude_above,
        stack_ranks=stack_ranks,
        matmul=matmul_dtype(matmul, x),
        differentiable=torch.is_grad_enabled() and needs_gradient,
    )
    loss: Tensor = _BothDirections.apply(x, y, inv_tau, pairs)  # type: ignore[no-untyped-call]
    return loss
