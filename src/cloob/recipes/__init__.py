"""Named training set-ups as functions that return a TrainConfig.

>>> config = get_recipe("cc3m-cloob").override(data=["cc3m/train.csv"], out="runs/cc3m")
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

from cloob.errors import InputError, nearest
from cloob.recipes import demo, paper, pictograms, trained
from cloob.training.config import TrainConfig

__all__ = ["RECIPES", "describe", "get_recipe"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    name.replace("_", "-"): recipe
    for module in (demo, paper, trained, pictograms)
    for name, recipe in vars(module).items()
    if isinstance(recipe, FunctionType) and recipe.__module__ == module.__name__ and not name.startswith("_")
}
"""Every recipe by its name: the public functions of these modules, in their order there."""


def get_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe; ``_`` in the name counts as ``-``.

    Raises:
        InputError: There is no such recipe; the nearest are named.

    Example:
        >>> from cloob import get_recipe
        >>> config = get_recipe("demo-cloob").override(seed=1)
        >>> config.loss.objective, config.run.batch_size, config.run.seed
        ('cloob', 128, 1)
    """
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; {nearest(key, RECIPES)}")
    return RECIPES[key]()


def describe(name: str) -> str:
    """One line on what a recipe trains."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
