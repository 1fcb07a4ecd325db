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
    """The rows of one or two sides, one side above the other, as stored patterns.

    For products in low precision ``rows`` are without their side's mean. ``low`` is
    (N, D) in the dtype to multiply in, or with ``means`` (N, D + 8), of which a column
    of ones counts how often the mean is in a sum, and zeros fill up (one column more
    would be a fifth slower).
    """

    def __init__(self, matmul: torch.dtype, *sides: Tensor) -> None:
        self.matmul = matmul
        self.means: Tensor | None = None  # (sides, 1, D)
        self.rows = self.low = torch.cat(sides)
        if matmul != self.rows.dtype:
            means = [side.mean(dim=0) for side in sides]
            centred = [side - mean for side, mean in zip(sides, means, strict=True)]
            self.means = torch.stack(means)[:, None]
            self.rows = torch.cat(centred)
            self.low = self._widened(self.rows, 1.0)

    def _widened(self, rows: Tensor, column: Tensor | float) -> Tensor:
        """(…, D + 8) in the dtype to multiply in: the rows, a column, and zeros."""
        *shape, d = rows.shape
        wide = rows.new_zeros(*shape, d + 8, dtype=self.matmul)
        wide[..., :d] = rows
        wide[..., d : d + 1] = column
        return wide

    def with_means(self, sums: Tensor) -> Tensor:
        """Sums of patterns from sums of ``low``; both (sides, M, …)."""
        if self.means is None:
            return sums
        d = self.means.shape[-1]
        return torch.addcmul(sums[..., :d], sums[..., d : d + 1], self.means)

    def along(self, grad: Tensor) -> Tensor:
        """The matrices whose products with ``low`` are those of (sides, M, D) gradients
        with the patterns of each side.
        """
        if self.means is None:
            return grad
        return self._widened(grad, grad @ self.means.mT)


class _PairPatterns(_Patterns):
    """Those of a batch of pairs, X above Y, which are the queries as well.

    With means there are ``weights``, (sides, N, 1): exp(β s) for the queries of a side
    without the exponential of the centred product, as far as it differs between
    patterns. ``weighted`` are the patterns for the queries of each side.
    """

    def __init__(self, matmul: torch.dtype, beta: Tensor, x: Tensor, y: Tensor) -> None:
        super().__init__(matmul, x, y)
        self.tiles = tile_pairs(x, y)
        self.width = x.shape[1]
        self.weights: Tensor | None = None
        self.weighted = self.low.expand(2, -1, -1)
        if self.means is not None:
            shared = (self.rows @ self.means[:, 0].T).T[..., None]
            self.weights = (beta * shared).exp_()
            self.weighted = self._widened(self.weights * self.rows, self.weights)

    def products(self, rows: slice, columns: slice) -> Tensor:
        """A tile of the rows' scalar products, of which those in low precision lack
        their means.
        """
        left, right = self.low[rows, : self.width], self.low[columns, : self.width]
        return (left @ right.T).to(self.rows.dtype)


