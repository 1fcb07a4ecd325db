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
from cloob.training.config import TrainConfig

__all__ = ["HEADS", "RECIPES", "describe", "get_recipe"]

RECIPES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text("utf-8")
)
"""Every recipe by its name, as a table of settings."""
HEADS = tuple(name for name, leaves in RECIPES.items() if leaves.get("heads"))
"""Those of heads, whose configuration is a ``HeadsConfig``."""
_CHOOSING = ("align", "vectors")
_SCALES = {"published": {name: member.starts for name, member in FAMILY.items()}}
HeadObjective = ObjectiveName | Literal["auto", "cca"]


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
            choose (``"auto"``). Heads also have ``"cca"``.
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
        return _heads(key, ALIASES.get(objective, objective or usual))
    return _built(key, ALIASES.get(objective, objective or "cloob"), model)


def _heads(name: str, objective: str) -> HeadsConfig:
    leaves = dict(RECIPES[name])
    of_objective = leaves.pop("objectives", {}).get(objective, {})
    del leaves["about"], leaves["heads"]
    leaves["out"] = leaves["out"].format(objective=objective)
    start = HeadsConfig(**leaves).override(objective=objective)
    return start.override(**of_objective)


def _built(name: str, objective: ObjectiveName, model: str | None) -> TrainConfig:
    """The configuration of a recipe of towers: its base, its settings, and those of the
    objective and the model.
    """
    leaves = dict(RECIPES[name])
    leaves.pop("about")
    base, scales = leaves.pop("base", None), leaves.pop("scales", None)
    of_objective, of_models = (leaves.pop(key, {}) for key in ("objectives", "models"))
    config = TrainConfig() if base is None else _built(base, objective, None)
    default = leaves.pop("model", config.model)
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


def starts_of(name: str) -> dict[str, Any]:
    """The settings that a recipe gives, as the file has them."""
    leaves = RECIPES[_recipe_name(name)]
    return {**starts_of(leaves["base"]), **leaves} if "base" in leaves else leaves


def _recipe_name(name: str) -> str:
    """The name of a recipe as the file has it, with ``-`` for ``_``; refuses others."""
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; {nearest(key, RECIPES)}")
    return key


def describe(name: str) -> str:
    """One line on what a recipe trains."""
    return str(RECIPES[_recipe_name(name)]["about"])
