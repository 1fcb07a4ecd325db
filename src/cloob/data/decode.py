"""From the bytes of a sample's image to RGB pixels: ``cloob.pictures``, whose faults become bad samples here."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cloob import pictures
from cloob.data.batch import BadSample
from cloob.pictures import MAX_IMAGE_BYTES, MAX_PIXELS

__all__ = ["MAX_IMAGE_BYTES", "MAX_PIXELS", "Encoded", "decode", "read_image_file"]


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
        return pictures.read_file(path)
    except pictures.Unreadable as error:
        raise BadSample(error.reason, key, f"{prefix}{path} has {error.detail}") from None
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise BadSample("missing image", key, f"{prefix}{path}: {said}") from None


class Encoded:
    """A sample's image file of which the header has been read, see :class:`cloob.pictures.Encoded`."""

    def __init__(self, data: bytes, key: str = "") -> None:
        """Reads the header.

        Args:
            data: The bytes of the file.
            key: The sample's key, for the error.

        Raises:
            BadSample: ``"corrupt image"``, ``"no decoder"``, or ``"image too large"`` above ``MAX_PIXELS``.
        """
        self._key = key
        try:
            self._file = pictures.Encoded(data)
        except pictures.Unreadable as error:
            raise BadSample(error.reason, key, error.detail) from None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture, pixels."""
        return self._file.size

    @property
    def orientation(self) -> int:
        """EXIF's, 1 to 8."""
        return self._file.orientation

    def rgb(self, reduction: int = 1, *, upright: bool = True) -> Image.Image:
        """Decodes the image; arguments and result as of :meth:`cloob.pictures.Encoded.rgb`.

        Raises:
            BadSample: ``"corrupt image"``.
        """
        try:
            return self._file.rgb(reduction, upright=upright)
        except pictures.Unreadable as error:
            raise BadSample(error.reason, self._key, error.detail) from None


def decode(data: bytes, key: str = "") -> Image.Image:
    """Decodes an image file to upright RGB, see :mod:`cloob.pictures`.

    Args:
        data: The bytes of the file.
        key: The sample's key, for the error.

    Returns:
        A loaded image of mode RGB.

    Raises:
        BadSample: As ``Encoded`` and ``Encoded.rgb``; above ``MAX_PIXELS`` nothing is decoded.
    """
    return Encoded(data, key).rgb()
