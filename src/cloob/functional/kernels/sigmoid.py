"""SigLIP's sigmoid loss by a kernel: no term knows of the others, so a program's block is finished when it is made."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cloob.functional.checks import outside_autocast
from cloob.functional.kernels import launch
from cloob.functional.kernels.launch import cdiv, check_rows, new_tile, of_product
from cloob.functional.kernels.products import Side, accumulate, product
from cloob.functional.kernels.softmax import Excluded, as_int64, strips, taken
from cloob.functional.streamed import sigmoid
from cloob.functional.streamed.tiles import first_order


@triton.jit
def log1p(u):
    """ln(1 + u) for 0 ≤ u ≤ 1: of a sum with one, a small u would keep few digits."""
    series = u * (1.0 - u * (1.0 / 2 - u * (1.0 / 3 - u * (1.0 / 4))))  # the next term: u⁴ / 5
    return tl.where(u < 0.015625, series, tl.log(1.0 + u))


@triton.jit
def sigmoids(
    anchors,
    candidates,
    scale,
    constant,
    row_ids,
    column_ids,
    tile,
    losses,
    by_row,
    by_column,
    n_rows,
    n_columns,
    d,
    width,
    offset,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    """Block (i, j) of σ(logits), 0 where excluded, its sums by rows and by columns; those of −ln σ(−logits) by rows."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    z = tl.zeros((BLOCK, BLOCK), tl.float32)
    z = product(z, anchors, candidates, i, j, n_rows, n_columns, d, BLOCK, DEPTH, PRECISION, LIFT)
    z = z * tl.load(scale) + tl.load(constant + rows, mask=rows < n_rows, other=0.0)[:, None]
    inside = taken(rows, columns, row_ids, column_ids, offset, n_rows, n_columns, True)
    z = tl.where(inside, z, float("-inf"))  # of which both are 0
    u = tl.exp(-tl.abs(z))  # at most 1
    tl.store(losses + j * n_rows + rows, tl.sum(tl.maximum(z, 0.0) + log1p(u), 1), mask=rows < n_rows)
    p = tl.where(z >= 0, 1.0, u) / (1.0 + u)
    tl.store(by_row + j * n_rows + rows, tl.sum(p, 1), mask=rows < n_rows)
    tl.store(by_column + i * n_columns + columns, tl.sum(p, 0), mask=columns < n_columns)
    if tile is not None:
        there = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        tl.store(tile + rows[:, None].to(tl.int64) * width + columns[None, :], p, mask=there)


class Strip(NamedTuple):
    """σ of a strip's logits (n, m) or None if not asked for, the (n,) losses, and the sums of σ by rows and columns."""

    tile: Tensor | None
    losses: Tensor
    by_row: Tensor
    by_column: Tensor


def strip_of(
    anchors: Tensor, candidates: Tensor, scale: Tensor, constant: Tensor, excluded: Excluded, *, keep: bool
) -> Strip:
    """The strip of (n, D) anchors and (m, D) candidates; logits are ``scale`` · products + (n,) ``constant``."""
    (n, d), m = anchors.shape, len(candidates)
    tile = new_tile(n, m, anchors.dtype, anchors.device) if keep else None
    grid = (cdiv(n, launch.BLOCK), cdiv(m, launch.BLOCK))
    losses, by_row = scale.new_empty(2, grid[1], n)
    by_column = scale.new_empty(grid[0], m)
    offset, *ids = excluded
    arguments = (anchors, candidates, scale, constant, *ids, tile, losses, by_row, by_column, n, m, d)
    width = 0 if tile is None else tile.stride(0)
    launch.run(sigmoids, grid, *arguments, width, offset, **of_product(anchors.dtype))
    return Strip(tile, losses.sum(dim=0), by_row.sum(dim=0), by_column.sum(dim=0))


class _Sigmoid(torch.autograd.Function):
    """The loss and its gradient up to the factor that comes back to it, strip by strip."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: Tensor,
        bias: Tensor,
        offset: int,
        ids: tuple[Tensor, Tensor] | None,
        differentiable: bool,
        matmul: torch.dtype,
    ) -> Tensor:
        check_rows(anchors)
        n, ids = len(anchors), as_int64(ids)
        # Means are kept apart as in the contrast; a sigmoid does not ignore that of the candidates: it comes back with
        # the bias, as a constant of each row.
        mean, common = candidates.mean(dim=0), anchors.mean(dim=0)
        c, own = (candidates - mean).to(matmul).contiguous(), (anchors - common).to(matmul).contiguous()
        a, constant = anchors.to(matmul).contiguous(), inv_tau * (anchors @ mean) + bias
        own_positives = candidates[offset : offset + n] - mean
        positive = inv_tau * (anchors * own_positives).sum(dim=1) + constant
        losses, pull = -F.logsigmoid(positive), -(-positive).sigmoid()  # the loss, and its derivative by the logit
        sides = (anchors, candidates) if differentiable else (anchors[:0], candidates[:0])
        d_anchors, d_candidates = (side.new_zeros(side.shape) for side in sides)
        by_row, by_column = pull.clone(), candidates.new_zeros(len(candidates))
        for rows in strips(anchors, len(candidates)):
            excluded = Excluded(rows.start + offset, *([] if ids is None else [ids[0][rows], ids[1]]))
            p, negatives, of_rows, of_columns = strip_of(
                a[rows], c, inv_tau, constant[rows], excluded, keep=differentiable
            )
            losses[rows] += negatives
            by_row[rows] += of_rows
            by_column += of_columns
            if p is not None:
                accumulate(p, Side(d_anchors[rows], c), Side(d_candidates, own[rows]))
        if differentiable:
            positives = slice(offset, offset + n)
            by_column[positives] += pull
            d_anchors.addcmul_(pull[:, None], own_positives).addcmul_(by_row[:, None], mean)
            d_candidates[positives].addcmul_(pull[:, None], anchors - common)
            d_candidates.addcmul_(by_column[:, None], common)
            # The logits are τ⁻¹ a·c + b: what a gains along itself, τ⁻¹ gains.
            d_inv_tau = (d_anchors * anchors).sum().div_(n)
            scale = inv_tau / n
            ctx.save_for_backward(d_anchors.mul_(scale), d_candidates.mul_(scale), d_inv_tau, by_row.sum().div_(n))
        return losses.mean()

    @staticmethod
    @first_order
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None, None


sigmoid_loss = partial(sigmoid.sigmoid_loss, function=_Sigmoid)
