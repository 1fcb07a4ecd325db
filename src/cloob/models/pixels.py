"""Pictures to the pixels of an image tower: opened, turned upright, resized and cropped as the model wants them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cloob.errors import InputError, require
from cloob.models.importing import import_open_clip

if TYPE_CHECKING:
    from PIL.Image import Image


class EvalTransform:
    """PIL image -> uint8 (3, H, W): open_clip's evaluation transform up to, and without, its normalisation.

    Of a picture that is a line only the middle is resized, see ``cloob.pictures.middle``.

    A small object of its own, so that a loader's worker gets it without the towers.
    """

    def __init__(self, preprocess_cfg: dict[str, Any]) -> None:
        """Builds open_clip's transform.

        Args:
            preprocess_cfg: open_clip's: ``size``, ``mean``, ``std``, ``resize_mode``, and ``interpolation``,
                which may be ``"lanczos"`` as well.
        """
        transform = import_open_clip(".transform")
        vision = require("torchvision.transforms", "train")
        lanczos = preprocess_cfg.get("interpolation") == "lanczos"  # open_clip has no such transform
        known = preprocess_cfg | {"interpolation": "bicubic"} if lanczos else preprocess_cfg
        composed = transform.image_transform_v2(transform.PreprocessCfg(**known), is_train=False)
        if lanczos:
            resize = composed.transforms[0]
            assert isinstance(resize, vision.Resize), resize
            resize.interpolation = vision.InterpolationMode.LANCZOS
        self._cuts = known.get("resize_mode", "shortest") == "shortest"
        *geometry, to_tensor, normalize = composed.transforms
        assert isinstance(to_tensor, vision.ToTensor), to_tensor
        assert isinstance(normalize, vision.Normalize), normalize
        self._transform = vision.Compose([*geometry, vision.PILToTensor()])

    def __call__(self, image: Image) -> Tensor:
        """Resizes and crops one image: uint8 (3, H, W)."""
        from cloob.pictures import middle  # needs Pillow, which texts do not

        pixels: Tensor = self._transform(middle(image) if self._cuts else image)
        return pixels


def open_image(image: Image | str | Path) -> Image:
    """The upright RGB image of an opened image or of the file that a path leads to, see ``cloob.pictures``."""
    pil = require("PIL.Image", "train")
    from cloob.pictures import Unreadable, decode, read_file, upright  # needs Pillow, which texts do not

    if not isinstance(image, pil.Image | str | Path):
        raise TypeError(f"images: PIL images or paths, not {type(image).__name__}; pixels go in as one tensor")
    name = str(image) if isinstance(image, str | Path) else f"an image of {image.width}×{image.height} pixels"
    try:
        return decode(read_file(image)) if isinstance(image, str | Path) else upright(image)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Unreadable as error:
        said = "not a readable image" if error.reason == "corrupt image" else error.reason
        raise InputError(f"{name}: {said} ({' '.join(error.detail.split())})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: not a readable image ({' '.join(str(error).split())})") from None
