"""What search and evaluation ask of a model, and how it is when it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image


class Encoder(Protocol):
    """Pictures and texts to unit rows; :class:`cloob.models.encoder.DualEncoder` is one."""

    name: str

    def preprocess(self, image: Image, /) -> Tensor:
        """One image to uint8 (3, H, W)."""
        ...

    def encode_image(self, images: Tensor, /) -> Tensor:
        """(n, 3, H, W) to (n, D) unit rows."""
        ...

    def encode_text(self, texts: Sequence[str], /) -> Tensor:
        """T texts to (T, D) unit rows."""
        ...


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Without gradients, and with every module in evaluation mode; the modes are put back afterwards."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
