"""From the bytes of an image file to RGB pixels, with limits and without warnings."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from PIL import Image

from cloob.data.batch import BadSample

MAX_PIXELS = 100_000_000
"""An image with more pixels is left out (300 MB as RGB)."""

MAX_IMAGE_BYTES = 256 * 1024 * 1024
"""An image file of more bytes is left out before it is read."""

# Asking Pillow for the one format that the first bytes announce spares it the attempts at all others (a fifth of the
# time of a small image). Anything else is tried in every format it knows.
_FORMATS = ((b"\xff\xd8\xff", ("JPEG",)), (b"\x89PNG", ("PNG",)), (b"RIFF", ("WEBP",)))


def read_image_file(path: Path | str, key: str, where: str = "") -> bytes:
    """Reads an image file whole.

    Args:
        path: The file.
        key: The sample's key.
        where: What the detail of a failure starts with.

    Raises:
        BadSample: There is no such file, it cannot be read, or it is above ``MAX_IMAGE_BYTES``.
    """
    prefix = f"{where}: " if where else ""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - Path.open costs more, and this runs per sample
            size = os.fstat(file.fileno()).st_size
            if size > MAX_IMAGE_BYTES:
                raise BadSample("image too large", key, f"{prefix}{path} has {size:,} bytes")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise BadSample("missing image", key, f"{prefix}{path}: {said}") from None


def decode(data: bytes, key: str = "") -> Image.Image:
    """Decodes an image file to RGB.

    Transparency is dropped as open_clip drops it (``convert("RGB")``); of an animation the first frame counts.

    Args:
        data: The bytes of a file in any format that Pillow reads.
        key: The sample's key, for the error.

    Returns:
        A loaded image of mode RGB.

    Raises:
        BadSample: ``"corrupt image"``, or ``"image too large"`` above ``MAX_PIXELS`` (nothing is decoded then).
    """
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, of palettes and, below our own limit, of large images: nothing to act on.
        warnings.simplefilter("ignore")
        try:
            formats = next((formats for magic, formats in _FORMATS if data.startswith(magic)), None)
            image = Image.open(io.BytesIO(data), formats=formats)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadSample("image too large", key, f"{width}×{height} pixels, the limit is {MAX_PIXELS:,}")
            return image.convert("RGB")
        except BadSample:
            raise
        except Image.DecompressionBombError as error:
            raise BadSample("image too large", key, str(error)) from None
        except Exception as error:  # the decoders raise nearly anything on damaged bytes
            # Pillow's message for an unknown format holds the address of our buffer, which would differ per run.
            said = "not an image file" if "cannot identify" in str(error) else f"{type(error).__name__}: {error}"
            raise BadSample("corrupt image", key, f"{len(data):,} bytes, {said}") from None
