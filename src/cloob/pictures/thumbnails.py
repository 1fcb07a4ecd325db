"""Small pictures, encoded anew from the pixels: no metadata of the file gets into them."""

from __future__ import annotations

import base64
import io
from typing import Literal

from PIL import Image

from cloob.pictures.encoded import Encoded


def thumbnail(picture: bytes | Image.Image, side: int, kind: Literal["JPEG", "PNG"] = "JPEG") -> bytes:
    """The file of a picture (of an image file, or upright RGB) that fits into a square of ``side`` pixels."""
    if isinstance(picture, bytes):
        encoded = Encoded(picture)
        longer = max(encoded.size)
        small = encoded.rgb(next((r for r in (8, 4, 2) if longer >= 2 * r * side), 1))  # twice the side is left
    else:
        small = picture.copy()
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, kind, quality=85)
    return stream.getvalue()


def data_uri(picture: bytes | Image.Image, side: int) -> str:
    """A thumbnail as a ``data:`` address, for a page without other files."""
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail(picture, side)).decode()}"
