"""The two matrix products that everything here is made of, and the kernel of the second.

Legend: a tile has n rows (the left side's, or anchors) and m columns (the right side's, or candidates); D is the
embedding dimension, also written d.

- ``product``: left · rightᵀ, from (n, D) and (m, D) to n × m numbers, 2nmD operations. It is the inside of every kernel
  that makes a tile; what becomes of the numbers, the exponential above all, happens while they are still in registers.
- ``both_sides``: a finished tile of weights times the vectors of its columns, added to a sum for each row, and its
  transpose times those of its rows, added to a sum for each column: 4nmD operations, one launch. The tile is read by
  D / BLOCK programs a side, from the L2 cache as long as it fits there.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cloob.functional.kernels import launch
from cloob.functional.kernels.launch import cdiv, of_product


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, LIFT: tl.constexpr):
    """``total + a @ b``, summed in float32; the interpreter knows no bfloat16, there it is lifted first."""
    if LIFT:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product(
    total,
    left,
    right,
    i,
    j,
    n_rows,
    n_columns,
    d,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    """``total`` plus block (i, j) of left · rightᵀ."""
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    left_at = left + rows[:, None].to(tl.int64) * d + depth[None, :]
    right_at = right + columns[None, :].to(tl.int64) * d + depth[:, None]
    for start in range(0, d, DEPTH):
        within = depth < d - start
        a = tl.load(left_at, mask=(rows < n_rows)[:, None] & within[None, :], other=0.0)
        b = tl.load(right_at, mask=within[:, None] & (columns < n_columns)[None, :], other=0.0)
        total = multiply(a, b, total, PRECISION, LIFT)
        left_at += DEPTH
        right_at += DEPTH
    return total


@triton.jit
def _weighted_sum(
    total,
    weights,
    vectors,
    i,
    k,
    n_sums,
    n_vectors,
    d,
    down,
    along,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    """``total`` plus block (i, k) of weights · vectors; the weights' strides are ``down`` and ``along``."""
    sums = i * BLOCK + tl.arange(0, BLOCK)
    dims = k * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    weights_at = weights + sums[:, None].to(tl.int64) * down + depth[None, :].to(tl.int64) * along
    vectors_at = vectors + depth[:, None].to(tl.int64) * d + dims[None, :]
    for start in range(0, n_vectors, DEPTH):
        within = depth < n_vectors - start
        a = tl.load(weights_at, mask=(sums < n_sums)[:, None] & within[None, :], other=0.0)
        b = tl.load(vectors_at, mask=within[:, None] & (dims < d)[None, :], other=0.0)
        total = multiply(a, b, total, PRECISION, LIFT)
        weights_at += DEPTH * along
        vectors_at += DEPTH * d
    return total


@triton.jit
def _one_side(
    out,
    weights,
    vectors,
    term_weights,
    terms,
    factor,
    program,
    n_sums,
    n_vectors,
    d,
    down,
    along,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    across = tl.cdiv(d, BLOCK)
    i = program // across
    k = program % across
    sums = i * BLOCK + tl.arange(0, BLOCK)
    dims = k * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    if terms is not None:
        total = _weighted_sum(
            total, term_weights, terms, i, k, n_sums, n_vectors, d, down, along, BLOCK, DEPTH, PRECISION, LIFT
        )
        total *= tl.load(factor + sums, mask=sums < n_sums, other=0.0)[:, None]
    total = _weighted_sum(
        total, weights, vectors, i, k, n_sums, n_vectors, d, down, along, BLOCK, DEPTH, PRECISION, LIFT
    )
    at = out + sums[:, None].to(tl.int64) * d + dims[None, :]
    inside = (sums < n_sums)[:, None] & (dims < d)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def both_sides(
    left_out,
    left_vectors,
    left_terms,
    left_factor,
    right_out,
    right_vectors,
    right_terms,
    right_factor,
    weights,
    term_weights,
    n_rows,
    n_columns,
    d,
    width,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    """Adds a tile times vectors to the sums of its rows, and of its columns; the left side's programs come first."""
    program = tl.program_id(0)
    of_left = tl.cdiv(n_rows, BLOCK) * tl.cdiv(d, BLOCK)
    if program < of_left:
        _one_side(
            left_out, weights, left_vectors, term_weights, left_terms, left_factor, program,
            n_rows, n_columns, d, width, 1, BLOCK, DEPTH, PRECISION, LIFT,
        )  # fmt: skip
    else:
        _one_side(
            right_out, weights, right_vectors, term_weights, right_terms, right_factor, program - of_left,
            n_columns, n_rows, d, 1, width, BLOCK, DEPTH, PRECISION, LIFT,
        )  # fmt: skip


class Side(NamedTuple):
    """What a tile is multiplied with for the sums of its rows (the left side) or columns (the right side).

    Attributes:
        sums: (N, D) float32, contiguous; added to in place.
        vectors: (M, D) in the tile's dtype, one for each column (or row) of the tile, contiguous.
        terms: (M, D) likewise, to be multiplied with the second tile, or None.
        factor: (N,) float32 that the sum of the terms is multiplied with.
    """

    sums: Tensor
    vectors: Tensor
    terms: Tensor | None = None
    factor: Tensor | None = None


def accumulate(weights: Tensor, left: Side, right: Side | None, term_weights: Tensor | None = None) -> None:
    """``left.sums += weights · left.vectors + factor ∘ (term_weights · left.terms)``; the right's by the transposes.

    Args:
        weights: (N, M) tile, of :func:`cloob.functional.kernels.launch.new_tile`.
        left: What to do for its rows.
        right: What to do for its columns; None: nothing.
        term_weights: Second tile, laid out like the first; needed where a side has terms.
    """
    (n, m), d = weights.shape, left.sums.shape[1]
    blocks = cdiv(n, launch.BLOCK) + (0 if right is None else cdiv(m, launch.BLOCK))
    grid = (blocks * cdiv(d, launch.BLOCK),)
    sides = (left, right or left)  # of a side that is not there no program runs
    arguments = [part for side in sides for part in (side.sums, side.vectors, side.terms, side.factor)]
    launch.run(
        both_sides, grid, *arguments, weights, term_weights, n, m, d, weights.stride(0), **of_product(weights.dtype)
    )
