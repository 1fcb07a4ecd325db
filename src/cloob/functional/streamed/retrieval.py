"""The four Hopfield retrievals of a batch, and one retrieval by itself, without an N×M
matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cloob.functional.checks import as_rows, scalar
from cloob.functional.streamed.tiles import (
    accumulate,
    blocks,
    eager,
    first_order,
    matmul_dtype,
    tile_pairs,
)


class _Patterns:
    """Stored patterns as they are, or, for products in low precision, without their
    mean.

    ``rows`` are (N, D), or with a mean (N, D + 8): patterns without it, a column of
    ones, which counts how often the mean is in a sum, and zeros (one column more would
    be a fifth slower). With the mean of the queries there is a ``weight``, (N, 1):
    exp(β s) without the exponential of the centred product, as far as it differs
    between patterns. ``low`` and ``weighted`` are rows, and rows times weights, in the
    dtype to multiply in.
    """

    def __init__(
        self,
        stored: Tensor,
        beta: Tensor,
        matmul: torch.dtype,
        queries_mean: Tensor | None = None,
    ) -> None:
        self.rows, self.mean, self.weight = stored, None, None
        if matmul != stored.dtype:
            self.mean = stored.mean(dim=0)
            centred = stored - self.mean
            self.rows = torch.cat(
                [
                    centred,
                    torch.ones_like(centred[:, :1]),
                    centred.new_zeros(len(centred), 7),
                ],
                dim=1,
            )
            if queries_mean is not None:
                self.weight = (beta * (centred @ queries_mean)).exp_()[:, None]
        self.low = self.rows.to(matmul)
        self.weighted = (
            self.low if self.weight is None else (self.weight * self.rows).to(matmul)
        )

    def with_mean(self, sums: Tensor) -> Tensor:
        """(M, D) sums of patterns from sums of ``rows``."""
        if self.mean is None:
            return sums
        d = len(self.mean)
        return torch.addcmul(sums[:, :d], sums[:, d : d + 1], self.mean)

    def along(self, grad: Tensor) -> Tensor:
        """The matrix whose product with ``rows`` is that of an (M, D) gradient with the
        patterns.
        """
        if self.mean is not None:
            grad = torch.cat(
                [grad, (grad @ self.mean)[:, None], grad.new_zeros(len(grad), 7)], dim=1
            )
        return grad.to(self.low.dtype)


def _sides(
    left: Tensor, right: Tensor | None, beta: Tensor, matmul: torch.dtype
) -> tuple[_Patterns, _Patterns]:
    a = _Patterns(left, beta, matmul, (left if right is None else right).mean(dim=0))
    return a, a if right is None else _Patterns(right, beta, matmul, left.mean(dim=0))


class _MutualRetrieval(torch.autograd.Function):
    """``norm(E right)`` and ``norm(Eᵀ left)`` from one pass over E = exp(β left
    rightᵀ).

    With ``right`` None it is ``left``; E is symmetric then, both retrievals are one,
    and half of the tiles suffice. ``e`` is the exponential of the centred product: E_ij
    is e_ij · weight_j for the queries of the left, and e_ij · weight_i for those of the
    right, up to a factor of the query that normalisation takes away.
    """

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor | None, beta: Tensor, matmul: torch.dtype
    ) -> Any:
        a, b = _sides(left, right, beta, matmul)
        d = left.shape[1]
        sums_l = torch.zeros_like(a.rows)
        sums_r = sums_l if right is None else torch.zeros_like(b.rows)
        for rows, columns in tile_pairs(left, right):
            e = (
                (a.low[rows, :d] @ b.low[columns, :d].T)
                .to(left.dtype)
                .mul_(beta)
                .exp_()
                .to(matmul)
            )
            accumulate(sums_l[rows], e, b.weighted[columns])
            if right is not None or rows != columns:
                accumulate(sums_r[columns], e.T, a.weighted[rows])
        retrieved_l, norms_l = to_unit(b.with_mean(sums_l))
        retrieved_r, norms_r = (
            (None, None) if right is None else to_unit(a.with_mean(sums_r))
        )
        ctx.save_for_backward(
            left, right, beta, retrieved_l, norms_l, retrieved_r, norms_r
        )
        ctx.matmul = matmul
        return retrieved_l if retrieved_r is None else (retrieved_l, retrieved_r)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_l: Tensor, *grad_r: Tensor) -> Any:
        left, right, beta, retrieved_l, norms_l, retrieved_r, norms_r = (
            ctx.saved_tensors
        )
        a, b = _sides(left, right, beta, ctx.matmul)
        d = left.shape[1]
        g_l = b.along(through_unit(grad_l, retrieved_l, norms_l))
        g_r = (
            g_l
            if right is None
            else a.along(through_unit(grad_r[0], retrieved_r, norms_r))
        )
        # Through the softmax, and as a term of the sum, to be multiplied by the weights
        # at the end if there are any.
        soft_l = torch.zeros_like(a.rows)
        soft_r = soft_l if right is None else torch.zeros_like(b.rows)
        term_l = soft_l if a.weight is None else torch.zeros_like(left)
        term_r = (
            term_l
            if right is None
            else soft_r
            if b.weight is None
            else torch.zeros_like(right)
        )
        d_beta = torch.zeros_like(beta)
        for rows, columns in tile_pairs(left, right):
            s = (a.low[rows, :d] @ b.low[columns, :d].T).to(left.dtype)
            e = (beta * s).exp_()
            t = (g_l[rows] @ b.weighted[columns].T).to(left.dtype)
            accumulate(t, a.weighted[rows], g_r[columns].T)
            t.mul_(e)
            if ctx.needs_input_grad[2]:
                # A diagonal tile of a symmetric E holds every pair twice.
                d_beta += (t * s).sum() / (
                    2 if right is None and rows == columns else 1
                )
            t, e = t.mul_(beta).to(ctx.matmul), e.to(ctx.matmul)
            accumulate(soft_l[rows], t, b.low[columns])
            accumulate(term_l[rows], e, g_r[columns, :d])
            if right is not None or rows != columns:
                accumulate(soft_r[columns], t.T, a.low[rows])
                accumulate(term_r[columns], e.T, g_l[rows, :d])
        gradients = []
        for side, other, soft, term in ((a, b, soft_l, term_l), (b, a, soft_r, term_r))[
            : 1 if right is None else 2
        ]:
            if side.weight is not None:
                # What the centred product lacks of s; what is constant over a query's
                # patterns adds up to nothing.
                d_beta += (soft[:, d : d + 1] * side.weight.log()).sum() / beta**2
                soft = other.with_mean(soft).addcmul_(side.weight, term)
            gradients.append(soft)
        return gradients[0], None if right is None else gradients[1], d_beta, None


class _Retrieval(torch.autograd.Function):
    """``norm(E stored)`` alone, with a running row maximum: safe for every β."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, stored: Tensor, beta: Tensor, matmul: torch.dtype
    ) -> Tensor:
        patterns = _Patterns(stored, beta, matmul)
        q, m, d = state.to(matmul), patterns.low, state.shape[1]
        sums = state.new_zeros(len(state), m.shape[1])
        shift = state.new_full((len(state), 1), -torch.inf)
        for rows in blocks(state):
            for columns in blocks(stored):
                s = (q[rows] @ m[columns, :d].T).to(state.dtype).mul_(beta)
                highest = torch.maximum(shift[rows], s.amax(dim=1, keepdim=True))
                sums[rows] *= (shift[rows] - highest).exp()
                accumulate(sums[rows], s.sub_(highest).exp_().to(matmul), m[columns])
                shift[rows] = highest
        retrieved, norms = to_unit(patterns.with_mean(sums))
        ctx.save_for_backward(state, stored, beta, shift, retrieved, norms)
        ctx.matmul = matmul
        return retrieved

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        state, stored, beta, shift, retrieved, norms = ctx.saved_tensors
        matmul = ctx.matmul
        patterns = _Patterns(stored, beta, matmul)
        q, m, d = state.to(matmul), patterns.low, state.shape[1]
        g = patterns.along(through_unit(grad, retrieved, norms))
        d_state = torch.zeros_like(state)
        d_stored = torch.zeros_like(stored)
        d_beta = torch.zeros_like(beta)
        for rows in blocks(state):
            for columns in blocks(stored):
                s = (q[rows] @ m[columns, :d].T).to(state.dtype)
                e = (beta * s).sub_(shift[rows]).exp_()
                t = (g[rows] @ m[columns].T).to(state.dtype).mul_(e)
                if ctx.needs_input_grad[2]:
                    d_beta += (t * s).sum()
                t, e = t.mul_(beta).to(matmul), e.to(matmul)
                accumulate(d_state[rows], t, m[columns, :d])
                accumulate(d_stored[columns], t.T, q[rows])
                accumulate(d_stored[columns], e.T, g[rows, :d])
        return d_state, d_stored, d_beta, None


