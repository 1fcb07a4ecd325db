"""Pictures to the pixels of an image tower: opened, turned upright, resized and cropped as the model wants them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, one_line, require

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_RESIZE_MODES = ("shortest", "squash", "longest")
_RESAMPLING = {"bicubic": "BICUBIC", "random": "BICUBIC", "bilinear": "BILINEAR", "lanczos": "LANCZOS"}


class EvalTransform:
    """PIL image -> uint8 (3, H, W): open_clip's evaluation transform without its normalisation, by Pillow and NumPy.

    ``interpolation`` in the ``preprocess_cfg`` may be ``"lanczos"`` as well.
    """

    def __init__(self, preprocess_cfg: dict[str, Any]) -> None:
        self._size = int(preprocess_cfg["size"])
        self._mode = preprocess_cfg.get("resize_mode") or "shortest"
        self._interpolation = preprocess_cfg.get("interpolation") or "bicubic"
        self._fill = int(preprocess_cfg.get("fill_color") or 0)
        if self._mode not in _RESIZE_MODES or self._interpolation not in _RESAMPLING:
            asked = f"resize_mode {self._mode!r}, interpolation {self._interpolation!r}"
            raise InputError(f"{asked}: open_clip has no such")

    def __call__(self, image: Image) -> Tensor:
        tensor: Tensor = importlib.import_module("torch").from_numpy(self.array(image))
        return tensor

    def array(self, image: Image) -> npt.NDArray[np.uint8]:
        pil = require("PIL.Image", "train")
        from cloob.pictures import middle  # needs Pillow, which texts do not

        image = middle(image) if self._mode == "shortest" else image  # of a line, whose ends are cut off
        size, (width, height) = self._size, image.size
        if self._mode == "squash":
            width = height = size
        elif self._mode == "longest":
            ratio = max(width, height) / size
            width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
        else:
            shorter = min(width, height)
            width, height = size * width // shorter, size * height // shorter
        if image.size != (width, height):
            image = image.resize((width, height), pil.Resampling[_RESAMPLING[self._interpolation]])
        if self._mode == "longest":
            square = pil.new("RGB", (size, size), (self._fill,) * 3)
            square.paste(image, ((size - width) // 2, (size - height) // 2))
        else:
            left, top = round((width - size) / 2), round((height - size) / 2)
            square = image.crop((left, top, left + size, top + size)).convert("RGB")
        return np.array(square).transpose(2, 0, 1)


def open_image(image: Image | str | Path) -> Image:
    """The upright RGB image of an opened image or of the file that a path leads to, see ``cloob.pictures``."""
    require("PIL.Image", "train")
    from cloob.pictures import Unreadable, decode, read_file, upright  # needs Pillow, which texts do not

    name = str(image) if isinstance(image, str | Path) else f"an image of {image.width}×{image.height} pixels"
    try:
        return decode(read_file(image)) if isinstance(image, str | Path) else upright(image)
    except Unreadable as error:
        raise InputError(f"{name}: {error.reason} ({error.detail})") from None
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: not a readable image ({one_line(error)})") from None
