"""The four Hopfield retrievals of a batch, and one retrieval by itself, by kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cloob.functional.checks import outside_autocast
from cloob.functional.kernels.launch import check_rows
from cloob.functional.kernels.products import Side, accumulate
from cloob.functional.kernels.retrieval_tiles import Patterns, exponentials_of, gradient, patterns, pull_of
from cloob.functional.kernels.softmax import rescaled, strip_of, strips
from cloob.functional.streamed import retrieval
from cloob.functional.streamed.sums import through_unit, to_unit
from cloob.functional.streamed.tiles import blocks, first_order, tile_pairs


class _MutualRetrieval(torch.autograd.Function):
    """``norm(E right)`` and ``norm(Eᵀ left)`` from one pass over E = exp(β left rightᵀ).

    With ``right`` None it is ``left``; E is symmetric then, both retrievals are one, and half of the tiles do.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor | None, beta: Tensor, matmul: torch.dtype) -> Any:
        check_rows(left)
        a = patterns(left, left if right is None else right, beta, matmul)
        b = a if right is None else patterns(right, left, beta, matmul)
        sums_l, counts_l = _buffers(left)
        sums_r, counts_r = (sums_l, counts_l) if right is None else _buffers(right)
        for rows, columns in tile_pairs(left, right):
            both = right is not None or rows != columns
            e, by_row, by_column = exponentials_of(a.part(rows), b.part(columns), beta)
            to_right = Side(sums_r[columns], a.weighted[rows]) if both else None
            accumulate(e, Side(sums_l[rows], b.weighted[columns]), to_right)
            counts_l[rows] += by_row
            if both:
                counts_r[columns] += by_column
        retrieved_l, norms_l = to_unit(sums_l.addcmul_(counts_l[:, None], b.mean))
        retrieved_r, norms_r = None, None
        if right is not None:
            retrieved_r, norms_r = to_unit(sums_r.addcmul_(counts_r[:, None], a.mean))
        ctx.save_for_backward(left, right, beta, retrieved_l, norms_l, retrieved_r, norms_r)
        ctx.matmul = matmul
        return retrieved_l if retrieved_r is None else (retrieved_l, retrieved_r)

    @staticmethod
    @first_order
    @outside_autocast
    def backward(ctx: Any, grad_l: Tensor, *grad_r: Tensor) -> Any:
        left, right, beta, retrieved_l, norms_l, retrieved_r, norms_r = ctx.saved_tensors
        a = patterns(left, left if right is None else right, beta, ctx.matmul)
        b = a if right is None else patterns(right, left, beta, ctx.matmul)
        g_l = gradient(through_unit(grad_l, retrieved_l, norms_l), b)
        g_r = g_l if right is None else gradient(through_unit(grad_r[0], retrieved_r, norms_r), a)
        d_left, counts_l = _buffers(left)
        d_right, counts_r = (d_left, counts_l) if right is None else _buffers(right)
        d_beta = torch.zeros_like(beta)
        for rows, columns in tile_pairs(left, right):
            both = right is not None or rows != columns
            tile_a, tile_b, tile_l, tile_r = a.part(rows), b.part(columns), g_l.part(rows), g_r.part(columns)
            e, t, by_row, by_column, of_beta = pull_of(tile_a, tile_b, tile_l, tile_r, beta, None)
            # A diagonal tile of a symmetric E holds each pair twice.
            d_beta += of_beta if both else of_beta / 2
            to_left = Side(d_left[rows], tile_b.rows, tile_r.rows, tile_a.weight)
            to_right = Side(d_right[columns], tile_a.rows, tile_l.rows, tile_b.weight) if both else None
            accumulate(t, to_left, to_right, e)
            counts_l[rows] += by_row
            if both:
                counts_r[columns] += by_column
        # What the product without means lacks of s; what is constant over a query's patterns adds up to nothing.
        d_beta += (counts_l * a.weight.log()).sum() / beta**2
        d_left.addcmul_(counts_l[:, None], b.mean)
        if right is not None:
            d_beta += (counts_r * b.weight.log()).sum() / beta**2
            d_right.addcmul_(counts_r[:, None], a.mean)
        return d_left, None if right is None else d_right, d_beta, None


class _Retrieval(torch.autograd.Function):
    """``norm(E stored)`` alone, with the maximum of each row taken off: safe for every β."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, stored: Tensor, beta: Tensor, matmul: torch.dtype) -> Tensor:
        check_rows(state)
        memory = patterns(stored, torch.zeros_like(stored[:1]), beta, matmul)
        queries = state.to(matmul).contiguous()
        sums, counts = _buffers(state)
        shift = torch.empty_like(counts)
        for rows in strips(state, len(stored)):
            e, highest, total = strip_of(queries[rows], memory.rows, beta)
            assert e is not None
            shift[rows] = highest.amax(dim=1)
            factor = (highest - shift[rows, None]).exp_()
            rescaled(e, factor)
            accumulate(e, Side(sums[rows], memory.rows), None)
            counts[rows] = (factor * total).sum(dim=1)
        retrieved, norms = to_unit(sums.addcmul_(counts[:, None], memory.mean))
        ctx.save_for_backward(state, stored, beta, shift, retrieved, norms)
        ctx.matmul = matmul
        return retrieved

    @staticmethod
    @first_order
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        state, stored, beta, shift, retrieved, norms = ctx.saved_tensors
        memory = patterns(stored, torch.zeros_like(stored[:1]), beta, ctx.matmul)
        q = state.to(ctx.matmul).contiguous()
        queries = Patterns(q, q, torch.ones_like(shift), torch.zeros_like(memory.mean))
        g = gradient(through_unit(grad, retrieved, norms), memory)
        (d_state, _), (d_stored, _), d_beta = _buffers(state), _buffers(stored), torch.zeros_like(beta)
        for rows in blocks(state):
            for columns in blocks(stored):
                own, tile = queries.part(rows), memory.part(columns)
                e, t, _, _, of_beta = pull_of(own, tile, g.part(rows), None, beta, shift[rows])
                d_beta += of_beta
                to_stored = Side(d_stored[columns], own.rows, g.rows[rows], tile.weight)
                accumulate(t, Side(d_state[rows], tile.rows), to_stored, e)
        return d_state, d_stored, d_beta, None


def _buffers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) and (N,) zeros."""
    return rows.new_zeros(rows.shape), rows.new_zeros(len(rows))


hopfield_retrieval = partial(retrieval.hopfield_retrieval, function=_Retrieval)
retrieve = partial(retrieval.retrieve, mutual=_MutualRetrieval, single=_Retrieval)