class _PairRetrieval(torch.autograd.Function):
    """The four retrievals of a batch of pairs from one pass over E = exp(β Z Zᵀ), where
    Z is X above Y.

    E is symmetric, so the tiles on and above its diagonal suffice: one of rows of side
    a and columns of side b is part of what a's rows retrieve from b, and of what b's
    rows retrieve from a. In low precision the tile is the exponential of the centred
    products, and E is that times the weight of the pattern, up to a factor of the query
    that normalisation takes away.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, beta: Tensor, matmul: torch.dtype
    ) -> tuple[Tensor, ...]:
        patterns = _PairPatterns(matmul, beta, x, y)
        weighted = patterns.weighted
        # of the patterns of each side, for all queries
        sums = x.new_zeros(2, *patterns.low.shape)
        for (a, rows), (b, columns) in patterns.tiles:
            e = patterns.products(rows, columns).mul_(beta).exp_().to(matmul)
            accumulate(sums[b, rows], e, weighted[a, columns])
            if rows != columns:
                accumulate(sums[a, columns], e.T, weighted[b, rows])
        retrieved, norms = to_unit(patterns.with_means(sums))
        ctx.save_for_backward(x, y, beta, retrieved, norms)
        ctx.matmul = matmul
        n = len(x)
        u, v = retrieved
        return u[:n], u[n:], v[:n], v[n:]

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, beta, retrieved, norms = ctx.saved_tensors
        patterns = _PairPatterns(ctx.matmul, beta, x, y)
        low, weighted, d = patterns.low, patterns.weighted, patterns.width
        of_memories = torch.cat(grads).view_as(retrieved)
        g = patterns.along(through_unit(of_memories, retrieved, norms))
        # What rows gain by each side: through the softmax, and as terms of sums, which
        # are to be multiplied by the weights if there are any.
        d_rows = torch.zeros_like(patterns.rows)
        by_softmax = by_sums = d_rows.expand(2, -1, -1)
        if patterns.weights is not None:
            by_softmax = x.new_zeros(2, *low.shape)
            by_sums = torch.zeros_like(retrieved)
        d_beta = torch.zeros_like(beta)
        for (a, rows), (b, columns) in patterns.tiles:
            s = patterns.products(rows, columns)
            e = (beta * s).exp_()
            t = (g[b, rows] @ weighted[a, columns].T).to(s.dtype)
            accumulate(t, weighted[b, rows], g[a, columns].T)
            t.mul_(e)
            if ctx.needs_input_grad[2]:
                # A tile of the diagonal holds every pair twice.
                d_beta += (t * s).sum() / (2 if rows == columns else 1)
            t, e = t.mul_(beta).to(ctx.matmul), e.to(ctx.matmul)
            accumulate(by_softmax[b, rows], t, low[columns])
            accumulate(by_sums[b, rows], e, g[a, columns, :d])
            if rows != columns:
                accumulate(by_softmax[a, columns], t.T, low[rows])
                accumulate(by_sums[a, columns], e.T, g[b, rows, :d])
        if patterns.means is not None and patterns.weights is not None:
            # What the centred products lack of s; what is constant over a query's
            # patterns adds up to nothing.
            lacking = by_softmax[..., d : d + 1] * patterns.weights.log()
            d_beta += lacking.sum() / beta**2
            for side, mean in enumerate(patterns.means):
                d_rows += by_softmax[side, :, :d]
                d_rows.addcmul_(by_softmax[side, :, d : d + 1], mean)
                d_rows.addcmul_(patterns.weights[side], by_sums[side])
        return d_rows[: len(x)], d_rows[len(x) :], d_beta, None


class _Retrieval(torch.autograd.Function):
    """``norm(E stored)`` alone, with a running row maximum: safe for every β."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, stored: Tensor, beta: Tensor, matmul: torch.dtype
    ) -> Tensor:
        patterns = _Patterns(matmul, stored)
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
        retrieved, norms = to_unit(patterns.with_means(sums[None])[0])
        ctx.save_for_backward(state, stored, beta, shift, retrieved, norms)
        ctx.matmul = matmul
        return retrieved

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        state, stored, beta, shift, retrieved, norms = ctx.saved_tensors
        matmul = ctx.matmul
        patterns = _Patterns(matmul, stored)
        q, m, d = state.to(matmul), patterns.low, state.shape[1]
        g = patterns.along(through_unit(grad, retrieved, norms)[None])[0]
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
    if safe:
        return _PairRetrieval.apply(x, y, beta, dtype)  # type: ignore[no-any-return, no-untyped-call]
    u_x, u_y, v_x, v_y = (
        _Retrieval.apply(q, m, beta, dtype)  # type: ignore[no-untyped-call]
        for m in (x, y)
        for q in (x, y)
    )
    return u_x, u_y, v_x, v_y


def to_unit(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Makes unit rows of (…, N, D) ``sums``, in place and without squaring what may be
    as large as exp(60); gives them and their (…, N, 1) norms.
    """
    # vector_norm of infinite order takes five times as long.
    least, greatest = sums.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(greatest, -least)
    rows = sums.div_(torch.where(scale > 0, scale, 1.0))
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, 1.0)), norms * scale


def through_unit(grad: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """The gradient of the sums from that of their unit rows; zero where the sum is
    zero.
    """
    along_rows = (grad * rows).sum(dim=-1, keepdim=True)
    projected = torch.addcmul(grad, along_rows, rows, value=-1)
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
