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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.functional.checks import as_rows, check_ids, scalar
from cloob.functional.private import Context
from cloob.functional.reference import check_contrast
from cloob.functional.streamed.tiles import (
    Options,
    accumulate,
    blocks,
    eager,
    first_order,
    matmul_dtype,
    strip_size,
)

# Logits that are kept for the gradient: 256 MB. Of more, every strip is multiplied once
# again: 8 N²D operations.
MAX_KEPT = 1 << 26


class RankOptions(Options, total=False):
    """Those of a contrast whose candidates come from several ranks."""

    stack_ranks: Callable[[Tensor], Tensor] | None


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
        self._keeps = pairs.differentiable and len(x) * len(y) <= MAX_KEPT
        self._kept: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of every strip, and its logits."""
        for place, rows in enumerate(self.strips):
            if place < len(self._kept):
                yield rows, self._kept[place]
                continue
            strip = self._strip(rows)
            if self._keeps:
                self._kept.append(strip)
            yield rows, strip

    def _strip(self, rows: slice) -> Tensor:
        """The scores of some anchors with all candidates; −inf where the pair is a
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
        return torch.sub(strip, shift, out=self.scratch[: len(strip)]).exp_()


class _BothDirections(torch.autograd.Function):
    """The sum of both directions' losses of the own pairs, a mean over them."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, y: Tensor, inv_tau: Tensor, pairs: _Pairs
    ) -> Tensor:
        logits = _Logits(x, y, inv_tau, pairs)
        rows, columns = _softmaxes(logits)
        losses = rows.losses + columns.losses[logits.own]
        if pairs.differentiable:
            gradients = _gradients(logits, rows, columns, ctx.needs_input_grad[2])
            ctx.save_for_backward(inv_tau, *gradients)
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

    shifts: Tensor  # of the exponentials: the highest logit
    factors: Tensor  # what makes an entry of P of an exponential
    pull: Tensor  # the derivative of the loss by ℓ
    losses: Tensor


def _softmaxes(logits: _Logits) -> tuple[_Softmaxes, _Softmaxes]:
    """Softmaxes of rows and columns, from one reading of the logits."""
    n, m = len(logits.x), len(logits.y)
    # Finite: without a negative an exponential is 0 then, and not NaN.
    shifts = logits.x.new_full((n + m,), torch.finfo(logits.x.dtype).min)
    totals = logits.x.new_zeros(n + m)
    row_shifts, column_shifts = shifts[:n], shifts[n:]
    row_totals, column_totals = totals[:n], totals[n:]
    for own, strip in logits:
        by_row, by_column = logits.negatives(own, strip)
        highest = torch.maximum(row_shifts[own], by_row.amax(dim=1))
        row_shifts[own] = highest
        row_totals[own] = logits.exponentials(by_row, highest[:, None]).sum(dim=1)

        highest = torch.maximum(column_shifts, by_column.amax(dim=0))
        column_totals *= (column_shifts - highest).exp_()
        column_totals += logits.exponentials(by_column, highest).sum(dim=0)
        column_shifts.copy_(highest)
    if logits.pairs.stack_ranks is not None:
        both = logits.pairs.stack_ranks(torch.stack([column_shifts, column_totals]))
        of_ranks, totals_of_ranks = both.unbind(dim=1)
        column_shifts.copy_(of_ranks.amax(dim=0))
        totals_of_ranks *= (of_ranks - column_shifts).exp_()
        column_totals.copy_(totals_of_ranks.sum(dim=0))

    positives = torch.cat([logits.positives[logits.own], logits.positives])
    loob = (shifts - positives) + totals.log()
    if logits.pairs.leave_out:
        alone = totals == 0
        losses = torch.where(alone, 0.0, loob)
        pull = (~alone).to(loob.dtype)
    else:
        losses = -F.logsigmoid(-loob)
        pull = loob.sigmoid()
    # The highest logit adds 1 to a sum, unless that is empty.
    factors = pull / totals.clamp_min(1.0)
    rows = _Softmaxes(shifts[:n], factors[:n], pull[:n], losses[:n])
    columns = _Softmaxes(shifts[n:], factors[n:], pull[n:], losses[n:])
    return rows, columns


def _gradients(
    logits: _Logits, rows: _Softmaxes, columns: _Softmaxes, learns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients by τ⁻¹x, by y and, if it ``learns``, by ln τ⁻¹ of the sum of the
    losses; they overwrite the logits.
    """
    pairs = logits.pairs
    d_x = torch.zeros_like(logits.x)
    d_y = torch.zeros_like(logits.y)
    by_row = torch.empty_like(logits.of_x)
    by_column = torch.zeros_like(logits.of_y)
    pull = rows.pull + columns.pull[logits.own]
    for own, strip in logits:
        of_rows, of_columns = logits.negatives(own, strip)
        p = logits.exponentials(of_rows, rows.shifts[own, None])
        p.mul_(rows.factors[own, None])
        p.addcmul_(of_columns.sub_(columns.shifts).exp_(), columns.factors)
        p.diagonal(pairs.offset + own.start).sub_(pull[own])
        by_row[own] = p.sum(dim=1)
        by_column += p.sum(dim=0)
        p = p.to(pairs.matmul)
        accumulate(d_x[own], p, logits.low_y)
        accumulate(d_y, p.T, logits.low_x[own])
    d_log_inv_tau: Tensor | None = None
    if learns:
        d_log_inv_tau = (d_x * logits.x).sum()
        d_log_inv_tau += by_row @ logits.of_x + by_column @ logits.of_y
    d_x.addcmul_(by_row[:, None], logits.mean_y)
    d_y.addcmul_(by_column[:, None], logits.mean_x)
    return d_x, d_y, d_log_inv_tau


