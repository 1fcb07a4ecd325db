"""The four Hopfield retrievals of a batch, and one retrieval by itself, without an N×M matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cloob.functional.checks import as_rows, scalar
from cloob.functional.reference import Retrieved
from cloob.functional.streamed.tiles import accumulate, apply, blocks, eager, first_order, matmul_dtype, tile_pairs

_UNIT = 1.01  # the longest that unit rows are after rounding in low precision


class _Patterns(NamedTuple):
    """Stored patterns as they are, or, for products in low precision, without what they have in common.

    Embeddings lie in a cone, a narrow one early in training. Low-precision products of patterns that share a mean lose
    what tells them apart; with the mean kept aside, rounding is relative to the difference. ``rows`` are (N, D), or
    with a mean (N, D + 8): patterns without it, a column of ones, which counts how often the mean is in a sum, and
    zeros (a product with one column more would be a fifth slower). ``weight``, (N, 1), is what is left of exp(β s)
    beside the exponential of the centred product: that of a centred pattern's product with the mean of the queries. The
    rest is constant over the patterns, and cancels.
    """

    rows: Tensor
    mean: Tensor | None = None
    weight: Tensor | None = None

    @property
    def weighted(self) -> Tensor:
        """The rows times their weights."""
        return self.rows if self.weight is None else self.weight * self.rows

    def with_mean(self, sums: Tensor) -> Tensor:
        """(M, D) sums of patterns from sums of ``rows``."""
        if self.mean is None:
            return sums
        d = len(self.mean)
        return torch.addcmul(sums[:, :d], sums[:, d : d + 1], self.mean)

    def along(self, grad: Tensor) -> Tensor:
        """What, multiplied with ``rows``, is the product of an (M, D) gradient with the patterns."""
        return grad if self.mean is None else _widened(grad, (grad @ self.mean)[:, None])


def _patterns(stored: Tensor, queries_mean: Tensor, beta: Tensor, matmul: torch.dtype) -> _Patterns:
    if matmul == stored.dtype:
        return _Patterns(stored)
    mean = stored.mean(dim=0)
    centred = stored - mean
    weight = (beta * (centred @ queries_mean)).exp_()[:, None]
    return _Patterns(_widened(centred, torch.ones_like(weight)), mean, weight)


def _widened(matrix: Tensor, column: Tensor) -> Tensor:
    return torch.cat([matrix, column, matrix.new_zeros(len(matrix), 7)], dim=1)


class _MutualRetrieval(torch.autograd.Function):
    """``norm(E right)`` and ``norm(Eᵀ left)`` from one pass over E = exp(β left rightᵀ).

    With ``right`` None it is ``left``; E is symmetric then, both retrievals are one, and half of the tiles do. In the
    tiles stands ``e``, the exponential of the centred product: E_ij is e_ij · weight_j for the queries of the left, and
    e_ij · weight_i for those of the right, up to a factor of the query's that normalisation takes away.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor | None, beta: Tensor, matmul: torch.dtype) -> Any:
        a, b, (l, l_weighted, r, r_weighted) = _sides(left, right, beta, matmul)
        d = left.shape[1]
        sums_l = torch.zeros_like(a.rows)
        sums_r = sums_l if right is None else torch.zeros_like(b.rows)
        for rows, columns in tile_pairs(left, right):
            e = (l[rows, :d] @ r[columns, :d].T).to(left.dtype).mul_(beta).exp_().to(matmul)
            accumulate(sums_l[rows], e, r_weighted[columns])
            if right is not None or rows != columns:
                accumulate(sums_r[columns], e.T, l_weighted[rows])
        retrieved_l, norms_l = to_unit(b.with_mean(sums_l))
        retrieved_r, norms_r = (None, None) if right is None else to_unit(a.with_mean(sums_r))
        ctx.save_for_backward(left, right, beta, retrieved_l, norms_l, retrieved_r, norms_r)
        ctx.matmul = matmul
        return retrieved_l if retrieved_r is None else (retrieved_l, retrieved_r)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_l: Tensor, *grad_r: Tensor) -> Any:
        left, right, beta, retrieved_l, norms_l, retrieved_r, norms_r = ctx.saved_tensors
        matmul = ctx.matmul
        a, b, (l, l_weighted, r, r_weighted) = _sides(left, right, beta, matmul)
        d = left.shape[1]
        g_l = b.along(through_unit(grad_l, retrieved_l, norms_l)).to(matmul)
        g_r = g_l if right is None else a.along(through_unit(grad_r[0], retrieved_r, norms_r)).to(matmul)
        # Through the softmax, and as a term of the sum, which the weights are still to be taken with if there are any.
        soft_l, term_l = _buffers(a)
        soft_r, term_r = (soft_l, term_l) if right is None else _buffers(b)
        d_beta = torch.zeros_like(beta)
        for rows, columns in tile_pairs(left, right):
            s = (l[rows, :d] @ r[columns, :d].T).to(left.dtype)
            e = (beta * s).exp_()
            t = (g_l[rows] @ r_weighted[columns].T).to(left.dtype)
            accumulate(t, l_weighted[rows], g_r[columns].T)
            t.mul_(e)
            if ctx.needs_input_grad[2]:
                # A diagonal tile of a symmetric E holds each pair twice.
                d_beta += (t * s).sum() / (2 if right is None and rows == columns else 1)
            t, e = t.mul_(beta).to(matmul), e.to(matmul)
            accumulate(soft_l[rows], t, r[columns])
            accumulate(term_l[rows], e, g_r[columns, :d])
            if right is not None or rows != columns:
                accumulate(soft_r[columns], t.T, l[rows])
                accumulate(term_r[columns], e.T, g_l[rows, :d])
        if ctx.needs_input_grad[2]:
            # What the centred product lacks of s; what is constant over a query's patterns adds up to nothing.
            for patterns, soft in ((a, soft_l), (b, soft_r))[: 1 if right is None else 2]:
                if patterns.weight is not None:
                    d_beta += (soft[:, d : d + 1] * patterns.weight.log()).sum() / beta**2
        d_left = _gradient(a, b, soft_l, term_l)
        return d_left, None if right is None else _gradient(b, a, soft_r, term_r), d_beta, None