@eager
def hopfield_retrieval(
    state: Tensor,
    stored: Tensor,
    beta: float | Tensor,
    *,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """:func:`cloob.functional.hopfield_retrieval` in O((N + M)·D) memory, for any
    number of states and any β.

    ``matmul=torch.bfloat16`` multiplies in bfloat16 with float32 accumulation; None in
    the dtype of the rows.
    """
    state, stored = as_rows(state=state, stored=stored)
    beta = scalar("beta", beta, state)
    retrieved: Tensor = _Retrieval.apply(
        state, stored, beta, matmul_dtype(matmul, state)
    )  # type: ignore[no-untyped-call]
    return retrieved


@eager
def retrieve(
    x: Tensor,
    y: Tensor,
    beta: float | Tensor,
    *,
    matmul: torch.dtype | None = None,
    beta_of_unit_rows: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`cloob.functional.reference.retrieve`, sharing what the four retrievals
    share.

    With ``beta_of_unit_rows`` nothing is read to choose between the two forms, which
    would wait for a device; an infinite one takes the form that is safe for every β.
    """
    x, y = as_rows(x=x, y=y)
    dtype = matmul_dtype(matmul, x)
    safe = _unshifted_is_safe(x, y, beta, dtype, beta_of_unit_rows)
    beta = scalar("beta", beta, x)
    if not safe:
        u_x, u_y, v_x, v_y = (
            _Retrieval.apply(q, m, beta, dtype)  # type: ignore[no-untyped-call]
            for m in (x, y)
            for q in (x, y)
        )
    else:
        v_x, u_y = _MutualRetrieval.apply(x, y, beta, dtype)  # type: ignore[no-untyped-call]
        u_x, v_y = (_MutualRetrieval.apply(side, None, beta, dtype) for side in (x, y))  # type: ignore[no-untyped-call]
    return u_x, u_y, v_x, v_y


def to_unit(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and (N, 1) norms of (N, D) ``sums``, without squaring what may be as
    large as exp(60).
    """
    scale = torch.linalg.vector_norm(sums, torch.inf, dim=1, keepdim=True)
    rows = sums / torch.where(scale > 0, scale, 1.0)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, 1.0)), norms * scale


