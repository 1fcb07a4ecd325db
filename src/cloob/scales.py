"""Positive scalars of a module: a fixed one is a buffer, a learnable one a parameter that holds its logarithm."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from cloob.functional.checks import check_number
from cloob.functional.private import buffers_of


class FixedScaleWarning(UserWarning):
    """A state that was loaded holds another fixed scale than the module was built with."""


class ScaledModule(nn.Module):
    """Base of a module with positive scalars.

    A fixed scalar is in the state as ``fixed_NAME`` (0-d float64), a learnable one as ``log_NAME``, never cast below
    float32. Reading a fixed one waits for no device: its number is stored apart from the buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed: dict[str, float] = {}

    def add_scale(self, name: str, value: float, *, learnable: bool) -> None:
        """Adds a positive scalar, fixed or a parameter that starts from the value."""
        number = float(value)
        check_number(name, number, torch.float64)
        if learnable:
            self.register_parameter(f"log_{name}", scalar_parameter(math.log(number)))
        else:
            self._fixed[name] = number
            self.register_buffer(f"fixed_{name}", torch.tensor(number, dtype=torch.float64))

    def learns(self, name: str) -> bool:
        """Whether the scalar is a parameter."""
        return name not in self._fixed

    def scale_value(self, name: str) -> float | Tensor:
        """A fixed scalar as a number, a learnable one as a 0-d tensor with its graph."""
        if name in self._fixed:
            return self._fixed[name]
        logarithm: Tensor = getattr(self, f"log_{name}")
        return logarithm.exp()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the scalars: fixed ones stay float64 where that exists (not on MPS), learned ones float32 or better."""
        buffers = buffers_of(self)
        for name in self._fixed:
            key = f"fixed_{name}"
            buffers[key] = torch.empty((), device=self.get_buffer(key).device)
        scalars = [p for p in self.parameters(recurse=False) if p.ndim == 0]
        learned = [*scalars, *(p.grad for p in scalars)]

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            low = result.is_floating_point() and torch.finfo(result.dtype).bits < 32
            return tensor.to(result.device, torch.float32) if low and any(tensor is one for one in learned) else result

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        for name, number in self._fixed.items():
            key = f"fixed_{name}"
            device = self.get_buffer(key).device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            buffers[key] = torch.full((), number, dtype=dtype, device=device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Takes the fixed scalars of the state; warns where they differ from the module's."""
        for name, number in self._fixed.items():
            key = f"{prefix}fixed_{name}"
            loaded = float(state_dict.get(key, number))
            try:
                check_number(key, loaded, torch.float64)
            except ValueError as error:
                others[-1].append(str(error))  # torch's list of errors
                continue
            if not math.isclose(loaded, number, rel_tol=1e-6):  # a state from MPS is in float32
                message = f"{name} was {number:g} and is {loaded:g} now, as in the state that was loaded"
                warnings.warn(message, FixedScaleWarning, stacklevel=callers_level())
            self._fixed[name] = loaded
        super()._load_from_state_dict(state_dict, prefix, *others)


def scalar_parameter(value: float) -> nn.Parameter:
    """A 0-d parameter in float32, or float64 where that is the default, whatever lower one is."""
    return nn.Parameter(torch.tensor(value, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


def callers_level() -> int:
    """The ``stacklevel`` at which a warning points at the line outside of torch and this package that led to it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "cloob"):
        frame, level = frame.f_back, level + 1
    return level
