"""A softmax over long rows, some of them at a time: what the contrast needs, and retrieval where β is large.

Legend: n anchors (or states) against all m candidates (or stored patterns), D the embedding dimension.

A row's softmax needs the row's maximum and sum, which no program knows: each sees BLOCK of the columns. So a program
takes the exponential relative to the maximum of its own block, which is never too large and never all zero, and says
what that maximum and the sum are. The log-sum-exp of a row is that of its blocks' log-sum-exps, m / BLOCK numbers; and
what the exponentials of a block still have to be multiplied with is one number a row and block. Nothing is computed
twice, and the strip of exponentials is kept in the dtype to multiply in, 2 bytes a number in bfloat16: relative to a
maximum it is rounded to the last of its digits, while a logit would be rounded to a part of its size.

Traffic of an anchor and candidate: written, read and written again, read twice, 10 bytes in bfloat16 for 6D operations.
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
from cloob.functional.streamed.tiles import blocks

# A strip holds at most so many numbers, 128 MiB in bfloat16, and at most so many rows, whatever the number of columns.
STRIP_NUMBERS = 2**26
STRIP_ROWS = 4096


def strips(anchors: Tensor, n_candidates: int) -> list[slice]:
    """Slices of whole blocks of rows that cover ``anchors``, each small enough for a strip."""
    fitting = STRIP_NUMBERS // n_candidates // launch.BLOCK * launch.BLOCK
    return blocks(anchors, max(launch.BLOCK, min(STRIP_ROWS, fitting)))


@triton.jit
def taken(rows, columns, row_ids, column_ids, offset, n_rows, n_columns, EXCLUDE: tl.constexpr):
    """Which of a block's numbers are there and are no positive (``EXCLUDE``) nor of the anchor's id."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    if EXCLUDE:
        inside = inside & (columns[None, :] != rows[:, None] + offset)
    if row_ids is not None:
        of_rows = tl.load(row_ids + rows, mask=rows < n_rows, other=0)
        of_columns = tl.load(column_ids + columns, mask=columns < n_columns, other=0)
        inside = inside & (of_rows[:, None] != of_columns[None, :])
    return inside


@triton.jit
def exponentials(
    anchors,
    candidates,
    scale,
    row_ids,
    column_ids,
    tile,
    highest,
    total,
    n_rows,
    n_columns,
    d,
    width,
    offset,
    EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
):
    """Block (i, j) of exp(logits − the row's maximum in the block); that maximum, −∞ if nothing is taken; the sums."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    logits = tl.zeros((BLOCK, BLOCK), tl.float32)
    logits = product(logits, anchors, candidates, i, j, n_rows, n_columns, d, BLOCK, DEPTH, PRECISION, LIFT)
    inside = taken(rows, columns, row_ids, column_ids, offset, n_rows, n_columns, EXCLUDE)
    logits = tl.where(inside, logits * tl.load(scale), float("-inf"))
    top = tl.max(logits, 1)
    e = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
    at = rows * tl.num_programs(1) + j
    tl.store(highest + at, top, mask=rows < n_rows)
    tl.store(total + at, tl.sum(e, 1), mask=rows < n_rows)
    if tile is not None:
        there = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        tl.store(tile + rows[:, None].to(tl.int64) * width + columns[None, :], e, mask=there)


@triton.jit
def rescale(tile, factor, by_column, n_rows, n_columns, width, BLOCK: tl.constexpr):
    """Multiplies each row of block (i, j) with its factor; the sums by columns of what comes out."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = tile + rows[:, None].to(tl.int64) * width + columns[None, :]
    by = tl.load(factor + rows * tl.num_programs(1) + j, mask=rows < n_rows, other=0.0)
    p = tl.load(at, mask=inside, other=0.0).to(tl.float32) * by[:, None]
    tl.store(at, p, mask=inside)
    tl.store(by_column + i * n_columns + columns, tl.sum(p, 0), mask=columns < n_columns)


class Excluded(NamedTuple):
    """What is no negative: the positive of row i, column i + offset, and columns of the row's id, if there are ids."""

    offset: int
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None


def as_int64(ids: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Both vectors of ids as kernels read them."""
    return None if ids is None else (ids[0].to(torch.int64).contiguous(), ids[1].to(torch.int64).contiguous())


class Strip(NamedTuple):
    """Exponentials of whole rows of logits, block by block.

    Attributes:
        tile: (n, m) exp(logit − the row's maximum in its block), 0 where excluded; None if not asked for.
        highest: (n, blocks) those maxima, −∞ where all is excluded.
        total: (n, blocks) sums of the exponentials.
    """

    tile: Tensor | None
    highest: Tensor
    total: Tensor


def strip_of(
    anchors: Tensor, candidates: Tensor, scale: Tensor, excluded: Excluded | None = None, *, keep: bool = True
) -> Strip:
    """The strip of (n, D) anchors against (m, D) candidates of one dtype; logits are ``scale`` times the products."""
    (n, d), m = anchors.shape, len(candidates)
    tile = new_tile(n, m, anchors.dtype, anchors.device) if keep else None
    grid = (cdiv(n, launch.BLOCK), cdiv(m, launch.BLOCK))
    highest, total = scale.new_empty(2, n, grid[1])
    offset, *ids = excluded or Excluded(0)
    arguments = (anchors, candidates, scale, *ids, tile, highest, total, n, m, d)
    width = 0 if tile is None else tile.stride(0)
    options = of_product(anchors.dtype)
    launch.run(exponentials, grid, *arguments, width, offset, EXCLUDE=excluded is not None, **options)
    return Strip(tile, highest, total)


def rescaled(tile: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a strip's (n, m) tile by (n, blocks) factors in place; returns the (m,) sums of its columns."""
    n, m = tile.shape
    grid = (cdiv(n, launch.BLOCK), cdiv(m, launch.BLOCK))
    by_column = factor.new_empty(grid[0], m)
    launch.run(rescale, grid, tile, factor.contiguous(), by_column, n, m, tile.stride(0))
    return by_column.sum(dim=0)
