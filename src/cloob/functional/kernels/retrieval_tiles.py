"""The tiles of retrieval: exponentials on the way forward, and what they pull at on the way back.

Legend: left (n, D) and right (m, D) are the rows of a tile, E = exp(β left · rightᵀ) its numbers. The retrievals are
``norm(E right)`` and ``norm(Eᵀ left)``; :mod:`cloob.functional.streamed` derives why neither needs a denominator and
why T = β E ∘ (G_left rightᵀ + left G_rightᵀ) is all that the gradient needs.

In low precision both sides come without their mean, ``pattern = row + mean``, and what is lost by that is put back in
float32 by vectors: the weight w_j = exp(β row_j · mean of the queries) of each pattern, and the product ``along`` of
each gradient with the mean of the patterns. In float32 the means are zero, the weights one, and nothing changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cloob.functional.kernels import launch
from cloob.functional.kernels.launch import cdiv, new_tile, of_product
from cloob.functional.kernels.products import product


@triton.jit
def exponentials(
    left,
    right,
    left_weight,
    right_weight,
    beta,
    tile,
    by_row,
    by_column,
    n_rows,
    n_columns,
    d,
    width,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    """Block (i, j) of E, its sums with the columns' weights by rows, and with the rows' weights by columns."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    s = tl.zeros((BLOCK, BLOCK), tl.float32)
    s = product(s, left, right, i, j, n_rows, n_columns, d, BLOCK, DEPTH, PRECISION, LIFT)
    e = tl.exp(s * tl.load(beta))
    w_rows = tl.load(left_weight + rows, mask=rows < n_rows, other=0.0)
    w_columns = tl.load(right_weight + columns, mask=columns < n_columns, other=0.0)
    tl.store(by_row + j * n_rows + rows, tl.sum(e * w_columns[None, :], 1), mask=rows < n_rows)
    tl.store(by_column + i * n_columns + columns, tl.sum(e * w_rows[:, None], 0), mask=columns < n_columns)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(tile + rows[:, None] * width + columns[None, :], e, mask=inside)


