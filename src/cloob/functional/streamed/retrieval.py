"""The four Hopfield retrievals of a batch, and one retrieval by itself, without an N×M
matrix that is larger than a tile.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from cloob.functional.checks import as_rows, scalar
from cloob.functional.private import Context
from cloob.functional.streamed.tiles import (
    accumulate,
    blocks,
    eager,
    exp_,
    first_order,
    matmul_dtype,
    tile_pairs,
    tile_size,
)

Four = tuple[Tensor, Tensor, Tensor, Tensor]
"""U_x, U_y, V_x, V_y: what x and y retrieve from x, and what they retrieve from y."""
# columns beside centred patterns; with one alone products are a fifth slower
FILLED = 8


class _SmallRetrieval(torch.autograd.Function):
    """The four retrievals of few pairs, whose softmax P is kept.

    For the queries Z, X above Y, and the memory M of one side, with P = softmax(β Z Mᵀ)
    and the gradient G of P M:

        T = P ∘ (G Mᵀ),   dZ = β T M,   dM = β Tᵀ Z + Pᵀ G.

    G is orthogonal to P M, so that the rows of T add up to 0, but for a rounding that β
    multiplies: it is taken off.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, y: Tensor, beta: Tensor) -> Four:
        memories = torch.stack([x, y])
        z = memories.flatten(0, 1)
        s = (beta * (z @ z.T)).view(len(z), 2, len(x))
        p = s.softmax(dim=2).transpose(0, 1)  # (memory, query, pattern)
        retrieved, norms = to_unit(p @ memories)
        ctx.save_for_backward(memories, beta, p, retrieved, norms)
        return four_of(retrieved)

    @staticmethod
    @first_order
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        memories, beta, p, retrieved, norms = ctx.saved_tensors
        z = memories.flatten(0, 1)
        g = through_unit(torch.cat(grads).view_as(retrieved), retrieved, norms)
        t = (g @ memories.mT).mul_(p)
        t = t.addcmul_(p, t.sum(dim=2, keepdim=True), value=-1)
        t = t.transpose(0, 1).reshape(len(z), len(z))
        d_beta = (t * (z @ z.T)).sum() if ctx.needs_input_grad[2] else None
        by_softmax = (t + t.T).mul_(beta) @ z
        d_x, d_y = (p.mT @ g).add_(by_softmax.view_as(memories))
        return d_x, d_y, d_beta


