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


class Encoded:
    """An image file of which the header has been read, and nothing decoded yet.

    Attributes:
        size: Width and height, pixels.
    """

    def __init__(self, data: bytes, key: str = "") -> None:
        """Reads the header.

        Args:
            data: The bytes of a file in any format that Pillow reads.
            key: The sample's key, for the error.

        Raises:
            BadSample: ``"corrupt image"``, or ``"image too large"`` above ``MAX_PIXELS``.
        """
        self._key, self._bytes = key, len(data)
        formats = next((formats for magic, formats in _FORMATS if data.startswith(magic)), None)
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, of palettes and, below our own limit, of large images: nothing to act on.
            warnings.simplefilter("ignore")
            try:
                self._image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
            except Exception as error:  # the decoders raise nearly anything on damaged bytes
                raise self._bad(error) from None
        self.size: tuple[int, int] = self._image.size
        width, height = self.size
        if width * height > MAX_PIXELS:
            raise BadSample("image too large", key, f"{width}×{height} pixels, the limit is {MAX_PIXELS:,}")

    def rgb(self, reduction: int = 1) -> Image.Image:
        """Decodes the image to RGB; once.

        Transparency is dropped as open_clip drops it (``convert("RGB")``); of an animation the first frame counts.

        Args:
            reduction: A JPEG may come out smaller by this factor, 1, 2, 4 or 8: width and height divided by it and
                rounded up. That costs less, as the decoder then computes fewer pixels from the same coefficients, each
                about the mean of those it stands for. Other formats always come out whole.

        Returns:
            A loaded image of mode RGB.

        Raises:
            BadSample: ``"corrupt image"``.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if reduction > 1 and self._image.format in ("JPEG", "MPO"):
                    width, height = self.size
                    # Pillow takes the largest factor that leaves at least this much, which is `reduction` itself.
                    self._image.draft("RGB", (max(1, width // reduction), max(1, height // reduction)))
                if self._image.mode != "RGB":  # for RGB, convert() would be a copy
                    return self._image.convert("RGB")
                self._image.load()
            except Exception as error:
                raise self._bad(error) from None
        return self._image

    def _bad(self, error: Exception) -> BadSample:
        if isinstance(error, Image.DecompressionBombError):
            return BadSample("image too large", self._key, str(error))
        # Pillow's message for an unknown format holds the address of our buffer, which would differ per run.
        said = "not an image file" if "cannot identify" in str(error) else f"{type(error).__name__}: {error}"
        return BadSample("corrupt image", self._key, f"{self._bytes:,} bytes, {said}")


def decode(data: bytes, key: str = "") -> Image.Image:
    """Decodes an image file to RGB, whole; see ``Encoded.rgb``.

    Args:
        data: The bytes of a file in any format that Pillow reads.
        key: The sample's key, for the error.

    Returns:
        A loaded image of mode RGB.

    Raises:
        BadSample: ``"corrupt image"``, or ``"image too large"`` above ``MAX_PIXELS`` (nothing is decoded then).
    """
    return Encoded(data, key).rgb()
