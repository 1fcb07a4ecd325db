"""A loaded picture as upright RGB: turned as its EXIF says, grey scaled to 8 bits, transparency on white."""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

MOST_RATIO = 64  # of a picture's sides, up to which all of it is resized for a model that looks at its middle
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def axes(orientation: int) -> tuple[bool, bool, bool]:
    """How a stored picture becomes upright: swap rows and columns, then reverse the rows, then the columns."""
    return orientation >= 5, orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)


def exif_of(image: Image.Image) -> Image.Exif | None:
    """What the camera wrote; None where nothing stands or nothing that can be read, which is no fault of the pixels.

    Not ``getexif()``, which in later Pillows also looks into XMP; browsers do not.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
    except Exception:
        return None
    return exif


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation; 1 where there is none, and where it is not one of eight."""
    exif = exif_of(image)
    try:
        orientation = 1 if exif is None else exif.get(Base.Orientation, 1)
    except Exception:  # Pillow raises nearly anything on damaged EXIF
        return 1
    return orientation if orientation in _TURNS else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image upright, without metadata; the same image where it lies upright already."""
    if orientation not in _TURNS:
        return image
    upright = image.transpose(_TURNS[orientation])
    upright.info.clear()  # it would still ask to be turned
    return upright


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as RGB: grey scaled to 8 bits, transparency on white."""
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")  # a conversion to itself would be a copy
        paper = Image.new("RGB", image.size, "white")
        paper.paste(layer, mask=layer)
        return paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floating point as 8 bits."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((values >> 8).astype(np.uint8))  # as Pillow reads colours of 16 bits
    brightest = float(np.nanmax(values, initial=0, where=np.isfinite(values)))
    ranges = (1.0, 2.0**8 - 1, 2.0**16 - 1, 2.0**32 - 1)[image.mode != "F" :]
    white = next((white for white in ranges if brightest <= white), brightest)
    scaled = np.nan_to_num(values * np.float32(255 / white), nan=0.0)
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def middle(image: Image.Image) -> Image.Image:
    """The middle of a picture that is more than ``MOST_RATIO`` times as long as wide; any other as it is.

    For a transform that resizes the shorter side and cuts the middle out: a line of 500,000 pixels would fill the
    memory on the way.
    """
    most = MOST_RATIO * min(image.size)
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))
