"""The whole objective as the paper writes it (Eq. 3 to 5 of arXiv:2110.11316): the oracle of every other path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from cloob.family import CONTRASTS, Contrast
from cloob.functional.checks import as_rows, one_of, outside_autocast, scalar
from cloob.functional.contrast import info_loob, info_nce, sigmoid_loss
from cloob.functional.hopfield import hopfield_retrieval

Scale = Literal["paper", "unit"]
Direction = Callable[..., Tensor]


class Retrieved(NamedTuple):
    """The four retrievals of a batch, each (N, D): the letter names the memory, the index the query."""

    u_x: Tensor
    u_y: Tensor
    v_x: Tensor
    v_y: Tensor


class Parts(NamedTuple):
    """The functions that the objective is made of: the reference's, or others with the same arguments."""

    retrieve: Callable[..., Retrieved]
    hopfield_retrieval: Direction
    info_loob: Direction
    info_nce: Direction
    sigmoid_loss: Direction

    def direction(self, contrast: Contrast, bias: float | Tensor) -> Direction:
        """One direction of a contrast; ``bias`` is the sigmoid loss's."""
        if contrast == "sigmoid":
            return partial(self.sigmoid_loss, bias=bias)
        return self.info_loob if contrast == "infoloob" else self.info_nce


def cloob_reference(
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    beta: float | Tensor = 8.0,
    *,
    contrast: Contrast = "infoloob",
    hopfield: bool = True,
    scale: Scale = "paper",
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
) -> Tensor:
    """The objective of a batch of N pairs; every N×N matrix is built and kept for the backward pass.

    Args:
        image_features: (N, D) image embeddings X, unit rows.
        text_features: (N, D) text embeddings Y, unit rows; row i belongs to image i.
        inv_tau: Inverse temperature τ⁻¹ > 0 of the contrast.
        beta: Inverse temperature β > 0 of the retrieval; unused without it.
        contrast: ``"infoloob"``, ``"infonce"`` or ``"sigmoid"``.
        hopfield: Contrast retrieved embeddings (CLOOB) or the plain ones (CLIP, SigLIP).
        scale: ``"paper"`` is τ · (sum of both directions), as the authors' code; ``"unit"`` their mean, as CLIP and two
            ports of CLOOB. Paper = unit · 2τ, so at τ⁻¹ = 30 unit is 15 times as large. The sigmoid loss has no
            ``"paper"`` scale.
        bias: b of the sigmoid loss; unused by the others, in which it cancels.
        ids: (N,) integer ids; pairs of equal id are not each other's negatives.

    Returns:
        0-d loss, float32 (float64 for float64 input).

    Raises:
        TypeError: Not tensors.
        ValueError: As the functions it calls; N < 2; an unknown ``contrast`` or ``scale``, or two that do not fit.
    """
    member: dict[str, Any] = {"contrast": contrast, "hopfield": hopfield, "scale": scale}
    return of_parts(PARTS, image_features, text_features, inv_tau, beta, bias=bias, ids=ids, **member)


@outside_autocast
def of_parts(
    parts: Parts,
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    beta: float | Tensor,
    *,
    contrast: Contrast,
    hopfield: bool,
    scale: Scale,
    bias: float | Tensor,
    ids: Tensor | None,
) -> Tensor:
    """The objective by the functions of its parts; the rest is as in :func:`cloob_reference`."""
    check_member(contrast, scale)
    direction = parts.direction(contrast, bias)
    x, y = check_pairs(image_features, text_features)
    u_x, u_y, v_x, v_y = parts.retrieve(x, y, beta) if hopfield else Retrieved(x, y, x, y)
    images = direction(u_x, u_y, inv_tau, ids=ids)
    texts = images if is_symmetric(contrast, hopfield) else direction(v_y, v_x, inv_tau, ids=ids)
    return combine(images, texts, inv_tau, scale)


def retrieve(x: Tensor, y: Tensor, beta: float | Tensor) -> Retrieved:
    """Eq. 4 and 5: the queries x and y (N, D) against the image memory x and the text memory y."""
    return Retrieved(
        u_x=hopfield_retrieval(x, x, beta),
        u_y=hopfield_retrieval(y, x, beta),
        v_x=hopfield_retrieval(x, y, beta),
        v_y=hopfield_retrieval(y, y, beta),
    )


PARTS = Parts(retrieve, hopfield_retrieval, info_loob, info_nce, sigmoid_loss)


def check_pairs(image_features: Tensor, text_features: Tensor, at_least: int = 2) -> list[Tensor]:
    """Both sides of the batch as float32 or float64 matrices of equal shape."""
    x, y = as_rows(image_features=image_features, text_features=text_features)
    if len(x) != len(y) or len(x) < at_least:
        raise ValueError(
            f"{len(x)} image_features and {len(y)} text_features: pairs are expected, at least {at_least} of them"
        )
    return [x, y]


def check_member(contrast: str, scale: str) -> None:
    """Refuses what is no member of the family.

    τ · sum is no scale for the sigmoid loss: τ takes the τ⁻¹ out of a logit, but here a bias stands beside it.
    """
    one_of("contrast", contrast, tuple(CONTRASTS))
    one_of("scale", scale, get_args(Scale))
    if contrast == "sigmoid" and scale == "paper":
        raise ValueError("scale='paper' is that of the softmax contrasts; contrast='sigmoid' needs scale='unit'")


def is_symmetric(contrast: str, hopfield: bool) -> bool:
    """Whether both directions are one sum: the sigmoid loss over X·Yᵀ, which has no rows and no columns apart."""
    return contrast == "sigmoid" and not hopfield


def combine(images: Tensor, texts: Tensor, inv_tau: float | Tensor, scale: Scale) -> Tensor:
    """Both directions as one loss: τ · sum (``"paper"``) or mean (``"unit"``)."""
    if scale == "paper":
        return (images + texts) / scalar("inv_tau", inv_tau, images)
    return (images + texts) / 2
