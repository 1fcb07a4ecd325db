"""Positive scalars of a module: a fixed one is a number, a learnable one a parameter
that holds its logarithm.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from cloob.functional.checks import check_number


class FixedScaleWarning(UserWarning):
    """A state that was loaded holds another fixed scale than the module was built
    with.
    """


class ScaledModule(nn.Module):
    """Base of a module with positive scalars: ``fixed_NAME`` or ``log_NAME`` in the
    state, never below float32.
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

    def learns(self, name: str) -> bool:
        """Whether the scalar is a parameter."""
        return name not in self._fixed

    def scale_value(self, name: str) -> float | Tensor:
        """A fixed scalar as a number, a learnable one as a 0-d tensor with its
        graph.
        """
        if name in self._fixed:
            return self._fixed[name]
        logarithm: Tensor = getattr(self, f"log_{name}")
        return logarithm.exp()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the module; learned scalars stay float32 when the rest goes to half
        precision.
        """
        scalars = [p for p in self.parameters(recurse=False) if p.ndim == 0]
        learned = [*scalars, *(p.grad for p in scalars)]

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            low = result.is_floating_point() and torch.finfo(result.dtype).bits < 32
            if low and any(tensor is one for one in learned):
                return tensor.to(result.device, torch.float32)
            return result

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, number in self._fixed.items():
            destination[f"{prefix}fixed_{name}"] = torch.tensor(
                number, dtype=torch.float64
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Takes the fixed scalars of the state; warns where they differ from the
        module's.
        """
        _, strict, missing, _, errors = arguments
        for name, number in self._fixed.items():
            key = f"{prefix}fixed_{name}"
            if strict and key not in state_dict:
                missing.append(key)
            loaded = float(state_dict.pop(key, number))
            try:
                check_number(key, loaded, torch.float64)
            except ValueError as error:
                errors.append(str(error))
                continue
            if not math.isclose(loaded, number, rel_tol=1e-6):
                message = (
                    f"{name} was {number:g} and is {loaded:g} now, as in the state that"
                    " was loaded"
                )
                warnings.warn(message, FixedScaleWarning, stacklevel=callers_level())
            self._fixed[name] = loaded
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def scalar_parameter(value: float) -> nn.Parameter:
    """A 0-d parameter in float32, or float64 where that is the default, whatever lower
    one is.
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return nn.Parameter(torch.tensor(value, dtype=dtype))


def callers_level() -> int:
    """The ``stacklevel`` at which a warning points at the line outside of torch and
    this package that led to it.
    """
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "cloob"):
            break
        frame = frame.f_back
        level += 1
    return level
