"""The header of an image file first, then its pixels: what is decoded, and how small."""

from __future__ import annotations

import io
import warnings
from functools import cached_property
from pathlib import Path

from PIL import IcoImagePlugin, Image, JpegImagePlugin, UnidentifiedImageError

from cloob.files import TooLarge, read_at_most
from cloob.pictures.limits import MAX_IMAGE_BYTES, Unreadable, check_header, check_pixels, formats_of, raise_bound
from cloob.pictures.rgb import exif_of, orientation_of, to_rgb, turned

WHOLE_PIXELS = 32_000_000
"""A JPEG with more pixels is decoded smaller, which bounds what its pixels take to 128 MB (Pillow: 4 bytes each)."""

MOST_RATIO = 64
"""Of a picture's sides, up to which all of it is resized for a model that looks at its middle."""

MAX_MISSING = 0.1
"""Of the rows of a JPEG that lacks its end, how many may be missing."""

_ICON = b"\0\0\1\0"
_LARGEST_REDUCTION = 8  # what a JPEG decoder can do
_END = b"\xff\xd9"  # of a JPEG


class Encoded:
    """An image file of which the header has been read, and nothing decoded yet.

    Of a PNG with EXIF all is decoded when its orientation, ``size``, ``whole`` or ``exif`` is asked for: that chunk may
    come last.

    Attributes:
        in_file: Width and height as the file has them, pixels.
        stored: Width and height as the decoder gives them, pixels; of a JPEG above ``WHOLE_PIXELS`` those it is decoded
            at.
        truncated: Whether ``rgb()`` found a JPEG without its end, and took it: what is missing is grey.
    """

    def __init__(self, data: bytes, max_pixels: int | None = None) -> None:
        """Reads the header.

        Args:
            data: The bytes of a file: JPEG, PNG, WebP, GIF, AVIF, HEIC, TIFF, BMP, and what else ``limits`` names.
            max_pixels: A larger image is refused; None: above the limits of ``limits``, which this may also raise.

        Raises:
            Unreadable: ``"corrupt image"``, ``"image too large"`` above a limit of ``limits``, or ``"no decoder"`` for
                a format that needs another package, and for JPEG 2000.
        """
        self._data, self._max_pixels = data, max_pixels
        if max_pixels is not None:
            raise_bound(max_pixels)
        self.truncated = False
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, of palettes and, below our own limit, of large images: nothing to act on.
            warnings.simplefilter("ignore")
            try:
                if data.startswith(_ICON):
                    # Pillow decodes its first picture while it opens the icon.
                    entry = IcoImagePlugin.IcoFile(io.BytesIO(data)).entry[0]
                    check_header(Image.open(io.BytesIO(data[entry.offset :]), formats=("PNG", "DIB")), data, max_pixels)
                self._image = _open(data)
                check_header(self._image, data, max_pixels)
            except Unreadable:
                raise
            except Exception as error:  # the decoders raise nearly anything on damaged bytes
                raise self._bad(error) from None
        self._exif_may_come_last = self._image.format == "PNG" and b"eXIf" in data
        self.in_file = self._image.size
        self._reducible = self._image.format in ("JPEG", "MPO")
        self._least = _least_reduction(*self.in_file) if self._reducible else 1
        self.stored: tuple[int, int] = _reduced(self.in_file, self._least)

    @cached_property
    def orientation(self) -> int:
        """EXIF's, 1 to 8: how the stored picture is turned to be upright.

        Raises:
            Unreadable: A PNG with EXIF that is damaged.
        """
        self._load_exif()
        # Pillow turns a TIFF itself while it loads it.
        return 1 if self._image.format == "TIFF" else orientation_of(self._image)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what ``rgb()`` gives upright, pixels; errors as ``orientation``."""
        return self._upright(self.stored)

    @property
    def whole(self) -> tuple[int, int]:
        """Width and height of the upright picture in the file, of which ``rgb()`` may give less; errors likewise."""
        return self._upright(self.in_file)

    def _upright(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[::-1] if self.orientation >= 5 else size

    @property
    def exif(self) -> Image.Exif | None:
        """What the camera wrote; before the image is decoded. Errors as ``orientation``."""
        self._load_exif()
        return exif_of(self._image)

    def rgb(self, reduction: int = 1, *, upright: bool = True) -> Image.Image:
        """Decodes the image; once.

        Args:
            reduction: A JPEG may come out smaller by this factor, 1, 2, 4 or 8: width and height divided by it and
                rounded up. That costs less, as the decoder then computes fewer pixels from the same coefficients, each
                about the mean of those it stands for. Other formats always come out whole, and a JPEG never at less
                than an eighth of what its file holds.
            upright: Turn it; else it lies as it is stored.

        Returns:
            A loaded image of mode RGB without metadata.

        Raises:
            Unreadable: ``"corrupt image"``, or ``"image too large"`` where it takes more memory than there is.
        """
        orientation = self.orientation  # which goes with the metadata
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                factor = min(_LARGEST_REDUCTION, self._least * reduction)
                try:
                    self._load(factor)
                except OSError:
                    if not self._reducible:
                        raise
                    self._load_truncated(factor)
                check_pixels(self._image, self._max_pixels)
                image = to_rgb(self._image)
                image.info.clear()
            except Unreadable:
                raise
            except Exception as error:
                raise self._bad(error) from None
        return turned(image, orientation) if upright else image

    def _load(self, factor: int) -> None:
        if factor > 1 and self._reducible:
            width, height = self.in_file
            # Pillow takes the largest factor that leaves at least this much, which is `factor` itself.
            self._image.draft("RGB", (max(1, width // factor), max(1, height // factor)))
        self._image.load()

    def _load_truncated(self, factor: int) -> None:
        """Loads a JPEG that lacks its end."""
        self._image = _open(self._data + _END)
        self._load(factor)
        missing = _missing(self._image)
        if missing > MAX_MISSING:
            raise Unreadable("corrupt image", f"{len(self._data):,} bytes, {missing:.0%} of its rows missing")
        self.truncated = True

    def _load_exif(self) -> None:
        if self._exif_may_come_last:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    self._image.load()
                except Exception as error:
                    raise self._bad(error) from None
            self._exif_may_come_last = False

    def _bad(self, error: Exception) -> Unreadable:
        if isinstance(error, Image.DecompressionBombError | MemoryError):
            return Unreadable("image too large", str(error) or "it takes more memory than there is")
        # Pillow's message for an unknown format holds the address of our buffer, which would differ per run.
        unknown = isinstance(error, UnidentifiedImageError | SyntaxError)
        said = "not an image file" if unknown else f"{type(error).__name__}: {error}"
        return Unreadable("corrupt image", f"{len(self._data):,} bytes, {said}")


def _open(data: bytes) -> Image.Image:
    formats = formats_of(data)
    if formats == ("JPEG",):  # `Image.open` would refuse one above its bound, however small it is decoded
        return JpegImagePlugin.jpeg_factory(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=formats)


def _missing(image: Image.Image) -> float:
    """The fraction of rows, from the lower end, that are the grey with which the decoder fills what it has not got."""
    filled = [value not in (127, 128) for value in range(256)]
    box = image.point(filled * len(image.getbands())).getbbox()
    return 1 - (box[3] if box else 0) / image.height


def decode(data: bytes) -> Image.Image:
    """Decodes an image file to upright RGB; errors as ``Encoded`` and ``Encoded.rgb``."""
    return Encoded(data).rgb()


def middle(image: Image.Image) -> Image.Image:
    """The middle of a picture that is more than ``MOST_RATIO`` times as long as wide; any other as it is.

    For a transform that resizes the shorter side and cuts the middle out: a line of 500,000 pixels would fill the
    memory on the way.
    """
    short = min(image.size)
    keep = [min(side, MOST_RATIO * short) for side in image.size]
    if tuple(keep) == image.size:
        return image
    left, top = ((side - kept) // 2 for side, kept in zip(image.size, keep, strict=True))
    return image.crop((left, top, left + keep[0], top + keep[1]))


def upright(image: Image.Image) -> Image.Image:
    """What ``decode`` gives for the file of an opened image; the image itself stays as it is.

    Raises:
        Unreadable: As ``Encoded``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_pixels(image)
            image.load()  # before the orientation is asked for: a TIFF is turned while it is loaded
            orientation = orientation_of(image)
            return turned(to_rgb(image), orientation)
        except Unreadable:
            raise
        except Exception as error:
            raise Unreadable("corrupt image", f"{type(error).__name__}: {error}") from None


def read_file(path: Path | str) -> bytes:
    """Reads an image file whole.

    Raises:
        OSError, ValueError: There is no such file, or it cannot be read (ValueError: a NUL in the path); a pipe or a
            device never is.
        Unreadable: It is above ``MAX_IMAGE_BYTES``.
    """
    try:
        return read_at_most(path, MAX_IMAGE_BYTES)
    except TooLarge as error:
        raise Unreadable("image too large", f"{error.size:,} bytes, the limit is {MAX_IMAGE_BYTES:,}") from None


def _least_reduction(width: int, height: int) -> int:
    """The smallest of 1, 2, 4, 8 at which a JPEG has at most ``WHOLE_PIXELS``."""
    reduction = 1
    while reduction < _LARGEST_REDUCTION and width * height > WHOLE_PIXELS * reduction**2:
        reduction *= 2
    return reduction


def _reduced(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)
