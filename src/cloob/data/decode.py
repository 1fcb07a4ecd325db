"""From the bytes of a sample's image to RGB pixels: ``cloob.pictures``, whose faults become bad samples here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from PIL import Image

from cloob import pictures
from cloob.data.batch import BadSample


def read_image_file(path: Path | str, key: str, where: str = "") -> bytes:
    """Reads an image file whole.

    Args:
        path: The file.
        key: The sample's key.
        where: What the detail of a failure starts with.

    Raises:
        BadSample: There is no such file, it cannot be read, or it is above ``cloob.pictures.MAX_IMAGE_BYTES``.
    """
    prefix = f"{where}: " if where else ""
    try:
        return pictures.read_file(path)
    except pictures.Unreadable as error:
        raise BadSample(error.reason, key, f"{prefix}{path} has {error.detail}") from None
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise BadSample("missing image", key, f"{prefix}{path}: {said}") from None


class Encoded(pictures.Encoded):
    """A sample's image file of which the header has been read, see :class:`cloob.pictures.Encoded`.

    Args:
        data: The bytes of the file.
        key: The sample's key, for the error.

    Raises:
        BadSample: ``"corrupt image"``, ``"no decoder"``, or ``"image too large"`` above one of the limits of
            ``cloob.pictures``; ``rgb`` and ``orientation`` too.
    """

    def __init__(self, data: bytes, key: str = "") -> None:
        self._key = key
        with _bad_sample(key):
            super().__init__(data)

    @cached_property
    def orientation(self) -> int:
        """See :attr:`cloob.pictures.Encoded.orientation`."""
        with _bad_sample(self._key):
            return super().orientation

    def rgb(self, reduction: int = 1, *, upright: bool = True) -> Image.Image:
        """Decodes the image; arguments and result as of :meth:`cloob.pictures.Encoded.rgb`."""
        with _bad_sample(self._key):
            return super().rgb(reduction, upright=upright)


@contextmanager
def _bad_sample(key: str) -> Iterator[None]:
    try:
        yield
    except pictures.Unreadable as error:
        raise BadSample(error.reason, key, error.detail) from None


def decode(data: bytes, key: str = "") -> Image.Image:
    """Decodes an image file to upright RGB, see :mod:`cloob.pictures`; arguments and errors as ``Encoded``."""
    return Encoded(data, key).rgb()
