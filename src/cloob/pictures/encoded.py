"""The header of an image file first, then its pixels: what is refused, what is decoded, and how small."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from cloob.files import TooLarge, read_at_most
from cloob.pictures.rgb import exif_of, orientation_of, to_rgb, turned

# What is larger is refused by its header: MAX_PIXELS is Pillow's own bound, 0.7 GB at 4 bytes a pixel. Of a JPEG a
# decoder needs to give an eighth of the sides only. A file of more bytes is refused before it is read.
MAX_PIXELS = 178_956_970
MAX_JPEG_PIXELS = 2_048_000_000
MAX_IMAGE_BYTES = 256 * 1024 * 1024
MAX_SCANS = 24  # a progressive JPEG goes over no more pixels than so many scans of the largest picture
WHOLE_PIXELS = 32_000_000  # a JPEG with more is decoded smaller, which bounds what its pixels take to 128 MB
MAX_MISSING = 0.1  # of the rows of a JPEG that lacks its end

Fault = Literal["corrupt image", "image too large", "no decoder"]

# Asking Pillow for the one format that the first bytes announce spares it the attempts at all others (a fifth of the
# time of a small image). Anything else is tried as one of these: a format that Pillow hands to another program (EPS) is
# not among them.
_FORMATS = ((b"\xff\xd8\xff", ("JPEG",)), (b"\x89PNG", ("PNG",)), (b"RIFF", ("WEBP",)))
_OTHERS = ("GIF", "BMP", "TIFF", "PPM", "DIB", "ICO", "PCX", "PSD", "QOI", "SGI", "WEBP", "PNG", "JPEG", "TGA")
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_REDUCTIONS = (1, 2, 4, 8)  # what a JPEG decoder can do
_END = b"\xff\xd9"  # of a JPEG


class Unreadable(Exception):  # noqa: N818 - the file is at fault, not the program
    """An image file that cannot be decoded: ``reason``, and ``detail``, what was found."""

    def __init__(self, reason: Fault, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Fault = reason
        self.detail = detail


class Encoded:
    """An image file of which the header has been read, and nothing decoded yet.

    Of a PNG with EXIF all is decoded when its orientation, ``size``, ``whole`` or ``exif`` is asked for: that chunk may
    come last. What cannot be decoded is ``Unreadable`` here and in each of these.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.truncated = False  # whether `rgb()` found a JPEG without its end, and took it: what is missing is grey
        with _decoding(len(data)):
            self._image = _open(data)
            _check_pixels(self._image)
            if "progressive" in self._image.info:
                width, height = self._image.size
                scans = data.count(b"\xff\xda")
                if scans * width * height > MAX_SCANS * MAX_PIXELS:
                    raise Unreadable("image too large", f"{scans:,} scans of {width}×{height} pixels")
        self._exif_may_come_last = self._image.format == "PNG" and b"eXIf" in data
        self.in_file = width, height = self._image.size  # pixels as the file has them
        self._reducible = self._image.format in ("JPEG", "MPO")
        enough = (r for r in _REDUCTIONS if width * height <= WHOLE_PIXELS * r**2)
        self._least = next(enough, _REDUCTIONS[-1]) if self._reducible else 1
        self.stored: tuple[int, int] = (
            -(-width // self._least),
            -(-height // self._least),
        )  # as the decoder gives them

    @cached_property
    def orientation(self) -> int:
        """EXIF's, 1 to 8: how the stored picture is turned to be upright."""
        self._load_exif()
        # Pillow turns a TIFF itself while it loads it.
        return 1 if self._image.format == "TIFF" else orientation_of(self._image)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what ``rgb()`` gives, upright."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    @property
    def whole(self) -> tuple[int, int]:
        """Width and height of the picture in the file, upright."""
        return self.in_file[::-1] if self.orientation >= 5 else self.in_file

    @property
    def exif(self) -> Image.Exif | None:
        """What the camera wrote; before the image is decoded."""
        self._load_exif()
        return exif_of(self._image)

    def rgb(self, reduction: int = 1, *, upright: bool = True) -> Image.Image:
        """Decodes the image, once, to RGB without metadata; without ``upright`` it lies as it is stored.

        A JPEG may come out smaller by ``reduction``, 1, 2, 4 or 8, which costs less: width and height divided by it and
        rounded up, never less than an eighth of what the file holds. Other formats always come out whole.
        """
        orientation = self.orientation  # which goes with the metadata
        factor = min(_REDUCTIONS[-1], self._least * reduction)
        with _decoding(len(self._data)):
            try:
                self._load(factor)
            except OSError:
                if not self._reducible:
                    raise
                self._image = _open(self._data + _END)
                self._load(factor)
                missing = _missing(self._image)
                if missing > MAX_MISSING:
                    said = f"{len(self._data):,} bytes, {missing:.0%} of its rows missing"
                    raise Unreadable("corrupt image", said) from None
                self.truncated = True
            _check_pixels(self._image)
            image = to_rgb(self._image)
            image.info.clear()
        return turned(image, orientation) if upright else image

    def _load(self, factor: int) -> None:
        if factor > 1 and self._reducible:
            width, height = self.in_file
            # Pillow takes the largest factor that leaves at least this much, which is `factor` itself.
            self._image.draft("RGB", (max(1, width // factor), max(1, height // factor)))
        self._image.load()

    def _load_exif(self) -> None:
        if self._exif_may_come_last:
            with _decoding(len(self._data)):
                self._image.load()
            self._exif_may_come_last = False


def decode(data: bytes) -> Image.Image:
    """Decodes an image file to upright RGB; errors as ``Encoded``."""
    return Encoded(data).rgb()


def upright(image: Image.Image) -> Image.Image:
    """What ``decode`` gives for the file of an opened image; the image itself stays as it is. Errors as ``Encoded``."""
    with _decoding():
        _check_pixels(image)
        image.load()  # before the orientation is asked for: a TIFF is turned while it is loaded
        return turned(to_rgb(image), orientation_of(image))


def read_file(path: Path | str) -> bytes:
    """Reads an image file whole; Unreadable above ``MAX_IMAGE_BYTES``, OSError or ValueError where there is none."""
    try:
        return read_at_most(path, MAX_IMAGE_BYTES)
    except TooLarge as error:
        raise Unreadable("image too large", f"{error.size:,} bytes, the limit is {MAX_IMAGE_BYTES:,}") from None


@contextmanager
def _decoding(n_bytes: int | None = None) -> Iterator[None]:
    """Inside, Pillow warns of nothing (odd metadata, palettes), and what it raises becomes ``Unreadable``."""
    size = "" if n_bytes is None else f"{n_bytes:,} bytes, "
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Unreadable:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Unreadable("image too large", str(error) or "it takes more memory than there is") from None
    except (UnidentifiedImageError, SyntaxError):  # its message holds an address of memory, which differs per run
        raise Unreadable("corrupt image", f"{size}not an image file") from None
    except Exception as error:
        raise Unreadable("corrupt image", f"{size}{type(error).__name__}: {error}") from None


def _open(data: bytes) -> Image.Image:
    formats = _formats_of(data)
    if formats == ("JPEG",):  # `Image.open` would refuse one above its bound, however small it is decoded
        return JpegImagePlugin.jpeg_factory(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=formats)


def _formats_of(data: bytes) -> tuple[str, ...]:
    """Pillow's names of the formats that the first bytes leave possible."""
    if data.startswith(_JPEG_2000):  # OpenJPEG makes gigabytes of a few hundred bytes that ask for small precincts
        raise Unreadable("no decoder", "JPEG 2000: convert it to PNG or JPEG")
    if data[4:8] == b"ftyp":
        box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        brands = {box[i : i + 4] for i in range(0, len(box), 4)}
        if brands & {b"avif", b"avis"}:
            Image.init()
            if "AVIF" not in Image.OPEN:
                raise Unreadable("no decoder", "AVIF: pip install 'pillow>=11.3'")
            return ("AVIF",)
        if brands & _HEIF_BRANDS:
            if "HEIF" not in Image.OPEN:
                try:
                    from pillow_heif import register_heif_opener  # may be missing
                except ModuleNotFoundError:
                    raise Unreadable("no decoder", "HEIC: pip install pillow-heif") from None
                register_heif_opener()
            return ("HEIF",)
    return next((formats for magic, formats in _FORMATS if data.startswith(magic)), _OTHERS)


def _check_pixels(image: Image.Image) -> None:
    """Of a progressive JPEG all coefficients are held, so it has no larger bound than others."""
    width, height = image.size
    reducible = image.format in ("JPEG", "MPO") and "progressive" not in image.info
    most = MAX_JPEG_PIXELS if reducible else MAX_PIXELS
    if width * height > most:
        raise Unreadable("image too large", f"{width}×{height} pixels, the limit is {most:,}")


def _missing(image: Image.Image) -> float:
    """The fraction of rows, from the lower end, that are the grey with which the decoder fills what it has not got."""
    filled = [value not in (127, 128) for value in range(256)]
    box = image.point(filled * len(image.getbands())).getbbox()
    return 1 - (box[3] if box else 0) / image.height
