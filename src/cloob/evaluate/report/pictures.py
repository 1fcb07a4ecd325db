"""Pictures of the test set inside the page: small, whatever their files are."""

from __future__ import annotations

import base64
import io
import warnings

from cloob.errors import require

_SIDE = 320
"""Pixels; a picture is at most 160 wide on the page, twice that on a dense screen."""
_SMALL = 16_384
"""Bytes of a file that is taken as it is."""


def data_uri(image: bytes) -> str | None:
    """The picture as a data: URI, made smaller where its file is large or of a kind that not every browser shows.

    Args:
        image: The encoded picture, of any kind that Pillow reads.

    Returns:
        The URI; None when it does not decode.
    """
    kind = _browser_kind(image)
    if kind is None or len(image) > _SMALL:
        kind, image = "webp", _thumbnail(image)
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}" if image else None


def _browser_kind(image: bytes) -> str | None:
    kinds = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((kind for magic, kind in kinds.items() if image.startswith(magic)), None)


def _thumbnail(image: bytes) -> bytes:
    """A WebP file, the first frame of an animation; empty when the bytes do not decode."""
    pil = require("PIL.Image", "train")
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with pil.open(io.BytesIO(image)) as opened:
                opened.draft("RGB", (_SIDE, _SIDE))
                picture = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
        except Exception:  # the decoders raise nearly anything on damaged bytes
            return b""
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(stream, "WEBP", quality=80)
    return stream.getvalue()
