"""Hopfield retrieval and the objective as the paper writes them (arXiv:2110.11316): the oracle of all other paths."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cloob.family import CONTRASTS, Contrast
from cloob.functional import contrast as contrasts
from cloob.functional.checks import as_rows, one_of, scalar
from cloob.functional.private import outside_autocast

Scale = Literal["paper", "unit"]


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
    exclude_above: float | None = None,
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
        exclude_above: Margin by which a candidate may exceed the positive and still be a negative; None for any, see
            :func:`info_loob`. It compares what is contrasted: retrieved embeddings with retrieval.

    Returns:
        0-d loss, float32 (float64 for float64 input).

    Raises:
        TypeError: Not tensors.
        ValueError: As the functions it calls; N < 2; an unknown ``contrast`` or ``scale``, or two that do not fit.
    """
    member: dict[str, Any] = {
        "contrast": contrast,
        "hopfield": hopfield,
        "scale": scale,
        "exclude_above": exclude_above,
    }
    return pair_loss(sys.modules[__name__], image_features, text_features, inv_tau, beta, bias=bias, ids=ids, **member)


def pair_loss(
    backend: ModuleType,
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    beta: float | Tensor,
    *,
    contrast: Contrast = "infoloob",
    hopfield: bool = True,
    scale: Scale = "paper",
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    exclude_above: float | None = None,
    unit_rows: bool = False,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """The objective by the functions of a backend: this module, or ``streamed``, which alone takes the last two."""
    check_member(contrast, scale)
    direction = direction_of(backend, contrast, bias, exclude_above, matmul)
    x, y = check_pairs(image_features, text_features)
    fast: dict[str, Any] = {"unit_rows": unit_rows, "matmul": matmul} if unit_rows or matmul else {}
    u_x, u_y, v_x, v_y = backend.retrieve(x, y, beta, **fast) if hopfield else (x, y, x, y)
    images = direction(u_x, u_y, inv_tau, ids=ids)
    symmetric = is_symmetric(contrast, hopfield, exclude_above)
    return combine(images, images if symmetric else direction(v_y, v_x, inv_tau, ids=ids), inv_tau, scale)


def direction_of(
    backend: ModuleType,
    contrast: str,
    bias: float | Tensor,
    exclude_above: float | None = None,
    matmul: torch.dtype | None = None,
) -> Callable[..., Tensor]:
    """One direction of a contrast by the backend's function, or the plain one where the backend has none."""
    row = CONTRASTS[contrast]
    fast = getattr(backend, row.function, None)
    options: dict[str, Any] = {"exclude_above": exclude_above, "matmul": matmul if fast else None}
    given = {name: value for name, value in options.items() if value is not None}
    return partial(fast or getattr(contrasts, row.function), **({} if row.softmax else {"bias": bias}), **given)


@outside_autocast
def hopfield_retrieval(state: Tensor, stored: Tensor, beta: float | Tensor) -> Tensor:
    """One update of a modern Hopfield network, renormalised: ``norm(softmax(β · state storedᵀ) stored)``.

    Each state pattern is replaced by an average of the stored patterns, weighted by their similarity to it (Ramsauer et
    al. 2021; Eq. 4 and 5). Features that co-occur in the memory reinforce each other, so the retrieved patterns have a
    richer covariance.

    Args:
        state: (N, D) state (query) patterns, unit rows.
        stored: (M, D) stored patterns, unit rows.
        beta: Inverse temperature β > 0. Large β returns the nearest pattern, small β the mean of the memory; the
            matched pattern has to win e^{β·s} against M others, so β has to be seen against ln M.

    Returns:
        (N, D) retrieved patterns, unit rows, float32 (float64 for float64 input). An average that is exactly zero
        (antipodal stored patterns under equal weights, an empty memory) stays zero, with zero gradient.

    Raises:
        TypeError: Not tensors.
        ValueError: Shapes, dtypes or devices do not fit, or β is not positive and finite.
    """
    state, stored = as_rows(state=state, stored=stored)
    beta = scalar("beta", beta, state)
    association = (beta * state @ stored.T).softmax(dim=-1)  # (N, M)
    average = association @ stored
    norms = average.norm(dim=-1, keepdim=True)
    return torch.where(norms == 0, 0.0, average / norms.clamp_min(torch.finfo(norms.dtype).tiny))  # NaN stays


def retrieve(x: Tensor, y: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 4 and 5: U_x, U_y from the image memory x and V_x, V_y from the text memory y; the index names the query."""
    u_x, u_y, v_x, v_y = (hopfield_retrieval(query, memory, beta) for memory in (x, y) for query in (x, y))
    return u_x, u_y, v_x, v_y


def check_pairs(image_features: Tensor, text_features: Tensor, at_least: int = 2) -> list[Tensor]:
    """Both sides of the batch as float32 or float64 matrices of equal shape."""
    x, y = as_rows(image_features=image_features, text_features=text_features)
    if len(x) != len(y) or len(x) < at_least:
        raise ValueError(
            f"{len(x)} image_features and {len(y)} text_features: pairs are expected, at least {at_least} of them; "
            "for a last batch of one give the loader drop_last=True"
        )
    return [x, y]


def check_member(contrast: str, scale: str) -> None:
    """Refuses what is no member of the family: τ · sum takes the τ⁻¹ out of a logit, but not out of one with a bias."""
    one_of("contrast", contrast, tuple(CONTRASTS))
    one_of("scale", scale, get_args(Scale))
    if not CONTRASTS[contrast].softmax and scale == "paper":
        raise ValueError(f"scale='paper' is that of the softmax contrasts; {contrast=} needs scale='unit'")


def is_symmetric(contrast: str, hopfield: bool, exclude_above: float | None = None) -> bool:
    """Whether both directions are one sum: without a softmax over rows or columns X·Yᵀ alone counts."""
    return not (CONTRASTS[contrast].softmax or hopfield) and exclude_above is None


def combine(images: Tensor, texts: Tensor, inv_tau: float | Tensor, scale: Scale) -> Tensor:
    """Both directions as one loss: τ · sum (``"paper"``) or mean (``"unit"``)."""
    if scale == "paper":
        return (images + texts) / scalar("inv_tau", inv_tau, images)
    return (images + texts) / 2
