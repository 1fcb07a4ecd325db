"""τ⁻¹, β and bias of other people's models, as the settings of our objective."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.errors import InputError
from cloob.objective import ContrastiveObjective


def scale_of(path: Path, name: str, logarithm: Tensor) -> float:
    """Exp of a stored logarithm; InputError if it is no scale that a model was trained with."""
    value = float(logarithm.detach().double()) if logarithm.numel() == 1 else math.nan
    if not abs(value) < math.log(1e4):
        raise InputError(f"{path}: {name} is {value:g}, which is no logarithm of a scale")
    return math.exp(value)


def cloob_objective(inv_tau: float, beta: float | None, scale: str) -> dict[str, Any]:
    """Settings of a model that was trained with CLOOB; without β where nothing says it."""
    known = {} if beta is None else {"beta": float(beta)}
    settings = ContrastiveObjective.cloob(inv_tau=float(inv_tau), scale=scale, **known).config()
    return settings if known else {key: value for key, value in settings.items() if key != "beta"}


def sigmoid_objective(path: Path, model: Any) -> dict[str, Any]:
    """Settings of an open_clip module with a ``logit_bias``, which the sigmoid loss alone learns; else empty."""
    if getattr(model, "logit_bias", None) is None:
        return {}
    bias = float(model.logit_bias.detach())
    if not abs(bias) < 1e4:
        raise InputError(f"{path}: logit_bias is {bias:g}, which no model learns")
    return ContrastiveObjective.siglip(inv_tau=scale_of(path, "logit_scale", model.logit_scale), bias=bias).config()


def clip_objective(inv_tau: float) -> dict[str, Any]:
    """Settings of a model that was trained with CLIP's objective."""
    return ContrastiveObjective.clip(inv_tau=min(inv_tau, 100.0)).config()
