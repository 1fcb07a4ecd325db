"""Sums of exponentials and what becomes of them: whether they need a shift, and their unit rows."""

from __future__ import annotations

import torch
from torch import Tensor

# exp(±limit), summed over a million rows, is a normal number of the type.
_UNSHIFTED_LIMIT = {torch.float32: 60.0, torch.float64: 600.0}
_UNIT = 1.01  # the longest that unit rows are after rounding in low precision


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
    longest = max(lengths[:2])
    bound = longest**2
    if matmul != x.dtype:
        centred = max(lengths[2:4])
        bound = centred * (max(longest, centred) + max(lengths[4:]))
    return bool(number * bound <= _unshifted_limit(x.dtype, matmul))


def safe_for_unit_rows(beta: float | Tensor, dtype: torch.dtype, matmul: torch.dtype) -> bool:
    """The same of rows of unit length, without a look at them or at a tensor; so a β that is one is not safe."""
    # Centred rows are at most twice as long, their means at most as long.
    bound = _UNIT**2 if matmul == dtype else 2 * _UNIT * (2 * _UNIT + _UNIT)
    return not isinstance(beta, Tensor) and beta * bound <= _unshifted_limit(dtype, matmul)


def _unshifted_limit(dtype: torch.dtype, matmul: torch.dtype) -> float:
    # bfloat16 has the range of float32.
    return _UNSHIFTED_LIMIT[dtype if matmul == dtype else torch.float32]
