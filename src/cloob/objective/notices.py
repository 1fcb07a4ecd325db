"""Warnings of an objective, each told once."""

from __future__ import annotations

import math
import warnings

import torch

from cloob.scales import callers_level


class Notices:
    """What was told, and what was looked at."""

    def __init__(self) -> None:
        self._done: set[str] = set()

    def is_first(self, key: str) -> bool:
        """Whether this is asked for the first time."""
        first = key not in self._done
        self._done.add(key)
        return first

    def warn(self, key: str, notice: str) -> None:
        """A warning once; none while a graph is traced."""
        if not torch.compiler.is_compiling() and self.is_first(key):
            warnings.warn(notice, stacklevel=callers_level())

    def warn_of_logarithm(self, name: str, inv_tau: float) -> None:
        """Warns once of a number that looks like a logarithm."""
        notice = logarithm_notice(name, inv_tau)
        if notice is not None:
            self.warn("logarithm", notice)


def logarithm_notice(name: str, number: float) -> str | None:
    """A warning of a number that looks like the logarithm of CLIP's τ⁻¹, as its code
    keeps it.
    """
    for inv_tau, shown in ((100.0, "ln 100"), (1 / 0.07, "ln(1/0.07)")):
        if abs(number / math.log(inv_tau) - 1) < 0.02:
            return (
                f"{name} is {number:.4g}, which is {shown}: τ⁻¹ itself is meant,"
                f" {inv_tau:.3g}"
            )
    return None
