"""How a model's embeddings of image–text pairs lie on the sphere, in the paper's measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cloob.functional import geometry as measures
from cloob.functional import hopfield_retrieval

DEFAULT_LIMIT = 10_000
_CHUNK = 1024


def geometry(
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float,
    beta: float,
    limit: int = DEFAULT_LIMIT,
) -> dict[str, Any]:
    """Measures the geometry of the embeddings of n pairs and of their Hopfield retrievals.

    Most of the measures depend on n, so only values of equal ``n`` compare. The retrievals are U_x (image
    queries in the memory of all images) and V_y (text queries in the memory of all texts), the anchors of the
    CLOOB objective.

    Args:
        image_features: (n, D) unit rows.
        text_features: (n, D) unit rows; pairs with a NaN row in either are left out.
        inv_tau: τ⁻¹ at which the saturation of InfoNCE is measured (use one value for all models to be
            compared by geometry alone, each model's own to see what its training sees).
        beta: β of the retrievals.
        limit: At most so many pairs, evenly spaced over the set, are measured (time is O(n²)).

    Returns:
        ``n``; ``effective_eigenvalues_image``, ``_text``, ``_image_retrieved``, ``_text_retrieved`` (99 % of
        the variance); ``ajne_image``, ``ajne_text``; ``alignment``; ``uniformity_image``,
        ``uniformity_text``; ``modality_gap``; ``saturation`` (mean of both directions); ``spectrum_image``,
        ``spectrum_text``, ``spectrum_image_retrieved``, ``spectrum_text_retrieved``: lists of D eigenvalues,
        descending, in six digits.

    Raises:
        ValueError: Shapes that differ, fewer than 2 finite pairs, or τ⁻¹ or β not positive.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        raise ValueError(f"expected (n, D) features of one shape, got {shapes}")
    finite = torch.isfinite(image_features).all(1) & torch.isfinite(text_features).all(1)
    kept = finite.nonzero()[:, 0]
    if len(kept) < 2:
        raise ValueError(f"geometry needs at least 2 pairs with finite embeddings, got {len(kept)}")
    if len(kept) > limit:
        kept = kept[torch.arange(limit) * len(kept) // limit]
    image, text = image_features[kept], text_features[kept]
    retrieved = {name: _retrieve(x, beta) for name, x in (("image", image), ("text", text))}
    clouds = {
        "image": image,
        "text": text,
        "image_retrieved": retrieved["image"],
        "text_retrieved": retrieved["text"],
    }
    saturation = measures.saturation(image, text, inv_tau) + measures.saturation(text, image, inv_tau)
    return {
        "n": len(kept),
        **{f"effective_eigenvalues_{k}": int(measures.effective_eigenvalues(x)) for k, x in clouds.items()},
        "ajne_image": float(measures.ajne(image)),
        "ajne_text": float(measures.ajne(text)),
        "alignment": float(measures.alignment(image, text)),
        "uniformity_image": float(measures.uniformity(image)),
        "uniformity_text": float(measures.uniformity(text)),
        "modality_gap": float(measures.modality_gap(image, text)),
        "saturation": float(saturation) / 2,
        **{f"spectrum_{k}": _digits(measures.covariance_spectrum(x)) for k, x in clouds.items()},
    }


def _retrieve(x: Tensor, beta: float) -> Tensor:
    return torch.cat([hopfield_retrieval(part, x, beta) for part in torch.split(x, _CHUNK)])


def _digits(spectrum: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in spectrum.tolist()]
