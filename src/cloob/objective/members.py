"""The members of the family by their names."""

from __future__ import annotations

from typing import Any

from cloob.objective.module import MEMBERS, OBJECTIVES, ContrastiveObjective
from cloob.objective.values import one_of


def make_objective(name: str, **overrides: Any) -> ContrastiveObjective:
    """A member of the family by its name.

    Args:
        name: ``"clip"`` and ``"cloob"`` as published; ``"infoloob"`` and ``"infonce-hopfield"`` are the two between
            them, with CLOOB's fixed τ⁻¹, β and scale. ``"siglip"`` as published, and ``"siglip-hopfield"``, the same
            on retrieved embeddings with CLOOB's β.
        **overrides: Arguments of :class:`ContrastiveObjective`.

    Raises:
        ValueError: Another name.

    Example:
        >>> from cloob import make_objective
        >>> clip = make_objective("clip")
        >>> clip.contrast, clip.hopfield, round(clip.inv_tau.item(), 2)
        ('infonce', False, 14.29)
        >>> make_objective("cloob", beta=14.3).name
        'cloob'
    """
    one_of("objective", name, OBJECTIVES)
    if name == "clip":
        return ContrastiveObjective.clip(**overrides)
    contrast, hopfield = MEMBERS[name]
    if contrast == "sigmoid":
        return ContrastiveObjective.siglip(**{"hopfield": hopfield, **overrides})
    return ContrastiveObjective(**{"contrast": contrast, "hopfield": hopfield, **overrides})
