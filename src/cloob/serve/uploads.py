"""Pictures that people bring: checked, kept in memory for a while, and forgotten."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from cloob.errors import InputError
from cloob.pictures import MAX_PIXELS, Encoded, Unreadable
from cloob.pictures.thumbnails import thumbnail
from cloob.serve.guard import ServeConfig

Row = npt.NDArray[np.float32]
_THUMBNAIL = 256  # pixels a side


class Unsupported(InputError):  # noqa: N818 - the picture is at fault
    """What was uploaded is no picture that can be read."""


class TooLarge(InputError):  # noqa: N818 - the picture is at fault
    """A picture of too many bytes or pixels."""


@dataclass(frozen=True)
class Upload:
    """A picture as it is remembered."""

    id: str  # the first half of its bytes' SHA-256: who knows it had the picture
    data: bytes  # of the file
    width: int  # upright, pixels
    height: int
    thumbnail: bytes  # JPEG
    rows: dict[str, Row] = field(default_factory=dict)  # a unit row (D,) for each model asked, by its fingerprint


class Uploads:
    """The uploads used last; they live in the server's memory and end with it."""

    def __init__(self, most: int = 256, most_bytes: int = 256_000_000) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._held: OrderedDict[str, Upload] = OrderedDict()

    def add(self, upload: Upload) -> None:
        """Remembers one; those used longest ago go while there are too many or too large ones."""
        self._held[upload.id] = upload
        while len(self._held) > self._most or sum(len(each.data) for each in self._held.values()) > self._most_bytes:
            self._held.popitem(last=False)

    def get(self, id_: str) -> Upload | None:
        """One of them; None where it was never there or is gone."""
        if id_ in self._held:
            self._held.move_to_end(id_)
        return self._held.get(id_)


def upload_id(data: bytes) -> str:
    """What an upload is called."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_upload(data: bytes, config: ServeConfig) -> Upload:
    """Checks a picture and draws its thumbnail; raises as ``decode_upload``."""
    image = decode_upload(data, config)
    return Upload(upload_id(data), data, *image.size, thumbnail(image, _THUMBNAIL))


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
