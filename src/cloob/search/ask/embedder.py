"""What makes rows of a query's words and pictures: a model of the index, or an ONNX folder without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from cloob.search.store import Vectors

if TYPE_CHECKING:
    from PIL.Image import Image


class Embedder(Protocol):
    """Words and pictures to unit rows, at least one at a time."""

    def texts(self, texts: Sequence[str], /) -> Vectors:
        """Embeds n texts: (n, D)."""
        ...

    def pictures(self, images: Sequence[Image], /) -> Vectors:
        """Embeds n upright pictures: (n, D)."""
        ...