class _Patterns:
    """The rows of one or two sides, one side above the other, as stored patterns.

    For products in low precision ``rows`` are without their side's mean. ``low`` is
    (N, D) in the dtype to multiply in, or with ``means`` (N, D + 8), of which a column
    of ones counts how often the mean is in a sum, and zeros fill up.
    """

    def __init__(self, matmul: torch.dtype, *sides: Tensor) -> None:
        self.matmul = matmul
        self.width = sides[0].shape[1]
        self.means: Tensor | None = None  # (sides, 1, D)
        self.rows = torch.cat(sides)
        self.low = self.rows
        if matmul != self.rows.dtype:
            means = [side.mean(dim=0) for side in sides]
            centred = [side - mean for side, mean in zip(sides, means, strict=True)]
            self.means = torch.stack(means)[:, None]
            self.rows = torch.cat(centred)
            self.low = self._widened(self.rows, torch.ones_like(self.rows[:, :1]))

    def _widened(self, rows: Tensor, column: Tensor) -> Tensor:
        """(…, D + 8) in the dtype to multiply in: the rows, a column, and zeros."""
        zeros = rows.new_zeros(*rows.shape[:-1], FILLED - 1)
        return torch.cat([rows, column, zeros], dim=-1).to(self.matmul)

    def with_means(self, sums: Tensor) -> Tensor:
        """Sums of patterns from sums of ``low``; both (sides, M, …)."""
        if self.means is None:
            return sums
        centred, counts = self.apart(sums)
        return torch.addcmul(centred, counts, self.means)

    def apart(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """The D columns of patterns, and the one that counts means."""
        return wide[..., : self.width], wide[..., self.width : self.width + 1]

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
        self.weights: Tensor | None = None
        self.weighted = self.low.expand(2, -1, -1)
        if self.means is not None:
            shared = self.means @ self.rows.T  # (sides, 1, N)
            self.weights = (beta * shared.mT).exp_()
            self.weighted = self._widened(self.weights * self.rows, self.weights)

    def products(self, rows: slice, columns: slice) -> Tensor:
        """A tile of the rows' scalar products, of which those in low precision lack
        their means.
        """
        left = self.low[rows, : self.width]
        right = self.low[columns, : self.width]
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
        ctx: Context, x: Tensor, y: Tensor, beta: Tensor, matmul: torch.dtype
    ) -> Four:
        patterns = _PairPatterns(matmul, beta, x, y)
        weighted = patterns.weighted
        # of the patterns of each side, for all queries
        sums = x.new_zeros(2, *patterns.low.shape)
        for (a, rows), (b, columns) in patterns.tiles:
            e = exp_(patterns.products(rows, columns).mul_(beta)).to(matmul)
            accumulate(sums[b, rows], e, weighted[a, columns])
            if rows != columns:
                accumulate(sums[a, columns], e.T, weighted[b, rows])
        retrieved, norms = to_unit(patterns.with_means(sums))
        ctx.save_for_backward(x, y, beta, retrieved, norms)
        ctx.matmul = matmul
        return four_of(retrieved)

    @staticmethod
    @first_order
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, y, beta, retrieved, norms = ctx.saved_tensors
        patterns = _PairPatterns(ctx.matmul, beta, x, y)
        low = patterns.low
        weighted = patterns.weighted
        g = through_unit(torch.cat(grads).view_as(retrieved), retrieved, norms)
        g = patterns.along(g)
        g_sums = g[..., : patterns.width]
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
            e = exp_(beta * s)
            t = g[b, rows] @ weighted[a, columns].T
            accumulate(t, weighted[b, rows], g[a, columns].T)
            t = t.to(s.dtype).mul_(e)
            if ctx.needs_input_grad[2]:
                # A tile of the diagonal holds every pair twice.
                d_beta += (t * s).sum() / (2 if rows == columns else 1)
            t = t.mul_(beta).to(ctx.matmul)
            e = e.to(ctx.matmul)
            accumulate(by_softmax[b, rows], t, low[columns])
            accumulate(by_sums[b, rows], e, g_sums[a, columns])
            if rows != columns:
                accumulate(by_softmax[a, columns], t.T, low[rows])
                accumulate(by_sums[a, columns], e.T, g_sums[b, rows])
        if patterns.means is not None and patterns.weights is not None:
            centred, counts = patterns.apart(by_softmax)
            # What the centred products lack of s; what is constant over a query's
            # patterns adds up to nothing.
            d_beta += (counts * patterns.weights.log()).sum() / beta**2
            of_sides = torch.addcmul(centred, counts, patterns.means)
            d_rows = of_sides.addcmul_(patterns.weights, by_sums).sum(dim=0)
        return d_rows[: len(x)], d_rows[len(x) :], d_beta, None


class _Retrieval(torch.autograd.Function):
    """``norm(E stored)`` alone, with a running row maximum: safe for every β."""

    @staticmethod
    def forward(
        ctx: Context, state: Tensor, stored: Tensor, beta: Tensor, matmul: torch.dtype
    ) -> Tensor:
        patterns = _Patterns(matmul, stored)
        queries = state.to(matmul)
        memory = patterns.low
        sums = state.new_zeros(len(state), memory.shape[1])
        shift = state.new_full((len(state), 1), -torch.inf)
        for rows, columns in tiles_of(state, stored):
            s = queries[rows] @ patterns.low[columns, : patterns.width].T
            s = s.to(state.dtype).mul_(beta)
            highest = torch.maximum(shift[rows], s.amax(dim=1, keepdim=True))
            sums[rows] *= (shift[rows] - highest).exp()
            e = exp_(s.sub_(highest)).to(matmul)
            accumulate(sums[rows], e, memory[columns])
            shift[rows] = highest
        retrieved, norms = to_unit(patterns.with_means(sums[None])[0])
        ctx.save_for_backward(state, stored, beta, shift, retrieved, norms)
        ctx.matmul = matmul
        return retrieved

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        state, stored, beta, shift, retrieved, norms = ctx.saved_tensors
        patterns = _Patterns(ctx.matmul, stored)
        queries = state.to(ctx.matmul)
        memory = patterns.low
        g = patterns.along(through_unit(grad, retrieved, norms)[None])[0]
        d_state = torch.zeros_like(state)
        d_stored = torch.zeros_like(stored)
        d_beta = torch.zeros_like(beta)
        for rows, columns in tiles_of(state, stored):
            centred = memory[columns, : patterns.width]
            s = (queries[rows] @ centred.T).to(state.dtype)
            e = exp_((beta * s).sub_(shift[rows]))
            t = (g[rows] @ memory[columns].T).to(state.dtype).mul_(e)
            if ctx.needs_input_grad[2]:
                d_beta += (t * s).sum()
            t = t.mul_(beta).to(ctx.matmul)
            e = e.to(ctx.matmul)
            accumulate(d_state[rows], t, centred)
            accumulate(d_stored[columns], t.T, queries[rows])
            accumulate(d_stored[columns], e.T, g[rows, : patterns.width])
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
    dtype = matmul_dtype(matmul, state)
    retrieved: Tensor = _Retrieval.apply(state, stored, beta, dtype)  # type: ignore[no-untyped-call]
    return retrieved


