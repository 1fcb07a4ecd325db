"""Named training set-ups: those of ``recipes.toml``, for every member of the family and
for other towers.

>>> config = get_recipe("cc3m", objective="clip")
>>> config = config.override(data=["cc3m/train.csv"], out="runs/cc3m")
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from cloob.errors import InputError, nearest
from cloob.family import ALIASES, FAMILY, ObjectiveName
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEAD_SCALES

__all__ = ["RECIPES", "describe", "get_recipe"]

RECIPES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text("utf-8")
)
"""Every recipe by its name, as a table of settings."""
_SCALES = {
    "published": {name: member.starts for name, member in FAMILY.items()},
    "heads": HEAD_SCALES,
}


def get_recipe(
    name: str, *, objective: ObjectiveName | None = None, model: str | None = None
) -> TrainConfig:
    """The configuration of a recipe.

    Args:
        name: One of ``RECIPES``; ``_`` counts as ``-``.
        objective: A member of the family; ``demo``, ``cc3m`` and ``yfcc`` have settings
            for all. Left out, it is CLOOB; for ``align`` and ``vectors`` held-out pairs
            choose (``"auto"``).
        model: Name of the towers; the recipe's default when left out.

    Raises:
        InputError: There is no such recipe; the nearest are named.

    Example:
        >>> from cloob import get_recipe
        >>> config = get_recipe("demo", objective="clip").override(seed=1)
        >>> config.loss.objective, config.run.batch_size, config.run.seed
        ('clip', 128, 1)
    """
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; {nearest(key, RECIPES)}")
    config = _built(key, ALIASES.get(objective, objective or "cloob"), model)
    return (
        config.override(objective="auto")
        if objective is None and key in ("align", "vectors")
        else config
    )


def _built(name: str, objective: ObjectiveName, model: str | None) -> TrainConfig:
    leaves = dict(RECIPES[name])
    leaves.pop("about")
    base, scales = leaves.pop("base", None), leaves.pop("scales", None)
    of_objective, of_models = (leaves.pop(key, {}) for key in ("objectives", "models"))
    config = TrainConfig() if base is None else _built(base, objective, None)
    default = leaves.pop("model", config.towers.model)
    leaves["out"] = leaves["out"].format(
        objective=objective, model=str(model or default).lower()
    )
    config = config.override(objective=objective, model=default).override(**leaves)
    config = config.override(**_SCALES.get(scales, {}).get(objective, {})).override(
        **of_objective.get(objective, {})
    )
    if model is None:
        return config
    kind = next((kind for kind in of_models if model.startswith(kind)), None)
    return config.override(model=model, **of_models.get(kind, {}))


def describe(name: str) -> str:
    """One line on what a recipe trains."""
    return str(RECIPES[name]["about"])
