"""The four Hopfield retrievals of a batch, and one retrieval by itself, without an N×M matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cloob.functional.checks import as_rows, check_memory, outside_autocast, positive_scalar
from cloob.functional.reference import Retrieved
from cloob.functional.streamed.tiles import (
    accumulate,
    apply,
    blocks,
    differentiable_once,
    eager,
    matmul_dtype,
    product,
    tile_pairs,
)

# exp(±limit), summed over a million rows, is a normal number of the type.
_UNSHIFTED_LIMIT = {torch.float32: 60.0, torch.float64: 600.0}


def _unit(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and (N, 1) norms of ``sums``, without squaring what may be as large as exp(60)."""
    scale = torch.linalg.vector_norm(sums, torch.inf, dim=1, keepdim=True)
    rows = sums / torch.where(scale > 0, scale, 1.0)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, 1.0)), norms * scale


def _through_unit(grad: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """The gradient of the sums from that of their unit rows; zero where the sum is zero."""
    projected = torch.addcmul(grad, (grad * rows).sum(dim=1, keepdim=True), rows, value=-1)
    return projected.mul_(torch.where(norms > 0, 1 / norms, 0.0))


class _MutualRetrieval(torch.autograd.Function):
    """``norm(E right)`` and ``norm(Eᵀ left)`` from one pass over E = exp(β left rightᵀ).

    With ``right`` None it is ``left``; E is symmetric then, both retrievals are one, and half of the tiles do.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor | None, beta: Tensor, matmul: torch.dtype) -> Any:
        stored = left if right is None else right
        l, r = left.to(matmul), stored.to(matmul)
        sums_l = torch.zeros_like(left)
        sums_r = sums_l if right is None else torch.zeros_like(stored)
        for rows, columns in tile_pairs(left, right):
            e = product(l[rows], r[columns].T, left).mul_(beta).exp_().to(matmul)
            accumulate(sums_l[rows], e, r[columns])
            if right is not None or rows != columns:
                accumulate(sums_r[columns], e.T, l[rows])
        found_l, norms_l = _unit(sums_l)
        found_r, norms_r = (None, None) if right is None else _unit(sums_r)
        ctx.save_for_backward(left, right, beta, found_l, norms_l, found_r, norms_r)
        ctx.matmul = matmul
        return found_l if found_r is None else (found_l, found_r)

    @staticmethod
    @differentiable_once
    @outside_autocast
    def backward(ctx: Any, grad_l: Tensor, *grad_r: Tensor) -> Any:
        left, right, beta, found_l, norms_l, found_r, norms_r = ctx.saved_tensors
        matmul = ctx.matmul
        stored = left if right is None else right
        l, r = left.to(matmul), stored.to(matmul)
        g_l = _through_unit(grad_l, found_l, norms_l).to(matmul)
        g_r = g_l if right is None else _through_unit(grad_r[0], found_r, norms_r).to(matmul)
        d_left = torch.zeros_like(left)
        d_right = d_left if right is None else torch.zeros_like(stored)
        d_beta = torch.zeros_like(beta)
        for rows, columns in tile_pairs(left, right):
            s = product(l[rows], r[columns].T, left)
            e = (beta * s).exp_()
            t = product(g_l[rows], r[columns].T, left)
            accumulate(t, l[rows], g_r[columns].T)
            t.mul_(e)
            if ctx.needs_input_grad[2]:
                # A diagonal tile of a symmetric E holds each pair twice.
                d_beta += (t * s).sum() / (2 if right is None and rows == columns else 1)
            t, e = t.mul_(beta).to(matmul), e.to(matmul)
            accumulate(d_left[rows], t, r[columns])
            accumulate(d_left[rows], e, g_r[columns])
            if right is not None or rows != columns:
                accumulate(d_right[columns], t.T, l[rows])
                accumulate(d_right[columns], e.T, g_l[rows])
        return d_left, None if right is None else d_right, d_beta, None


class _Retrieval(torch.autograd.Function):
    """``norm(E stored)`` alone, with a running row maximum: safe for every β."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, stored: Tensor, beta: Tensor, matmul: torch.dtype) -> Tensor:
        q, m = state.to(matmul), stored.to(matmul)
        sums = torch.zeros_like(state)
        shift = state.new_full((len(state), 1), -torch.inf)
        for rows in blocks(state):
            for columns in blocks(stored):
                s = product(q[rows], m[columns].T, state).mul_(beta)
                highest = torch.maximum(shift[rows], s.amax(dim=1, keepdim=True))
                sums[rows] *= (shift[rows] - highest).exp()
                accumulate(sums[rows], s.sub_(highest).exp_().to(matmul), m[columns])
                shift[rows] = highest
        found, norms = _unit(sums)
        ctx.save_for_backward(state, stored, beta, shift, found, norms)
        ctx.matmul = matmul
        return found

    @staticmethod
    @differentiable_once
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        state, stored, beta, shift, found, norms = ctx.saved_tensors
        matmul = ctx.matmul
        q, m = state.to(matmul), stored.to(matmul)
        g = _through_unit(grad, found, norms).to(matmul)
        d_state, d_stored, d_beta = torch.zeros_like(state), torch.zeros_like(stored), torch.zeros_like(beta)
        for rows in blocks(state):
            for columns in blocks(stored):
                s = product(q[rows], m[columns].T, state)
                e = (beta * s).sub_(shift[rows]).exp_()
                t = product(g[rows], m[columns].T, state).mul_(e)
                if ctx.needs_input_grad[2]:
                    d_beta += (t * s).sum()
                t, e = t.mul_(beta).to(matmul), e.to(matmul)
                accumulate(d_state[rows], t, m[columns])
                accumulate(d_stored[columns], t.T, q[rows])
                accumulate(d_stored[columns], e.T, g[rows])
        return d_state, d_stored, d_beta, None


@eager
@outside_autocast
def hopfield_retrieval(
    state: Tensor, stored: Tensor, beta: float | Tensor, *, matmul: torch.dtype | None = None
) -> Tensor:
    """:func:`cloob.functional.hopfield_retrieval` in O((N + M)·D) memory, for any number of states and any β.

    Args:
        state: (N, D) state (query) patterns.
        stored: (M, D) stored patterns.
        beta: Inverse temperature β > 0.
        matmul: ``torch.bfloat16`` multiplies in bfloat16 with float32 accumulation; None in the dtype of the rows.

    Returns:
        (N, D) unit rows. An average that is exactly zero stays zero, with zero gradient.

    Raises:
        ValueError: As the reference.
    """
    state, stored = as_rows(state=state, stored=stored)
    check_memory(stored)
    beta = positive_scalar("beta", beta, state)
    found: Tensor = apply(_Retrieval, state, stored, beta, matmul_dtype(matmul, state))
    return found


@eager
@outside_autocast
def retrieve(x: Tensor, y: Tensor, beta: float | Tensor, *, matmul: torch.dtype | None = None) -> Retrieved:
    """The four retrievals of a batch that is its own memory (Eq. 4 and 5), sharing what they share.

    Args:
        x: (N, D) image embeddings, queries and stored patterns.
        y: (N, D) text embeddings, likewise.
        beta: Inverse temperature β > 0.
        matmul: As in :func:`hopfield_retrieval`.

    Returns:
        The retrievals, each (N, D) unit rows.

    Raises:
        ValueError: As the reference.
    """
    x, y = as_rows(x=x, y=y)
    beta = positive_scalar("beta", beta, x)
    dtype = matmul_dtype(matmul, x)
    if not _unshifted_is_safe(x, y, beta):
        return Retrieved(*(apply(_Retrieval, q, m, beta, dtype) for m in (x, y) for q in (x, y)))
    v_x, u_y = apply(_MutualRetrieval, x, y, beta, dtype)
    return Retrieved(
        u_x=apply(_MutualRetrieval, x, None, beta, dtype),
        u_y=u_y,
        v_x=v_x,
        v_y=apply(_MutualRetrieval, y, None, beta, dtype),
    )


def _unshifted_is_safe(x: Tensor, y: Tensor, beta: Tensor) -> bool:
    longest = max(float(rows.detach().norm(dim=1).max()) for rows in (x, y))
    return float(beta.detach()) * longest**2 <= _UNSHIFTED_LIMIT[x.dtype]
