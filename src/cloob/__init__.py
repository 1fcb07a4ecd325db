"""Train, judge and use image-text models by CLOOB (Fürst et al. 2022,
arXiv:2110.11316).

``ContrastiveObjective``, ``make_objective``, ``audit``, ``cached_backward`` and
``functional`` need torch alone, the others the extra ``train``. Names are imported on
first use, so that ``import cloob`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloob import functional
    from cloob.auditor import audit
    from cloob.data.example import example_pairs
    from cloob.data.open import open_source
    from cloob.evaluation.suite import evaluate
    from cloob.functional.ids import ids
    from cloob.heads.arrays import fit_heads
    from cloob.heads.config import HeadsConfig
    from cloob.heads.estimator import ContrastiveHeads
    from cloob.heads.head import Head
    from cloob.heads.run import train_heads
    from cloob.heads.settings import HeadSettings
    from cloob.heads.suspects import suspects
    from cloob.models.load import load_model
    from cloob.models.towers import create_model
    from cloob.objective import ContrastiveObjective, make_objective
    from cloob.recipes import get_recipe
    from cloob.search.index import Index
    from cloob.training.config import TrainConfig
    from cloob.training.gradcache import cached_backward
    from cloob.training.loop import train

__version__ = "0.1.0.dev0"
__all__ = [
    "ContrastiveHeads",
    "ContrastiveObjective",
    "Head",
    "HeadSettings",
    "HeadsConfig",
    "Index",
    "TrainConfig",
    "__version__",
    "audit",
    "cached_backward",
    "create_model",
    "evaluate",
    "example_pairs",
    "fit_heads",
    "functional",
    "get_recipe",
    "ids",
    "load_model",
    "make_objective",
    "open_source",
    "suspects",
    "train",
    "train_heads",
]

# Where every name is defined.
_HOMES = {
    "ContrastiveHeads": "cloob.heads.estimator",
    "ContrastiveObjective": "cloob.objective",
    "Head": "cloob.heads.head",
    "HeadSettings": "cloob.heads.settings",
    "HeadsConfig": "cloob.heads.config",
    "Index": "cloob.search.index",
    "TrainConfig": "cloob.training.config",
    "audit": "cloob.auditor",
    "cached_backward": "cloob.training.gradcache",
    "create_model": "cloob.models.towers",
    "evaluate": "cloob.evaluation.suite",
    "example_pairs": "cloob.data.example",
    "fit_heads": "cloob.heads.arrays",
    "get_recipe": "cloob.recipes",
    "ids": "cloob.functional.ids",
    "load_model": "cloob.models.load",
    "make_objective": "cloob.objective",
    "open_source": "cloob.data.open",
    "suspects": "cloob.heads.suspects",
    "train": "cloob.training.loop",
    "train_heads": "cloob.heads.run",
}


# a type checker that saw this function would take any name for one of ours
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "functional":
            return importlib.import_module("cloob.functional")
        if name not in _HOMES:
            raise AttributeError(f"module 'cloob' has no attribute {name!r}")
        from cloob.errors import needs

        with needs("train"):
            return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
