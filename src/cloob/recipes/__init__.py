"""Named training set-ups as functions that return a TrainConfig.

>>> config = get_recipe("cc3m-cloob").override(data=["cc3m/train.csv"], out="runs/cc3m")
"""

from __future__ import annotations

from collections.abc import Callable

from cloob.errors import InputError, nearest
from cloob.recipes import demo, paper, pictograms, trained
from cloob.train.config import TrainConfig

__all__ = ["RECIPES", "describe", "get_recipe"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        demo.demo_cloob,
        demo.demo_clip,
        demo.demo_infoloob,
        demo.demo_infonce_hopfield,
        demo.demo_siglip,
        demo.demo_siglip_hopfield,
        demo.demo_scratch_cloob,
        demo.demo_scratch_clip,
        demo.demo_scratch_infoloob,
        demo.demo_scratch_infonce_hopfield,
        demo.demo_scratch_siglip,
        demo.demo_scratch_siglip_hopfield,
        paper.cc3m_cloob,
        paper.cc3m_clip,
        paper.cc3m_infoloob,
        paper.cc3m_infonce_hopfield,
        paper.yfcc_rn50_cloob,
        paper.yfcc_rn50_clip,
        paper.yfcc_rn101_cloob,
        paper.yfcc_rn101_clip,
        paper.yfcc_rn50x4_cloob,
        paper.yfcc_rn50x4_clip,
        paper.yfcc_vit_b_32_cloob,
        paper.yfcc_vit_b_32_clip,
        paper.yfcc_vit_b_16_cloob,
        paper.yfcc_vit_b_16_clip,
        trained.finetune,
        trained.lit,
        trained.align,
        pictograms.pictograms_cloob,
        pictograms.pictograms_cloob_warm,
        pictograms.pictograms_clip,
        pictograms.pictograms_infoloob,
        pictograms.pictograms_infonce_hopfield,
        pictograms.pictograms_siglip,
    )
}
"""Every recipe by its name."""


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
