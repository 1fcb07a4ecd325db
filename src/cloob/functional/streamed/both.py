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
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.family import Contrast
from cloob.functional.checks import as_rows, scalar
from cloob.functional.private import Context
from cloob.functional.reference import check_contrast
from cloob.functional.streamed.contrast import Options, Settings, read_settings
from cloob.functional.streamed.tiles import (
    accumulate,
    blocks,
    eager,
    exp_,
    first_order,
    strip_size,
)

# Logits that are kept for the gradient: 256 MB. Of more, every strip is multiplied once
# again: 8 N²D operations.
MAX_KEPT = 1 << 26


StackRanks = Callable[[Tensor], Tensor]
"""Stacks the tensors that all ranks call it with; a rank has some of the anchors and
all candidates.
"""
Strips = Iterable[tuple[slice, Tensor]]
"""The anchors of strips of logits, and their logits with all candidates."""


class _Logits:
    """The (n, M) logits less their constant, strip by strip, as three terms.

    A logit is ``x @ y.T + x_term[:, None] + y_term``, with ``x`` and ``y`` without
    their means. It is −∞ for what is no negative in either direction.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        inv_tau: Tensor,
        settings: Settings,
        stack_ranks: StackRanks | None,
    ) -> None:
        self.settings = settings
        self.stack_ranks = stack_ranks
        # the candidates that belong to these anchors
        self.own = slice(settings.offset, settings.offset + len(x))
        self.mean_x = inv_tau * x.mean(dim=0)
        self.mean_y = y.mean(dim=0)
        if stack_ranks is not None:  # all have to leave out the same constant
            self.mean_x = stack_ranks(self.mean_x).mean(dim=0)
        self.x = torch.addcmul(-self.mean_x, inv_tau, x)
        self.y = y - self.mean_y
        self.x_term = self.x @ self.mean_y
        self.y_term = self.y @ self.mean_x
        self.low_x = self.x.to(settings.matmul)
        self.low_y = self.y.to(settings.matmul)

        products = (self.x * self.y[self.own]).sum(dim=1)
        self.positives = products.add_(self.x_term).add_(self.y_term[self.own])
        if stack_ranks is not None:
            placed = torch.zeros_like(self.y_term)
            placed[self.own] = self.positives
            self.positives = stack_ranks(placed).sum(dim=0)
        self.limits: Tensor | None = None
        if settings.exclude_above is not None:
            self.limits = self.positives + inv_tau * settings.exclude_above

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
            strip = torch.addmm(self.y_term, self.low_x[rows], self.low_y.T)
        else:
            strip = (self.low_x[rows] @ self.low_y.T).to(self.x.dtype).add_(self.y_term)
        strip += self.x_term[rows, None]
        strip.diagonal(self.settings.offset + rows.start).fill_(-torch.inf)
        if self.settings.ids is not None:
            of_anchors, of_candidates = self.settings.ids
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


class _BothDirections(torch.autograd.Function):
    """The sum of both directions' losses of the own pairs, a mean over them."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        y: Tensor,
        inv_tau: Tensor,
        settings: Settings,
        stack_ranks: StackRanks | None,
    ) -> Tensor:
        logits = _Logits(x, y, inv_tau, settings, stack_ranks)
        strips: Strips = logits  # which multiplies them at every reading
        if settings.differentiable and len(x) * len(y) <= MAX_KEPT:
            strips = list(logits)
        of_rows, of_columns = _softmaxes(logits, strips)
        losses = of_rows.loss + of_columns.loss[logits.own]
        if settings.differentiable:
            gradients = _Gradients(logits)
            for rows, strip in strips:
                p = _derivatives(logits, rows, strip, of_rows, of_columns)
                gradients.add(rows, p)
            by_scale = gradients.by_log_inv_tau() if ctx.needs_input_grad[2] else None
            ctx.save_for_backward(inv_tau, *gradients.with_means(), by_scale)
        return losses.mean()

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, d_x, d_y, d_log_inv_tau = ctx.saved_tensors
        grad = grad / len(d_x)
        d_inv_tau = None if d_log_inv_tau is None else grad * d_log_inv_tau / inv_tau
        return grad * inv_tau * d_x, grad * d_y, d_inv_tau, None, None


class _Softmaxes(NamedTuple):
    """Those of the rows, or of the columns, of all logits."""

    shift: Tensor  # of the exponentials: the highest logit
    factor: Tensor  # what makes an entry of P of an exponential
    pull: Tensor  # the derivative of the loss by ℓ
    loss: Tensor