# Long: three products share the registers of a tile; apart they would be written out and read again.
@triton.jit
def pull(
    left,
    right,
    left_weighted,
    right_weighted,
    left_weight,
    right_weight,
    left_grad,
    right_grad,
    left_along,
    right_along,
    shift,
    beta,
    e_tile,
    t_tile,
    by_row,
    by_column,
    by_program,
    n_rows,
    n_columns,
    d,
    width,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    """Block (i, j) of E and T; the sums of T by rows and by columns; Σ T ∘ S / β, this block's part of β's gradient.

    Without ``right_grad`` only the left side retrieves, with a shift for each row.
    """
    i = tl.program_id(0)
    j = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    w_columns = tl.load(right_weight + columns, mask=columns < n_columns, other=0.0)
    along_rows = tl.load(left_along + rows, mask=rows < n_rows, other=0.0)
    t = zero + along_rows[:, None] * w_columns[None, :]
    t = product(t, left_grad, right_weighted, i, j, n_rows, n_columns, d, BLOCK, DEPTH, PRECISION, LIFT)
    if right_grad is not None:
        w_rows = tl.load(left_weight + rows, mask=rows < n_rows, other=0.0)
        along_columns = tl.load(right_along + columns, mask=columns < n_columns, other=0.0)
        t += w_rows[:, None] * along_columns[None, :]
        t = product(t, left_weighted, right_grad, i, j, n_rows, n_columns, d, BLOCK, DEPTH, PRECISION, LIFT)
    s = product(zero, left, right, i, j, n_rows, n_columns, d, BLOCK, DEPTH, PRECISION, LIFT)
    b = tl.load(beta)
    e = s * b
    if shift is not None:
        e -= tl.load(shift + rows, mask=rows < n_rows, other=0.0)[:, None]
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    e = tl.exp(tl.where(inside, e, float("-inf")))
    at = rows[:, None] * width + columns[None, :]
    tl.store(e_tile + at, e, mask=inside)
    t *= e
    tl.store(by_program + i * tl.num_programs(1) + j, tl.sum(tl.sum(t * s, 1), 0))
    t *= b
    tl.store(t_tile + at, t, mask=inside)
    tl.store(by_row + j * n_rows + rows, tl.sum(t, 1), mask=rows < n_rows)
    tl.store(by_column + i * n_columns + columns, tl.sum(t, 0), mask=columns < n_columns)


class Patterns(NamedTuple):
    """Stored patterns that are queries too; see the module.

    Attributes:
        rows: (N, D) in the dtype to multiply in, contiguous, without the mean.
        weighted: (N, D) likewise, times the weights.
        weight: (N,) float32.
        mean: (D,) float32.
    """

    rows: Tensor
    weighted: Tensor
    weight: Tensor
    mean: Tensor

    def part(self, some: slice) -> Patterns:
        """Some of the patterns."""
        return Patterns(self.rows[some], self.weighted[some], self.weight[some], self.mean)


def patterns(stored: Tensor, queries: Tensor, beta: Tensor, matmul: torch.dtype) -> Patterns:
    """Those of (N, D) rows in float32, for queries of which only the mean is used."""
    if matmul == stored.dtype:
        rows = stored.contiguous()
        return Patterns(rows, rows, torch.ones_like(rows[:, 0]), torch.zeros_like(rows[0]))
    mean = stored.mean(dim=0)
    centred = (stored - mean).contiguous()
    weight = (beta * (centred @ queries.mean(dim=0))).exp_()
    return Patterns(centred.to(matmul), (weight[:, None] * centred).to(matmul), weight, mean)


def exponentials_of(left: Patterns, right: Patterns, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The (n, m) tile of exponentials, and its weighted sums by rows (n,) and by columns (m,)."""
    (n, d), m = left.rows.shape, len(right.rows)
    tile = new_tile(n, m, left.rows.dtype, left.rows.device)
    by_row, by_column = left.weight.new_empty(cdiv(m, launch.BLOCK), n), left.weight.new_empty(cdiv(n, launch.BLOCK), m)
    grid = (len(by_column), len(by_row))
    arguments = (left.rows, right.rows, left.weight, right.weight, beta, tile, by_row, by_column)
    launch.run(exponentials, grid, *arguments, n, m, d, tile.stride(0), **of_product(tile.dtype))
    return tile, by_row.sum(dim=0), by_column.sum(dim=0)


class Gradient(NamedTuple):
    """Of the sums of one side: (N, D) rows in the dtype to multiply in, and their (N,) products with the mean."""

    rows: Tensor
    along: Tensor

    def part(self, some: slice) -> Gradient:
        """Of some of the sums."""
        return Gradient(self.rows[some], self.along[some])


def gradient(of_sums: Tensor, stored: Patterns) -> Gradient:
    """Of (N, D) float32, for the sums of ``stored``."""
    return Gradient(of_sums.to(stored.rows.dtype).contiguous(), of_sums @ stored.mean)


class Pull(NamedTuple):
    """The tiles E and T (n, m), the sums of T by rows (n,) and by columns (m,), and the 0-d gradient of β."""

    e: Tensor
    t: Tensor
    by_row: Tensor
    by_column: Tensor
    beta: Tensor


def pull_of(
    left: Patterns, right: Patterns, of_left: Gradient, of_right: Gradient | None, beta: Tensor, shift: Tensor | None
) -> Pull:
    """What a tile pulls at; with ``of_right`` None only the left side retrieves, and ``shift`` (n,) is its rows'."""
    (n, d), m = left.rows.shape, len(right.rows)
    e, t = (new_tile(n, m, left.rows.dtype, left.rows.device) for _ in range(2))
    by_row, by_column = left.weight.new_empty(cdiv(m, launch.BLOCK), n), left.weight.new_empty(cdiv(n, launch.BLOCK), m)
    grid = (len(by_column), len(by_row))
    by_program = left.weight.new_empty(grid)
    sides = (left.rows, right.rows, left.weighted, right.weighted, left.weight, right.weight)
    right_rows, right_along = (None, None) if of_right is None else of_right
    grads = (of_left.rows, right_rows, of_left.along, right_along)
    arguments = (*sides, *grads, shift, beta, e, t, by_row, by_column, by_program)
    launch.run(pull, grid, *arguments, n, m, d, e.stride(0), **of_product(e.dtype))
    return Pull(e, t, by_row.sum(dim=0), by_column.sum(dim=0), by_program.sum())
