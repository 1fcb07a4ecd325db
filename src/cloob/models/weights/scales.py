"""τ⁻¹ and β of other people's models, as the settings of our objective."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.errors import InputError
from cloob.objective import ContrastiveObjective

_MOST = 1e4


def scale_of(path: Path, name: str, logarithm: Tensor) -> float:
    """Exp of a stored logarithm; InputError if it is no scale that a model was trained with."""
    value = float(logarithm.detach().double())
    scale = math.exp(value) if abs(value) < 700 else math.inf
    if not 1 / _MOST < scale < _MOST:
        raise InputError(f"{path}: {name} is {value:g}, which is no logarithm of a scale")
    return scale


def cloob_objective(inv_tau: float, beta: float | None, scale: str) -> dict[str, Any]:
    """Settings of a model that was trained with CLOOB; without β where nothing says it."""
    known = {} if beta is None else {"beta": beta}
    settings = ContrastiveObjective.cloob(inv_tau=inv_tau, scale=scale, **known).config()
    if beta is None:
        del settings["beta"]
    return settings


def sigmoid_objective(path: Path, model: Any) -> dict[str, Any]:
    """Settings of an open_clip module whose weights hold a bias, which the sigmoid loss alone learns; else empty.

    Args:
        path: Where the weights are from, for errors.
        model: The module; τ⁻¹ is its ``logit_scale``, the bias its ``logit_bias``.

    Raises:
        InputError: They are no scale or no bias that a model was trained with.
    """
    stored = getattr(model, "logit_bias", None)
    if stored is None:
        return {}
    bias, inv_tau = float(stored.detach()), scale_of(path, "logit_scale", model.logit_scale)
    if not abs(bias) < _MOST:
        raise InputError(f"{path}: logit_bias is {bias:g}, which no model learns")
    return ContrastiveObjective.siglip(inv_tau=inv_tau, bias=bias).config()


def clip_objective(inv_tau: float) -> dict[str, Any]:
    """Settings of a model that was trained with CLIP's objective."""
    return ContrastiveObjective.clip(inv_tau=min(inv_tau, 100.0)).config()
