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

from cloob.auditor.forms import SIZES, Fit, Group, fit

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

    def value(self, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The 0-d loss, with its graph, of rows in a dtype."""
        rows = [side.to(dtype or self.dtype) for side in (x, y)]
        scales = [] if self.scale is None else [self.scale]
        loss = self.loss(*rows, *scales)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise TypeError(f"the loss returned {type(loss).__name__}, no 0-d tensor")
        return loss

    def gradient(
        self, x: Tensor, y: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Its (2, N, D) gradient by the rows, in float64."""
        low = dtype or self.dtype
        return value_and_gradient(
            lambda u, v: self.value(u, v, low), x.to(low), y.to(low)
        )[1]

    def number(self, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> float:
        """The value as a number; NaN for what raises."""
        try:
            with torch.no_grad():
                return float(self.value(x, y, dtype))
        except Exception:
            return math.nan


def value_and_gradient(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[float, Tensor]:
    """A function of both sides, and its (2, N, D) gradient, zero where it has none."""
    leaves = [side.detach().requires_grad_() for side in (x, y)]
    value = function(*leaves)
    if value.requires_grad:
        torch.autograd.backward(value, inputs=leaves)
    sides = [torch.zeros_like(s) if s.grad is None else s.grad for s in leaves]
    return float(value.detach()), torch.stack(sides).double()


def gradient_error(
    subject: Subject,
    fitted: Fit,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype | None = None,
) -> float:
    """Relative difference of the gradients of a loss and of a form, along the sphere:
    a loss that makes rows unit has none across it.
    """
    exact = along_sphere(x, y, value_and_gradient(fitted.value, x, y)[1])
    return relative(along_sphere(x, y, subject.gradient(x, y, dtype)), exact)


def along_sphere(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """The part of a (2, N, D) gradient that is orthogonal to the rows."""
    rows = torch.stack([x, y]).double()
    return gradient - (gradient * rows).sum(dim=2, keepdim=True) * rows


def batch(n: int, d: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """(n, d) unit rows of n pairs, float64; they match less with more noise."""
    generator = torch.Generator().manual_seed(seed)
    shared, *own = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    x, y = (F.normalize(shared + noise * side, dim=1) for side in own)
    return x, y


def identify(subject: Subject) -> Fit | None:
    """The form whose values the loss has, None where none is near."""
    groups = [group_of(subject, n) for n in SIZES]
    if min(len(group.values) for group in groups) < 4:
        return None
    fitted = fit(groups)
    is_sigmoid = fitted.form.contrast == "sigmoid"
    if is_sigmoid and not BIASES[0] < float(fitted.scales[-1]) < BIASES[1]:
        return None
    error = gradient_error(subject, fitted, *batch(8, 5, 0.6, 7))
    is_near = fitted.value_error < NEAR and error < NEAR_GRADIENT
    if fitted.value_error >= EXACT and not is_near:
        return None
    return fitted._replace(gradient_error=error)


def group_of(subject: Subject, n: int) -> Group:
    """Batches of n pairs for which the loss is a number."""
    drawn = [batch(n, 5, noise, seed) for seed, noise in enumerate(NOISES)]
    values = torch.tensor([subject.number(*pair) for pair in drawn], dtype=torch.double)
    usable = values.isfinite()
    x = torch.stack([x for x, _ in drawn])
    y = torch.stack([y for _, y in drawn])
    return Group(x[usable], y[usable], values[usable])


def relative(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖; infinite where it is no number."""
    error = float((got - exact).norm() / exact.norm().clamp_min(1e-30))
    return error if isfinite(error) else math.inf