def _softmaxes(logits: _Logits, strips: Strips) -> tuple[_Softmaxes, _Softmaxes]:
    """Softmaxes of rows and columns, from one reading of the logits."""
    row_sums: list[Tensor] = []
    column_sums: Tensor | None = None
    for rows, strip in strips:
        by_row, by_column = logits.negatives(rows, strip)
        row_sums.append(logits.sums(by_row, dim=1))
        sums = logits.sums(by_column, dim=0)
        if column_sums is not None:
            sums = _added(torch.stack([column_sums, sums]))
        column_sums = sums
    assert column_sums is not None
    if logits.stack_ranks is not None:
        column_sums = _added(logits.stack_ranks(column_sums))

    shift, total = torch.cat([*row_sums, column_sums], dim=1)
    positives = torch.cat([logits.positives[logits.own], logits.positives])
    loob = (shift - positives) + total.log()
    if logits.settings.leave_out:
        alone = total == 0
        loss = torch.where(alone, 0.0, loob)
        pull = (~alone).to(loob.dtype)
    else:
        loss = -F.logsigmoid(-loob)
        pull = loob.sigmoid()
    # The highest logit adds 1 to a sum, unless that is empty.
    factor = pull / total.clamp_min(1.0)
    n = len(logits.x)
    both = (shift, factor, pull, loss)
    of_rows = _Softmaxes(*(vector[:n] for vector in both))
    return of_rows, _Softmaxes(*(vector[n:] for vector in both))


def _added(sums: Tensor) -> Tensor:
    """(2, M) highest logits and sums of all rows, from (k, 2, M) of k parts of them."""
    highest, totals = sums.unbind(dim=1)
    overall = highest.amax(dim=0)
    totals = totals * (highest - overall).exp()
    return torch.stack([overall, totals.sum(dim=0)])


def _derivatives(
    logits: _Logits,
    rows: slice,
    strip: Tensor,
    of_rows: _Softmaxes,
    of_columns: _Softmaxes,
) -> Tensor:
    """P: the losses' derivatives by a strip of logits, over which they are written."""
    by_row, by_column = logits.negatives(rows, strip)
    p = logits.exponentials(by_row, of_rows.shift[rows, None])
    p.mul_(of_rows.factor[rows, None])
    exp_(by_column.sub_(of_columns.shift))
    p.addcmul_(by_column, of_columns.factor)
    pull = of_rows.pull[rows] + of_columns.pull[logits.own][rows]
    p.diagonal(logits.settings.offset + rows.start).sub_(pull)
    return p


class _Gradients:
    """Sums over strips of the gradients by τ⁻¹x and by y, without their means'."""

    def __init__(self, logits: _Logits) -> None:
        self.logits = logits
        self.d_x = torch.zeros_like(logits.x)
        self.d_y = torch.zeros_like(logits.y)
        self.row_sums = torch.empty_like(logits.x_term)
        self.column_sums = torch.zeros_like(logits.y_term)

    def add(self, rows: slice, p: Tensor) -> None:
        """Adds a strip of P, the losses' derivatives by its logits."""
        self.row_sums[rows] = p.sum(dim=1)
        self.column_sums += p.sum(dim=0)
        p = p.to(self.logits.settings.matmul)
        accumulate(self.d_x[rows], p, self.logits.low_y)
        accumulate(self.d_y, p.T, self.logits.low_x[rows])

    def by_log_inv_tau(self) -> Tensor:
        """The gradient by ln τ⁻¹: Σ P ∘ L, where every term of L is multiplied."""
        logits = self.logits
        of_products = (self.d_x * logits.x).sum()
        of_terms = self.row_sums @ logits.x_term + self.column_sums @ logits.y_term
        return of_products + of_terms

    def with_means(self) -> tuple[Tensor, Tensor]:
        """Both gradients, with what the means that were left out give."""
        self.d_x.addcmul_(self.row_sums[:, None], self.logits.mean_y)
        self.d_y.addcmul_(self.column_sums[:, None], self.logits.mean_x)
        return self.d_x, self.d_y


@eager
def softmax_both(
    x: Tensor,
    y: Tensor,
    inv_tau: float | Tensor,
    *,
    contrast: Contrast,
    stack_ranks: StackRanks | None = None,
    **options: Unpack[Options],
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
        stack_ranks: Stacks the tensors that all ranks call it with.
        **options: ``positive_offset``, ``ids`` (of the anchors), ``candidate_ids`` and
            ``exclude_above`` as of :func:`cloob.functional.info_loob`; ``matmul`` as of
            :func:`hopfield_retrieval`.

    Returns:
        0-d mean over the n pairs of the losses of both their directions.
    """
    x, y = as_rows(x=x, y=y)
    check_contrast(x, y, options.get("positive_offset", 0))
    inv_tau = scalar("inv_tau", inv_tau, x)
    leave_out = contrast == "infoloob"
    settings = read_settings([x, y, inv_tau], leave_out=leave_out, **options)
    loss: Tensor = _BothDirections.apply(x, y, inv_tau, settings, stack_ranks)  # type: ignore[no-untyped-call]
    return loss