def _sides(
    left: Tensor, right: Tensor | None, beta: Tensor, matmul: torch.dtype
) -> tuple[_Patterns, _Patterns, list[Tensor]]:
    """The patterns of both sides, and of each the rows and the weighted rows in the dtype to multiply in."""
    a = _patterns(left, (left if right is None else right).mean(dim=0), beta, matmul)
    b = a if right is None else _patterns(right, left.mean(dim=0), beta, matmul)
    left_rows = [a.rows.to(matmul), a.weighted.to(matmul)]
    return a, b, left_rows + (left_rows if right is None else [b.rows.to(matmul), b.weighted.to(matmul)])


def _buffers(patterns: _Patterns) -> tuple[Tensor, Tensor]:
    """Zeros for the two parts of a side's gradient; one buffer for both where no weights keep them apart."""
    soft = torch.zeros_like(patterns.rows)
    return soft, soft if patterns.mean is None else soft.new_zeros(len(soft), len(patterns.mean))


def _gradient(patterns: _Patterns, others: _Patterns, soft: Tensor, term: Tensor) -> Tensor:
    return soft if patterns.weight is None else others.with_mean(soft).addcmul_(patterns.weight, term)


class _Retrieval(torch.autograd.Function):
    """``norm(E stored)`` alone, with a running row maximum: safe for every β."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, stored: Tensor, beta: Tensor, matmul: torch.dtype) -> Tensor:
        patterns = _patterns(stored, torch.zeros_like(stored[0]), beta, matmul)
        q, m, d = state.to(matmul), patterns.rows.to(matmul), state.shape[1]
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
        patterns = _patterns(stored, torch.zeros_like(stored[0]), beta, matmul)
        q, m, d = state.to(matmul), patterns.rows.to(matmul), state.shape[1]
        g = patterns.along(through_unit(grad, retrieved, norms)).to(matmul)
        d_state, d_stored, d_beta = torch.zeros_like(state), torch.zeros_like(stored), torch.zeros_like(beta)
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
    state: Tensor, stored: Tensor, beta: float | Tensor, *, matmul: torch.dtype | None = None
) -> Tensor:
    """:func:`cloob.functional.hopfield_retrieval` in O((N + M)·D) memory, for any number of states and any β.

    ``matmul=torch.bfloat16`` multiplies in bfloat16 with float32 accumulation; None in the dtype of the rows.
    """
    state, stored = as_rows(state=state, stored=stored)
    beta = scalar("beta", beta, state)
    retrieved: Tensor = apply(_Retrieval, state, stored, beta, matmul_dtype(matmul, state))
    return retrieved


@eager
def retrieve(
    x: Tensor, y: Tensor, beta: float | Tensor, *, matmul: torch.dtype | None = None, unit_rows: bool = False
) -> Retrieved:
    """The four retrievals of a batch that is its own memory (Eq. 4 and 5), sharing what they share.

    With ``unit_rows`` the rows are known to be of unit length. Then nothing is read to choose between the two forms,
    which would wait for a device; a β that is a tensor takes the one that is safe for every β.
    """
    x, y = as_rows(x=x, y=y)
    number, beta = beta, scalar("beta", beta, x)
    dtype = matmul_dtype(matmul, x)
    safe = safe_for_unit_rows(number, x.dtype, dtype) if unit_rows else unshifted_is_safe(x, y, beta, dtype)
    if not safe:
        return Retrieved(*(apply(_Retrieval, q, m, beta, dtype) for m in (x, y) for q in (x, y)))
    v_x, u_y = apply(_MutualRetrieval, x, y, beta, dtype)
    return Retrieved(
        u_x=apply(_MutualRetrieval, x, None, beta, dtype),
        u_y=u_y,
        v_x=v_x,
        v_y=apply(_MutualRetrieval, y, None, beta, dtype),
    )


def to_unit(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and (N, 1) norms of (N, D) ``sums``, without squaring what may be as large as exp(60)."""
    scale = torch.linalg.vector_norm(sums, torch.inf, dim=1, keepdim=True)
    rows = sums / torch.where(scale > 0, scale, 1.0)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, 1.0)), norms * scale


