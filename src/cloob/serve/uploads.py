"""Pictures that people bring: checked, embedded at once, and forgotten but for their vectors and a thumbnail."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cloob.errors import InputError
from cloob.pictures import MAX_PIXELS, Encoded, Unreadable
from cloob.serve.settings import ServeConfig

Row = npt.NDArray[np.float32]
_THUMBNAIL = 256


class Unsupported(InputError):  # noqa: N818 - the picture is at fault
    """What was uploaded is no picture that can be read."""


class TooLarge(InputError):  # noqa: N818 - the picture is at fault
    """A picture of too many bytes or pixels."""


@dataclass(frozen=True)
class Upload:
    """A picture as it is remembered.

    Attributes:
        id: SHA-256 of its bytes, the first 32 digits: who knows it had the picture.
        width: Upright, pixels.
        height: Upright, pixels.
        thumbnail: JPEG.
        rows: A unit row (D,) for each model, by its fingerprint.
    """

    id: str
    width: int
    height: int
    thumbnail: bytes
    rows: Mapping[str, Row]


class Uploads:
    """The uploads used last; lives in the server's memory and ends with it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[str, Upload] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, upload: Upload) -> None:
        """Remembers one; the one used longest ago goes when there are too many."""
        self._held[upload.id] = upload
        self._held.move_to_end(upload.id)
        while len(self._held) > self._most:
            self._held.popitem(last=False)

    def get(self, id_: str) -> Upload | None:
        """One of them; None where it was never there or is gone."""
        if id_ in self._held:
            self._held.move_to_end(id_)
        return self._held.get(id_)


def upload_id(data: bytes) -> str:
    """What an upload is called."""
    return hashlib.sha256(data).hexdigest()[:32]


def decode_upload(data: bytes, config: ServeConfig) -> Image.Image:
    """The upright RGB picture of an upload; its header is looked at before a pixel is decoded.

    Raises:
        TooLarge: Too many bytes or pixels.
        Unsupported: No picture, a damaged one, or a format without a decoder here.
    """
    if len(data) > config.max_upload_bytes:
        raise TooLarge(f"{len(data):,} bytes; at most {config.max_upload_bytes:,} are taken")
    try:
        encoded = Encoded(data)
        (width, height), decoded = encoded.in_file, encoded.stored  # not `size`: a PNG with EXIF would be decoded
        if width * height > MAX_PIXELS or decoded[0] * decoded[1] > config.max_upload_pixels:
            raise TooLarge(f"{width}×{height} pixels; at most {config.max_upload_pixels:,} are taken")
        return encoded.rgb()
    except Unreadable as error:
        if error.reason == "image too large":
            raise TooLarge(f"the picture is too large; at most {config.max_upload_pixels:,} pixels are taken") from None
        why = f" ({error.detail})" if error.reason == "no decoder" else ""
        raise Unsupported(f"{error.reason}{why}; JPEG, PNG, WebP, GIF, AVIF and HEIC can be read") from None


def thumbnail(image: Image.Image) -> bytes:
    """A JPEG of at most 256 pixels a side, without metadata."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return stream.getvalue()
