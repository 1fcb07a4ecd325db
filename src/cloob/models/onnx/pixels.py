"""open_clip's evaluation transform by Pillow and numpy alone: the shorter side resized, the middle cut out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cloob.errors import require

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")


class ShortestTransform:
    """PIL image -> uint8 (3, H, W): the pixels of ``cloob.models.pixels.EvalTransform`` without what that imports.

    Args:
        preprocess_cfg: open_clip's, for which :meth:`suits` holds.
    """

    def __init__(self, preprocess_cfg: dict[str, Any]) -> None:
        self.size = int(preprocess_cfg["size"])
        self.interpolation = str(preprocess_cfg["interpolation"])

    @staticmethod
    def suits(preprocess_cfg: dict[str, Any]) -> bool:
        """Whether this transform is the one that is asked for."""
        asked = {"mode": "RGB", "resize_mode": "shortest"} | preprocess_cfg
        plain = asked["mode"] == "RGB" and asked["resize_mode"] == "shortest"
        return plain and asked.get("interpolation") in _INTERPOLATIONS

    def __call__(self, image: Image) -> Tensor:
        """Resizes and crops one image: uint8 (3, H, W)."""
        tensor: Tensor = importlib.import_module("torch").from_numpy(self.array(image))
        return tensor

    def array(self, image: Image) -> npt.NDArray[np.uint8]:
        """As ``__call__``, without torch."""
        pil = require("PIL.Image", "onnx")
        from cloob.pictures import middle  # needs Pillow, which texts do not

        image = middle(image)
        size, (width, height) = self.size, image.size
        shorter = min(width, height)
        if shorter != size:
            width, height = size * width // shorter, size * height // shorter
            resample = getattr(pil.Resampling, self.interpolation.upper())
            image = image.resize((width, height), resample)
        left, top = round((width - size) / 2), round((height - size) / 2)
        square = image.crop((left, top, left + size, top + size)).convert("RGB")
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
