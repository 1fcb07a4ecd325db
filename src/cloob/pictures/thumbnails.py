"""Small pictures, encoded anew from the pixels: no metadata of the file gets into them."""

from __future__ import annotations

import base64
import io
from typing import Literal

from PIL import Image

from cloob.pictures.encoded import Encoded

_MAX_REDUCTION = 8  # of a JPEG decoder


def shrunk(picture: bytes | Image.Image, side: int) -> Image.Image:
    """A picture that fits into a square.

    Args:
        picture: The bytes of an image file, or an upright RGB picture, which stays as it is.
        side: Of the square, pixels; a smaller picture keeps its size.

    Raises:
        cloob.pictures.Unreadable: The bytes do not decode.
    """
    if isinstance(picture, bytes):
        encoded, reduction = Encoded(picture), 1
        while reduction < _MAX_REDUCTION and max(encoded.size) >= 4 * reduction * side:  # twice the side is left
            reduction *= 2
        small = encoded.rgb(reduction)
    else:
        small = picture.copy()
    small.thumbnail((side, side))
    return small


def thumbnail(picture: bytes | Image.Image, side: int, kind: Literal["JPEG", "PNG"] = "JPEG") -> bytes:
    """The file of :func:`shrunk`."""
    stream = io.BytesIO()
    shrunk(picture, side).save(stream, kind, quality=85)
    return stream.getvalue()


def data_uri(picture: bytes | Image.Image, side: int) -> str:
    """A thumbnail as a ``data:`` address, for a page without other files."""
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail(picture, side)).decode()}"