@eager
def _both(
    x: Tensor,
    y: Tensor,
    inv_tau: float | Tensor,
    *,
    leave_out: bool,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
    matmul: torch.dtype | None = None,
    stack_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The sum of both directions of a contrast, in tiles, after its arguments are
    checked.
    """
    x, y = as_rows(x=x, y=y)
    n, m = check_contrast(x, y, positive_offset)
    inv_tau = scalar("inv_tau", inv_tau, x)
    needs_gradient = any(tensor.requires_grad for tensor in (x, y, inv_tau))
    pairs = _Pairs(
        leave_out=leave_out,
        offset=positive_offset,
        ids=check_ids(ids, candidate_ids, n, m, x.device),
        exclude_above=exclude_above,
        stack_ranks=stack_ranks,
        matmul=matmul_dtype(matmul, x),
        differentiable=torch.is_grad_enabled() and needs_gradient,
    )
    loss: Tensor = _BothDirections.apply(x, y, inv_tau, pairs)  # type: ignore[no-untyped-call]
    return loss


def info_loob_both(
    x: Tensor, y: Tensor, inv_tau: float | Tensor, **options: Unpack[RankOptions]
) -> Tensor:
    """InfoLOOB of x against y plus that of y against x, in O((n + M)·D) memory above
    ``MAX_KEPT`` logits.

    Args:
        x: (n, D) anchors, those of one rank.
        y: (M, D) candidates, those of all ranks; the pair of anchor i is candidate
            ``i + positive_offset``. Their contrast against the anchors is the other
            direction.
        inv_tau: Inverse temperature τ⁻¹ > 0 of both directions.
        **options: As of :func:`cloob.functional.info_loob`; ``matmul`` as of
            :func:`hopfield_retrieval`; ``stack_ranks``, which stacks the tensors that
            all ranks call it with.

    Returns:
        0-d mean over the n pairs of the losses of both their directions.
    """
    return _both(x, y, inv_tau, leave_out=True, **options)


def info_nce_both(
    x: Tensor, y: Tensor, inv_tau: float | Tensor, **options: Unpack[RankOptions]
) -> Tensor:
    """InfoNCE of both directions likewise."""
    return _both(x, y, inv_tau, leave_out=False, **options)
