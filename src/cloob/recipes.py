"""Named training set-ups: those of ``recipes.toml``, for every member of the family and
for other towers.

>>> config = get_recipe("cc3m", objective="clip")
>>> config = config.override(data=["cc3m/train.csv"], out="runs/cc3m")
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

from cloob.errors import InputError, nearest
from cloob.family import ALIASES, FAMILY, ObjectiveName
from cloob.heads.config import HeadsConfig
from cloob.heads.settings import ClosedForm
from cloob.training.config import TrainConfig

__all__ = ["HEADS", "RECIPES", "describe", "get_recipe"]

Settings = dict[str, Any]
RECIPES: dict[str, Settings] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text("utf-8")
)
"""Every recipe by its name, as a table of settings."""
HEADS = tuple(name for name, settings in RECIPES.items() if settings.get("heads"))
"""Those of heads, whose configuration is a ``HeadsConfig``."""
_CHOOSING = ("align", "vectors")
HeadObjective = ObjectiveName | ClosedForm | Literal["auto"]


@overload
def get_recipe(  # type: ignore[overload-overlap] # a literal is a text, too
    name: Literal["align", "demo", "vectors"],
    *,
    objective: HeadObjective | None = None,
) -> HeadsConfig: ...


@overload
def get_recipe(
    name: str, *, objective: ObjectiveName | None = None, model: str | None = None
) -> TrainConfig: ...


def get_recipe(
    name: str, *, objective: str | None = None, model: str | None = None
) -> TrainConfig | HeadsConfig:
    """The configuration of a recipe: for ``train_heads`` of ``align``, ``vectors`` and
    ``demo``, for ``train`` of the others.

    Args:
        name: One of ``RECIPES``; ``_`` counts as ``-``.
        objective: A member of the family; ``demo``, ``cc3m`` and ``yfcc`` have settings
            for all. Left out, it is CLOOB; for ``align`` and ``vectors`` held-out pairs
            choose (``"auto"``). Heads also have ``"cca"`` and ``"kcca"``.
        model: Name of the towers; the recipe's default when left out.

    Raises:
        InputError: There is no such recipe; the nearest are named.

    Example:
        >>> from cloob import get_recipe
        >>> config = get_recipe("demo", objective="clip").override(seed=1)
        >>> config.objective, config.batch_size, config.seed
        ('clip', 128, 1)
    """
    recipe_name = _recipe_name(name)
    settings = starts_of(recipe_name)
    is_of_heads = settings.pop("heads", False)
    if is_of_heads and model is not None:
        raise InputError(f"model is {model!r}, but {name} trains heads; leave it out")
    if objective is None:
        objective = "auto" if recipe_name in _CHOOSING else "cloob"
    objective = ALIASES.get(objective, objective)
    del settings["about"]
    by_objective = settings.pop("objectives", {})
    by_model = settings.pop("models", {})
    has_published_scales = settings.pop("published_scales", False)
    settings["out"] = settings["out"].format(
        objective=objective, model=str(model or settings.get("model")).lower()
    )
    start: TrainConfig | HeadsConfig = HeadsConfig() if is_of_heads else TrainConfig()
    config = start.override(**settings).override(objective=objective)
    if has_published_scales:
        config = config.override(**FAMILY[objective].starts)
    config = config.override(**by_objective.get(objective, {}))
    if model is None:
        return config
    return config.override(model=model, **_settings_of_model(by_model, model))


def _settings_of_model(by_model: Mapping[str, Settings], model: str) -> Settings:
    """The settings of a recipe for some towers, whose names begin alike."""
    for beginning, settings in by_model.items():
        if model.startswith(beginning):
            return settings
    return {}


def starts_of(name: str) -> Settings:
    """The settings of a recipe, over those of its base, as the file has them."""
    settings = dict(RECIPES[_recipe_name(name)])
    base = settings.pop("base", None)
    return settings if base is None else {**starts_of(base), **settings}


def _recipe_name(name: str) -> str:
    """The name of a recipe as the file has it, with ``-`` for ``_``; refuses others."""
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; {nearest(key, RECIPES)}")
    return key


def describe(name: str) -> str:
    """One line on what a recipe trains."""
    return str(RECIPES[_recipe_name(name)]["about"])
