"""How a model's embeddings of image–text pairs lie on the sphere, in the paper's measures.

Most of the measures depend on the number of pairs n: compare them at equal n only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.functional import geometry as measures
from cloob.functional import hopfield_retrieval

DEFAULT_LIMIT = 10_000
_CHUNK = 1024


def geometry(
    image_features: Tensor, text_features: Tensor, inv_tau: float, beta: float, limit: int = DEFAULT_LIMIT
) -> dict[str, Any]:
    """Measures the embeddings of n pairs and of their Hopfield retrievals, the anchors of the CLOOB objective.

    Args:
        image_features: (n, D) unit rows.
        text_features: (n, D) unit rows; pairs with a NaN row in either are left out.
        inv_tau: τ⁻¹ of the saturation of InfoNCE.
        beta: β of the retrievals: images from the memory of all images, texts from that of all texts.
        limit: Pairs measured at most, evenly spaced over the set (time is O(n²)).
    """
    kept = (torch.isfinite(image_features).all(1) & torch.isfinite(text_features).all(1)).nonzero()[:, 0]
    if len(kept) < 2:
        raise InputError(f"geometry needs at least 2 pairs with finite embeddings, got {len(kept)}")
    if len(kept) > limit:
        kept = kept[torch.arange(limit) * len(kept) // limit]
    image, text = image_features[kept], text_features[kept]
    clouds = {
        "image": image,
        "text": text,
        "image_retrieved": _retrieve(image, beta),
        "text_retrieved": _retrieve(text, beta),
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
