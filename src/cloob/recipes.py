"""Named training set-ups: those of ``recipes.toml``, for every member of the family and
for other towers.

>>> config = get_recipe("cc3m", objective="clip")
>>> config = config.override(data=["cc3m/train.csv"], out="runs/cc3m")
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, overload

from cloob.errors import InputError, nearest
from cloob.family import ALIASES, FAMILY, ObjectiveName
from cloob.heads.config import HeadsConfig
from cloob.heads.settings import ClosedForm
from cloob.training.config import TrainConfig

__all__ = ["HEADS", "RECIPES", "describe", "get_recipe"]

RECIPES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text("utf-8")
)
"""Every recipe by its name, as a table of settings."""
HEADS = tuple(name for name, settings in RECIPES.items() if settings.get("heads"))
"""Those of heads, whose configuration is a ``HeadsConfig``."""
_CHOOSING = ("align", "vectors")
_SCALES = {"published": {name: member.starts for name, member in FAMILY.items()}}
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
    name: str, *, objective: Any = None, model: str | None = None
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
    key = _recipe_name(name)
    if key in HEADS:
        if model is not None:
            raise InputError(
                f"model is {model!r}, but {name} trains heads; leave it out"
            )
        usual = "auto" if key in _CHOOSING else "cloob"
        return _heads_config(key, ALIASES.get(objective, objective or usual))
    return _towers_config(key, ALIASES.get(objective, objective or "cloob"), model)


def _heads_config(name: str, objective: str) -> HeadsConfig:
    """The configuration of a recipe of heads: its settings, and the objective's."""
    settings = dict(RECIPES[name])
    objective_settings = settings.pop("objectives", {}).get(objective, {})
    del settings["about"], settings["heads"]
    settings["out"] = settings["out"].format(objective=objective)
    start = HeadsConfig(**settings).override(objective=objective)
    return start.override(**objective_settings)


def _towers_config(
    name: str, objective: ObjectiveName, model: str | None
) -> TrainConfig:
    """The configuration of a recipe of towers: its base, its settings, and those of the
    objective and the model.
    """
    settings = dict(RECIPES[name])
    settings.pop("about")
    base = settings.pop("base", None)
    scales = settings.pop("scales", None)
    objective_settings = settings.pop("objectives", {})
    model_settings = settings.pop("models", {})
    config = TrainConfig() if base is None else _towers_config(base, objective, None)
    default = settings.pop("model", config.model)
    settings["out"] = settings["out"].format(
        objective=objective, model=str(model or default).lower()
    )
    config = config.override(objective=objective, model=default).override(**settings)
    config = config.override(**_SCALES.get(scales, {}).get(objective, {}))
    config = config.override(**objective_settings.get(objective, {}))
    if model is None:
        return config
    kind = next((kind for kind in model_settings if model.startswith(kind)), None)
    return config.override(model=model, **model_settings.get(kind, {}))


def starts_of(name: str) -> dict[str, Any]:
    """The settings that a recipe gives, as the file has them."""
    settings = RECIPES[_recipe_name(name)]
    return (
        {**starts_of(settings["base"]), **settings} if "base" in settings else settings
    )


def _recipe_name(name: str) -> str:
    """The name of a recipe as the file has it, with ``-`` for ``_``; refuses others."""
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; {nearest(key, RECIPES)}")
    return key


def describe(name: str) -> str:
    """One line on what a recipe trains."""
    return str(RECIPES[_recipe_name(name)]["about"])