def through_unit(grad: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """The gradient of the sums from that of their unit rows; zero where the sum is zero."""
    projected = torch.addcmul(grad, (grad * rows).sum(dim=1, keepdim=True), rows, value=-1)
    return projected.mul_(torch.where(norms > 0, 1 / norms, 0.0))


def unshifted_is_safe(x: Tensor, y: Tensor, beta: Tensor, matmul: torch.dtype) -> bool:
    """Whether no exponential leaves the range of the type: not of a centred product, nor times weights and summed."""
    both = [x.detach(), y.detach()]
    parts = [beta.detach(), *(rows.norm(dim=1).max() for rows in both)]
    if matmul != x.dtype:
        means = [rows.mean(dim=0) for rows in both]
        parts += [(rows - mean).norm(dim=1).max() for rows, mean in zip(both, means, strict=True)]
        parts += [mean.norm() for mean in means]
    number, *lengths = torch.stack(parts).tolist()  # waits for the device once
    longest, centred, mean_length = (max(lengths[k : k + 2], default=0.0) for k in (0, 2, 4))
    bound = longest**2 if matmul == x.dtype else centred * (max(longest, centred) + mean_length)
    return bool(number * bound <= _unshifted_limit(x.dtype, matmul))


def safe_for_unit_rows(beta: float | Tensor, dtype: torch.dtype, matmul: torch.dtype) -> bool:
    """The same of rows of unit length, without a look at them or at a tensor; so a β that is one is not safe."""
    # Centred rows are at most twice as long, their means at most as long.
    bound = _UNIT**2 if matmul == dtype else 2 * _UNIT * (2 * _UNIT + _UNIT)
    return not isinstance(beta, Tensor) and beta * bound <= _unshifted_limit(dtype, matmul)


def _unshifted_limit(dtype: torch.dtype, matmul: torch.dtype) -> float:
    """That exp(±limit), summed over a million rows, is a normal number; bfloat16 has the range of float32."""
    return 600.0 if dtype == matmul == torch.float64 else 60.0
