"""Pictures of the test set inside the page: small, upright, as the models see them, and without metadata."""

from __future__ import annotations

import base64
import io

from cloob.pictures import Unreadable, decode

_SIDE = 320
"""Pixels; a picture is at most 160 wide on the page, twice that on a dense screen."""


def data_uri(image: bytes) -> str | None:
    """The picture as a data: URI of a WebP file that is made anew from the pixels.

    So nothing of the file but what it shows gets into the page: no place, time, device, text or smaller picture.

    Args:
        image: The encoded picture, see :mod:`cloob.pictures`.

    Returns:
        The URI; None when it does not decode.
    """
    try:
        picture = decode(image)
    except Unreadable:
        return None
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
