"""Pictures to the pixels of an image tower: opened, turned upright, resized and cropped
as the model wants them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, one_line, require
from cloob.models.settings import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_RESAMPLING = {
    "bicubic": "BICUBIC",
    "random": "BICUBIC",
    "bilinear": "BILINEAR",
    "lanczos": "LANCZOS",
}
# of a picture's sides, up to which all of it is resized for a model that looks at its
# middle
_MAX_RATIO = 64


class EvalTransform:
    """PIL image -> uint8 (3, H, W): open_clip's evaluation transform without its
    normalisation; also by lanczos.
    """

    def __init__(self, preprocess_cfg: Pixels) -> None:
        self._size = int(preprocess_cfg["size"])
        self._mode = preprocess_cfg.get("resize_mode") or "shortest"
        self._interpolation = preprocess_cfg.get("interpolation") or "bicubic"
        if (
            self._mode not in ("shortest", "squash")
            or self._interpolation not in _RESAMPLING
        ):
            raise InputError(
                f"resize_mode {self._mode!r}, interpolation {self._interpolation!r}:"
                " not known here"
            )

    def __call__(self, image: Image) -> Tensor:
        tensor: Tensor = importlib.import_module("torch").from_numpy(self.array(image))
        return tensor

    def array(self, image: Image) -> npt.NDArray[np.uint8]:
        """(3, size, size) uint8: a picture, resized and cropped for the model."""
        pil = require("PIL.Image", "train")  # which texts do not need
        size = width = height = self._size
        if self._mode == "shortest":
            shorter = min(image.size)
            longest = _MAX_RATIO * shorter
            # of a line, whose ends are cut off, the middle: all would fill the memory
            if max(image.size) > longest:
                width = min(image.width, longest)
                height = min(image.height, longest)
                left = (image.width - width) // 2
                top = (image.height - height) // 2
                image = image.crop((left, top, left + width, top + height))
            width = size * image.width // shorter
            height = size * image.height // shorter
        if image.size != (width, height):
            image = image.resize(
                (width, height), pil.Resampling[_RESAMPLING[self._interpolation]]
            )
        left = round((width - size) / 2)
        top = round((height - size) / 2)
        square = image.crop((left, top, left + size, top + size)).convert("RGB")
        return np.array(square).transpose(2, 0, 1)


def open_image(image: Image | str | Path) -> Image:
    """The upright RGB image of an opened image or of the file that a path leads to, see
    ``cloob.pictures``.
    """
    require("PIL.Image", "train")
    # needs Pillow, which texts do not
    from cloob.pictures import Unreadable, decode, read_file, upright

    try:
        if isinstance(image, str | Path):
            return decode(read_file(image))
        return upright(image)
    except Unreadable as error:
        problem = f"{error.reason} ({error.detail})"
    except FileNotFoundError:
        problem = "no such file"
    except (OSError, ValueError) as error:
        problem = f"not a readable image ({one_line(error)})"
    name = image
    if not isinstance(image, str | Path):
        name = f"an image of {image.width}×{image.height} pixels"
    raise InputError(f"{name}: {problem}")