def through_unit(grad: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """The gradient of the sums from that of their unit rows; zero where the sum is
    zero.
    """
    projected = torch.addcmul(
        grad, (grad * rows).sum(dim=1, keepdim=True), rows, value=-1
    )
    return projected.mul_(torch.where(norms > 0, 1 / norms, 0.0))


def _unshifted_is_safe(
    x: Tensor,
    y: Tensor,
    beta: float | Tensor,
    matmul: torch.dtype,
    beta_of_unit_rows: float | None,
) -> bool:
    """Whether no exponential leaves the range of the type, also centred, times weights
    and summed.
    """
    low = matmul != x.dtype
    # 1.01 after rounding; centred rows are at most twice as long, their means at most
    # as long
    if beta_of_unit_rows is not None:
        number, longest, centred, mean = beta_of_unit_rows, 1.01, 2.02, 1.01
    else:
        both = [x.detach(), y.detach()]
        means = [rows.mean(dim=0) for rows in both] if low else []
        lengths = [rows.norm(dim=1).max() for rows in both]
        lengths += [
            (rows - m).norm(dim=1).max() for rows, m in zip(both, means, strict=False)
        ]
        lengths += [m.norm() for m in means]
        parts = torch.stack(
            [scalar("beta", beta, x).detach(), *lengths]
        ).tolist()  # waits for the device once
        number = parts[0]
        longest, centred, mean = (max(parts[k : k + 2], default=0.0) for k in (1, 3, 5))
    bound = centred * (max(longest, centred) + mean) if low else longest**2
    # exp(±limit), summed over a million rows, is a normal number; bfloat16 has the
    # range of float32.
    return bool(
        number * bound <= (600.0 if x.dtype == matmul == torch.float64 else 60.0)
    )
