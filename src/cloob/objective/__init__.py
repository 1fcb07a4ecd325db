"""The objective as a module: scales, gather over ranks, choice of path, and the call that open_clip's trainers make."""

from cloob.functional.checks import NonFiniteFeaturesError
from cloob.objective.module import (
    BACKENDS,
    MAX_INV_TAU,
    OBJECTIVES,
    PAPER_OBJECTIVES,
    Backend,
    ContrastiveObjective,
    make_objective,
)
from cloob.objective.values import check_finite

__all__ = [
    "BACKENDS",
    "MAX_INV_TAU",
    "OBJECTIVES",
    "PAPER_OBJECTIVES",
    "Backend",
    "ContrastiveObjective",
    "NonFiniteFeaturesError",
    "check_finite",
    "make_objective",
]
