"""Train, judge and use image-text models by CLOOB (Fürst et al. 2022, arXiv:2110.11316).

``ContrastiveObjective`` needs torch alone. Names are imported on first use, so that ``import cloob`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloob.models.load import load_model
    from cloob.objective import ContrastiveObjective

__version__ = "0.1.0"
__all__ = ["ContrastiveObjective", "__version__", "load_model"]

_HOME = {"ContrastiveObjective": "cloob.objective", "load_model": "cloob.models.load"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cloob' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
