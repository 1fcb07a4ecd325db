"""Named training set-ups as functions that return a TrainConfig.

>>> config = get_recipe("cc3m-cloob").override(data=["cc3m/train.csv"], out="runs/cc3m")
"""

from __future__ import annotations

from collections.abc import Callable

from cloob.errors import InputError, nearest
from cloob.recipes.demo import demo_clip, demo_cloob, demo_infoloob, demo_infonce_hopfield
from cloob.recipes.paper import cc3m_clip, cc3m_cloob
from cloob.train.config import TrainConfig

__all__ = ["RECIPES", "describe", "get_recipe"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (demo_cloob, demo_clip, demo_infoloob, demo_infonce_hopfield, cc3m_cloob, cc3m_clip)
}
"""Every recipe by its name."""


def get_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe; ``_`` in the name counts as ``-``.

    Raises:
        InputError: There is no such recipe; the nearest are named.
    """
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; {nearest(key, RECIPES)}")
    return RECIPES[key]()


def describe(name: str) -> str:
    """One line on what a recipe trains."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