@eager
def retrieve(
    x: Tensor,
    y: Tensor,
    beta: float | Tensor,
    *,
    matmul: torch.dtype | None = None,
    beta_of_unit_rows: float | None = None,
) -> Four:
    """:func:`cloob.functional.reference.retrieve`, sharing what the four retrievals
    share.

    With ``beta_of_unit_rows`` nothing is read to choose between the two forms for many
    pairs, which would wait for a device; an infinite one takes the form that is safe
    for every β.
    """
    x, y = as_rows(x=x, y=y)
    dtype = matmul_dtype(matmul, x)
    number = scalar("beta", beta, x)
    if dtype == x.dtype and len(x) <= tile_size(x) // 2:
        return _SmallRetrieval.apply(x, y, number)  # type: ignore[no-any-return, no-untyped-call]
    if _unshifted_is_safe(x, y, number, dtype, beta_of_unit_rows):
        return _PairRetrieval.apply(x, y, number, dtype)  # type: ignore[no-any-return, no-untyped-call]
    u_x = _Retrieval.apply(x, x, number, dtype)  # type: ignore[no-untyped-call]
    u_y = _Retrieval.apply(y, x, number, dtype)  # type: ignore[no-untyped-call]
    v_x = _Retrieval.apply(x, y, number, dtype)  # type: ignore[no-untyped-call]
    v_y = _Retrieval.apply(y, y, number, dtype)  # type: ignore[no-untyped-call]
    return u_x, u_y, v_x, v_y


def tiles_of(state: Tensor, stored: Tensor) -> list[tuple[slice, slice]]:
    """The tiles of states and stored patterns."""
    size = tile_size(state)
    return list(product(blocks(len(state), size), blocks(len(stored), size)))


def four_of(retrieved: Tensor) -> Four:
    """The (N, D) retrievals of (memories, 2N, D) queries of x above y."""
    u, v = retrieved
    n = u.shape[0] // 2
    return u[:n], u[n:], v[:n], v[n:]


def to_unit(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Makes unit rows of (…, N, D) ``sums``, in place and without squaring what may be
    as large as exp(60); gives them and their (…, N, 1) norms.
    """
    # vector_norm of infinite order, or aminmax, takes five times as long.
    scale = sums.abs().amax(dim=-1, keepdim=True)
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
    beta: Tensor,
    matmul: torch.dtype,
    beta_of_unit_rows: float | None,
) -> bool:
    """Whether no exponential leaves the range of the type, also centred, times weights
    and summed.
    """
    # exp(±limit), summed over a million rows, is a normal number; bfloat16 has the
    # range of float32.
    limit = 600.0 if matmul == torch.float64 else 60.0
    low = matmul != x.dtype
    if beta_of_unit_rows is not None:
        # 1.01 after rounding; centred rows are at most twice as long, their means at
        # most as long
        bound = 2.02 * (2.02 + 1.01) if low else 1.01**2
        return beta_of_unit_rows * bound <= limit
    rows = torch.cat([x, y]).detach()
    longest = rows.norm(dim=1).amax()
    bounds = beta.detach() * longest**2
    if low:
        means = torch.stack([x.detach().mean(dim=0), y.detach().mean(dim=0)])
        centred = torch.cat([x.detach() - means[0], y.detach() - means[1]])
        centre = means.norm(dim=1).amax()
        widest = centred.norm(dim=1).amax()
        bounds = beta.detach() * widest * (torch.maximum(longest, widest) + centre)
    return bool(bounds <= limit)  # waits for the device once
