"""A loaded model as an :class:`cloob.search.ask.embedder.Embedder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cloob.models.encoding import Encoder, evaluating
from cloob.search.store import Vectors

if TYPE_CHECKING:
    from PIL.Image import Image


class ByTorch:
    """Words and pictures through an encoder."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def texts(self, texts: Sequence[str]) -> Vectors:
        """Embeds n texts: (n, D)."""
        with evaluating(self._encoder):
            return _rows(self._encoder.encode_text(list(texts)))

    def pictures(self, images: Sequence[Image]) -> Vectors:
        """Embeds n upright pictures: (n, D)."""
        pixels = torch.stack([self._encoder.preprocess(image) for image in images])
        with evaluating(self._encoder):
            return _rows(self._encoder.encode_image(pixels.to(getattr(self._encoder, "device", "cpu"))))


def _rows(features: torch.Tensor) -> Vectors:
    rows: Vectors = features.float().cpu().numpy()
    return rows
