"""The family of objectives as one table, without torch; whatever names, lists or describes a member reads it.

A new contrast is a function in ``functional/contrast.py``, a row of ``CONTRASTS``, a row of ``FAMILY`` and, if it has
one, a fast path of the function's name in ``functional/streamed``.
"""

from typing import Any, Literal, NamedTuple, get_args

Contrast = Literal["infoloob", "infonce", "sigmoid"]
ObjectiveName = Literal["clip", "infoloob", "infonce-hopfield", "cloob", "siglip", "siglip-hopfield"]


class ContrastRow(NamedTuple):
    """One direction of a loss over anchors and candidates."""

    function: str  # its name in ``functional.reference`` and ``functional.streamed``
    title: str
    softmax: bool = True  # over the candidates: a bias cancels in it, and τ · loss is one of its scales


CONTRASTS: dict[str, ContrastRow] = {
    "infoloob": ContrastRow("info_loob", "InfoLOOB, arXiv:2110.11316"),
    "infonce": ContrastRow("info_nce", "InfoNCE"),
    "sigmoid": ContrastRow("sigmoid_loss", "SigLIP's, arXiv:2303.15343", softmax=False),
}


class Member(NamedTuple):
    """A member of the family: what it contrasts, and the values that it starts from."""

    contrast: Contrast
    hopfield: bool
    title: str
    inv_tau: float = 30.0
    beta: float = 8.0
    bias: float | None = None
    learns_inv_tau: bool = False
    scale: str | None = None  # None: the objective's default

    def starts(self) -> dict[str, Any]:
        """Where its scales start, as far as they matter: arguments of ``ContrastiveObjective``."""
        return {
            "inv_tau": self.inv_tau,
            **({"beta": self.beta} if self.hopfield else {}),
            **({"bias": self.bias} if self.bias is not None else {}),
            **({"learnable_inv_tau": True} if self.learns_inv_tau else {}),
            **({"scale": self.scale} if self.scale is not None else {}),
        }


_SIGLIP: dict[str, Any] = {"inv_tau": 10.0, "bias": -10.0, "learns_inv_tau": True}
FAMILY: dict[str, Member] = {
    "clip": Member("infonce", False, "InfoNCE", inv_tau=1 / 0.07, learns_inv_tau=True, scale="unit"),
    "infoloob": Member("infoloob", False, "InfoLOOB"),
    "infonce-hopfield": Member("infonce", True, "InfoNCE with Hopfield retrieval"),
    "cloob": Member("infoloob", True, "InfoLOOB with Hopfield retrieval"),
    "siglip": Member("sigmoid", False, "SigLIP's sigmoid loss", **_SIGLIP),
    "siglip-hopfield": Member("sigmoid", True, "the sigmoid loss with Hopfield retrieval", **_SIGLIP),
}
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
ALIASES: dict[Any, ObjectiveName] = {"dcl": "infoloob"}  # decoupled contrastive learning, arXiv:2110.06848
PAPER_OBJECTIVES = OBJECTIVES[:4]  # those that CLOOB's paper compares


def member_name(contrast: object, hopfield: object) -> ObjectiveName | None:
    """The first member with this contrast and retrieval, None where there is none."""
    return next((name for name in OBJECTIVES if FAMILY[name][:2] == (contrast, hopfield)), None)
