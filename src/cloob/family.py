"""The family of objectives as one table, without torch; whatever names, lists or
describes a member reads it.

A new contrast is a function in ``functional/reference.py``, a row of ``CONTRASTS``, a
row of ``FAMILY`` and, if it has one, a fast path of the function's name in
``functional/streamed``.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

Contrast = Literal["infoloob", "infonce", "sigmoid"]
ObjectiveName = Literal["clip", "infoloob", "infonce-hopfield", "cloob", "siglip"]


class ContrastRow(NamedTuple):
    """One direction of a loss over anchors and candidates."""

    function: str  # its name in ``functional.reference`` and ``functional.streamed``
    title: str
    # over the candidates: a bias cancels in it, and τ · loss is one of its scales
    softmax: bool = True


CONTRASTS: dict[str, ContrastRow] = {
    "infoloob": ContrastRow("info_loob", "InfoLOOB, arXiv:2110.11316"),
    "infonce": ContrastRow("info_nce", "InfoNCE"),
    "sigmoid": ContrastRow("sigmoid_loss", "SigLIP's, arXiv:2303.15343", softmax=False),
}


class Member(NamedTuple):
    """A member of the family."""

    contrast: Contrast
    hopfield: bool
    title: str
    # where its scales start, as far as they matter: arguments of
    # ``ContrastiveObjective``
    starts: Mapping[str, float | bool | str]


_PAPER = {"inv_tau": 30.0, "beta": 8.0}
FAMILY: dict[str, Member] = {
    "clip": Member(
        "infonce",
        False,
        "InfoNCE",
        {"inv_tau": 1 / 0.07, "learnable_inv_tau": True, "scale": "unit"},
    ),
    "infoloob": Member("infoloob", False, "InfoLOOB", {"inv_tau": 30.0}),
    "infonce-hopfield": Member(
        "infonce", True, "InfoNCE with Hopfield retrieval", _PAPER
    ),
    "cloob": Member("infoloob", True, "InfoLOOB with Hopfield retrieval", _PAPER),
    "siglip": Member(
        "sigmoid",
        False,
        "SigLIP's sigmoid loss",
        {"inv_tau": 10.0, "bias": -10.0, "learnable_inv_tau": True},
    ),
}
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
# decoupled contrastive learning, arXiv:2110.06848
ALIASES: dict[str, ObjectiveName] = {"dcl": "infoloob"}
PAPER_OBJECTIVES = OBJECTIVES[:4]  # those that CLOOB's paper compares


def member_name(contrast: object, hopfield: object) -> ObjectiveName | None:
    """The first member with this contrast and retrieval, None where there is none."""
    return next(
        (name for name in OBJECTIVES if FAMILY[name][:2] == (contrast, hopfield)), None
    )
