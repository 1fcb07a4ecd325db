"""A loss that is looked at, the batches it is run on, and the form that it has."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.auditor.forms import SIZES, Fit, fit
from cloob.functional.private import tree_flatten

Loss = Callable[..., Any]
EXACT = 1e-4  # relative difference to a form up to which only rounding differs
NEAR = 2e-2  # and up to which the loss is meant to be that form, if its gradient is
NEAR_GRADIENT = 0.2
NOISES = (0.1, 0.3, 0.6, 1.0, 2.0, 9.0)  # of batches, from pairs that match to none
BIASES = (-25.0, 10.0)  # beyond, a sigmoid loss is nearly linear: no form


class Subject:
    """A loss that is looked at."""

    def __init__(self, loss: Loss, scale: float | Tensor | None) -> None:
        # A module remembers what it has warned of.
        self.loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
        self.scale = scale
        self.dtype = torch.float64
        try:
            self.value(*batch(6, 5, 1.0, 0))
        except (RuntimeError, TypeError):
            self.dtype = torch.float32
            self.value(*batch(6, 5, 1.0, 0))

    def value(
        self,
        x: Tensor,
        y: Tensor,
        scale: float | Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The 0-d loss, with its graph, of rows in a dtype."""
        scale = self.scale if scale is None else scale
        rows = [side.to(dtype or self.dtype) for side in (x, y)]
        found = self.loss(*rows) if scale is None else self.loss(*rows, scale)
        leaves, _ = tree_flatten(found)
        if len(leaves) != 1 or not isinstance(leaves[0], Tensor) or leaves[0].ndim:
            raise TypeError(f"the loss returned {type(found).__name__}, no 0-d tensor")
        return leaves[0]

    def gradient(
        self, x: Tensor, y: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Its (2, N, D) gradient by the rows, in float64."""
        low = dtype or self.dtype
        rows = [side.to(low) for side in (x, y)]
        return value_and_gradient(lambda u, v: self.value(u, v, dtype=low), rows)[1]

    def number(self, *arguments: Any, **options: Any) -> float:
        """The value as a number; NaN for what raises."""
        try:
            with torch.no_grad():
                return float(self.value(*arguments, **options))
        except Exception:
            return math.nan


def value_and_gradient(
    function: Callable[..., Tensor], rows: list[Tensor]
) -> tuple[float, Tensor]:
    """A function of both sides, and its (2, N, D) gradient, zero where it has none."""
    leaves = [side.detach().requires_grad_() for side in rows]
    value = function(*leaves)
    found: Any = [None, None]
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    sides = [
        torch.zeros_like(side) if part is None else part
        for side, part in zip(leaves, found, strict=True)
    ]
    return float(value.detach()), torch.stack(sides).double()


def gradient_error(
    subject: Subject,
    found: Fit,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype | None = None,
) -> float:
    """Relative difference of the gradients of a loss and of a form, along the sphere:
    a loss that makes rows unit has none across it.
    """
    exact = value_and_gradient(found.value, [x.double(), y.double()])[1]
    rows = torch.stack([x, y]).double()
    got, exact = (
        gradient - (gradient * rows).sum(dim=2, keepdim=True) * rows
        for gradient in (subject.gradient(x, y, dtype), exact)
    )
    return relative(got, exact)


def batch(n: int, d: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """(n, d) unit rows of n pairs, float64; they match less with more noise."""
    generator = torch.Generator().manual_seed(seed)
    shared, *own = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    x, y = (F.normalize(shared + noise * side, dim=1) for side in own)
    return x, y


def identify(subject: Subject) -> tuple[Fit | None, float]:
    """The form whose values the loss has, None where none is near, and how far the
    gradient is from that form's.
    """
    groups = []
    for n in SIZES:
        drawn = [batch(n, 5, noise, seed) for seed, noise in enumerate(NOISES)]
        values = [subject.number(x, y) for x, y in drawn]
        finite = [pair for pair, v in zip(drawn, values, strict=True) if isfinite(v)]
        if len(finite) < 4:
            return None, math.nan
        x, y = (torch.stack(side) for side in zip(*finite, strict=True))
        known = torch.tensor([v for v in values if isfinite(v)], dtype=torch.float64)
        groups.append((x, y, known))
    found = fit(groups)
    error = gradient_error(subject, found, *batch(8, 5, 0.6, 7))
    is_near = found.error < NEAR and error < NEAR_GRADIENT
    if found.form.contrast == "sigmoid":
        is_near = is_near and BIASES[0] < float(found.scales[-1]) < BIASES[1]
    return (found if found.error < EXACT or is_near else None), error


def relative(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖; infinite where it is no number."""
    error = float((got - exact).norm() / exact.norm().clamp_min(1e-30))
    return error if error >= 0 else math.inf
