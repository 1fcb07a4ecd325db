"""Small pictures, made anew from the pixels: nothing of a file but what it shows gets into them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from cloob.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 256
MAX_SIDE = 2048
_LARGEST_REDUCTION = 8  # that a JPEG decoder can do


def thumbnail(data: bytes, side: int = SIDE) -> bytes:
    """A JPEG that fits into a square; upright, transparency on white, without place, time, device or text.

    Args:
        data: The encoded picture, see :mod:`cloob.pictures`.
        side: Of the square, pixels, 1 to ``MAX_SIDE``; smaller pictures stay as large as they are.

    Raises:
        InputError: The side is out of range.
        cloob.pictures.Unreadable: The picture does not decode.
    """
    stream = io.BytesIO()
    small(data, side).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def small(data: bytes, side: int) -> Image:
    """The pixels of :func:`thumbnail`."""
    from cloob.pictures import Encoded  # Pillow: only where pictures are shown

    if not 1 <= side <= MAX_SIDE:
        raise InputError(f"a thumbnail of {side} pixels; 1 to {MAX_SIDE} is wanted")
    encoded = Encoded(data)
    reduction = 1
    while (
        reduction < _LARGEST_REDUCTION and max(encoded.size) >= 4 * reduction * side
    ):  # twice the side is left to resize
        reduction *= 2
    picture = encoded.rgb(reduction)
    picture.thumbnail((side, side))
    return picture


def data_uri(data: bytes, side: int = SIDE) -> str:
    """A thumbnail as a ``data:`` address for a page without other files."""
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail(data, side)).decode()}"
