"""From the bytes of an image file to upright RGB pixels: the one decoder of training,
evaluation and ``encode_image``.

- Turned by the EXIF orientation (1 to 8); colour profiles are not applied, as
  open_clip's models had none.
- Transparency is composited on white.
- Grey of 16 bits keeps its high byte. Grey of 32 bits or floating point does not define
  white: its brightest pixel is.
- Of an animation the first frame. A CMYK JPEG holds inverted inks.
- A JPEG above ``WHOLE_PIXELS`` is decoded at a half, a quarter or an eighth of its
  sides. Of one that lacks its end, up to ``MAX_MISSING`` of the rows may be missing,
  and are grey.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base

from cloob.files import TooLarge, read_at_most

# Larger pictures are refused by their header: MAX_PIXELS is Pillow's bound, 0.7 GB at 4
# bytes a pixel; a JPEG can be decoded at an eighth of its sides. A file of more bytes
# is refused before it is read.
MAX_PIXELS = 178_956_970
MAX_JPEG_PIXELS = 2_048_000_000
MAX_IMAGE_BYTES = 256 * 1024 * 1024
# a JPEG with more is decoded smaller, which bounds what its pixels take to 128 MB
WHOLE_PIXELS = 32_000_000
MAX_MISSING = 0.1  # of the rows of a JPEG that lacks its end

Fault = Literal["corrupt image", "image too large", "no decoder"]

# The first bytes spare Pillow attempts at other formats, a fifth of the time of a small
# image. Of the others TGA, which has no magic, is last, and EPS, which Pillow hands to
# another program, is not among them.
_FORMATS = ((b"\xff\xd8\xff", ("JPEG",)), (b"\x89PNG", ("PNG",)), (b"RIFF", ("WEBP",)))
_OTHERS = (
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "DIB",
    "ICO",
    "PCX",
    "PSD",
    "QOI",
    "SGI",
    "WEBP",
    "PNG",
    "JPEG",
    "TGA",
)
# whose decoders take gigabytes for a few hundred bytes
_UNBOUNDED = {
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_REDUCTIONS = (1, 2, 4, 8)  # of a JPEG decoder
_TURN_NAMES = (
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE"
    " ROTATE_90"
)
_TURNS = {
    orientation: Image.Transpose[name]
    for orientation, name in enumerate(_TURN_NAMES.split(), 2)
}


@dataclass(eq=False)
class Unreadable(Exception):  # noqa: N818
    """An image file that cannot be decoded."""

    reason: Fault
    detail: str


class Encoded:
    """An image file of which the header has been read, and nothing decoded yet.

    Of a PNG with EXIF all is decoded when its orientation, ``size``, ``full_size`` or
    ``exif`` is read. What cannot be decoded is ``Unreadable`` here and in all of these.

    Attributes:
        image: As Pillow opened it; its metadata are gone when it is decoded.
        in_file: Width and height as the file has them, pixels.
        stored: Width and height as the decoder gives them, pixels: less of a JPEG above
            ``WHOLE_PIXELS``.
        truncated: Whether ``rgb()`` found a JPEG without its end, and took it: what is
            missing is grey.
    """

    def __init__(self, data: bytes, max_pixels: int | None = None) -> None:
        """Reads the header of a file; ``max_pixels`` takes the place of ``MAX_PIXELS``
        and ``MAX_JPEG_PIXELS``.
        """
        self._max_pixels = max_pixels
        if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
            # Pillow's bound is one for all threads
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
        self.truncated = False
        with _decoding(len(data)):
            self._data = data
            self.image = _open(data)
            _check_pixels(self.image, max_pixels)
        self.in_file = width, height = self.image.size
        self._reducible = self.image.format in ("JPEG", "MPO")
        self._least = 1
        if self._reducible:
            self._least = _least_reduction(width * height)
        self.stored = -(-width // self._least), -(-height // self._least)

    @property
    def max_reduction(self) -> int:
        """By how much smaller ``rgb`` can decode it: 1, 2, 4 or 8."""
        return _REDUCTIONS[-1] // self._least if self._reducible else 1

    @cached_property
    def orientation(self) -> int:
        """EXIF's, 1 to 8: how the stored picture is turned to be upright."""
        return _orientation_of(self.image, self.exif)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what ``rgb()`` gives upright, pixels."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    @property
    def full_size(self) -> tuple[int, int]:
        """Width and height of the upright picture in the file; ``rgb()`` may give
        less.
        """
        return self.in_file[::-1] if self.orientation >= 5 else self.in_file

    @cached_property
    def exif(self) -> Image.Exif | None:
        """What the camera wrote; before the image is decoded."""
        # that chunk may come last
        if self.image.format == "PNG" and b"eXIf" in self._data:
            with _decoding(len(self._data)):
                self.image.load()
        return _exif_of(self.image)

    def rgb(self, reduction: int = 1) -> Image.Image:
        """Decodes the image, once, to upright RGB without metadata.

        A JPEG may come out smaller by ``reduction``, 1, 2, 4 or 8, its sides rounded
        up, but never at less than an eighth of what its file holds: the decoder then
        computes fewer pixels, about the means of those they stand for. Other formats
        keep their size.
        """
        orientation = self.orientation  # which goes with the metadata
        factor = min(_REDUCTIONS[-1], self._least * reduction)
        with _decoding(len(self._data)):
            if self._reducible:
                self.image, self.truncated = self._load_jpeg(factor)
            else:
                self.image.load()
            _check_pixels(self.image, self._max_pixels)
            pixels = _to_rgb(self.image)
            pixels.info.clear()
        return _turned(pixels, orientation)

    def _load_jpeg(self, factor: int) -> tuple[Image.Image, bool]:
        """The decoded picture, and whether it lacked its end."""
        try:
            self._load(self.image, factor)
            return self.image, self.truncated
        except OSError:
            image = _open(self._data + b"\xff\xd9")  # with an end
        self._load(image, factor)
        missing = _missing_rows(image)
        if missing > MAX_MISSING:
            detail = f"{len(self._data):,} bytes, {missing:.0%} of its rows missing"
            raise Unreadable("corrupt image", detail) from None
        return image, True

    def _load(self, image: Image.Image, factor: int) -> None:
        if factor > 1:
            # Pillow takes the largest factor that leaves this: `factor` itself
            width, height = (max(1, side // factor) for side in self.in_file)
            image.draft("RGB", (width, height))
        image.load()


def _least_reduction(pixels: int) -> int:
    """By how much a JPEG of so many pixels is decoded smaller at least."""
    for factor in _REDUCTIONS:
        if pixels <= WHOLE_PIXELS * factor**2:
            return factor
    return _REDUCTIONS[-1]


def _missing_rows(image: Image.Image) -> float:
    """The share of rows, from the lower end, of the grey with which the decoder fills
    what it has not got.
    """
    is_filled = [value not in (127, 128) for value in range(256)]
    box = image.point(is_filled * len(image.getbands())).getbbox()
    return 1 - (box[3] if box else 0) / image.height


def decode(data: bytes) -> Image.Image:
    """Decodes an image file to upright RGB; errors as ``Encoded``."""
    return Encoded(data).rgb()


def upright(image: Image.Image) -> Image.Image:
    """What ``decode`` gives for the file of an opened image; the image itself stays as
    it is. Errors as ``Encoded``.
    """
    with _decoding():
        _check_pixels(image)
        # before the orientation is read: a TIFF is turned while it is loaded
        image.load()
        return _turned(_to_rgb(image), _orientation_of(image, _exif_of(image)))


def read_file(path: Path | str) -> bytes:
    """The bytes of an image file; Unreadable above ``MAX_IMAGE_BYTES``, OSError or
    ValueError where there is none.
    """
    try:
        return read_at_most(path, MAX_IMAGE_BYTES)
    except TooLarge as error:
        raise Unreadable("image too large", str(error)) from None


def thumbnail(picture: bytes | Image.Image, side: int) -> bytes:
    """The JPEG of a picture (of an image file, or upright RGB) that fits into a square
    of ``side`` pixels.
    """
    if isinstance(picture, bytes):
        encoded = Encoded(picture)
        longer = max(encoded.size)
        # twice the side is left
        factor = next((r for r in (8, 4, 2) if longer >= 2 * r * side), 1)
        small = encoded.rgb(factor)
    else:
        small = picture.copy()
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def data_uri(picture: bytes, side: int) -> str:
    """A thumbnail as a ``data:`` address, for a page without other files."""
    return (
        f"data:image/jpeg;base64,{base64.b64encode(thumbnail(picture, side)).decode()}"
    )


def _exif_of(image: Image.Image) -> Image.Exif | None:
    """The camera's EXIF; None where nothing can be read, which is no fault of the
    pixels.
    """
    # not `getexif()`, which in later Pillows also looks into XMP; browsers do not
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
    except Exception:  # Pillow raises nearly anything on damaged EXIF
        return None
    return exif


def _orientation_of(image: Image.Image, exif: Image.Exif | None) -> int:
    """1 where there is none or an unknown one, and of a TIFF, which its decoder
    turns.
    """
    if exif is None or image.format == "TIFF":
        return 1
    try:
        orientation = exif.get(Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _TURNS:
        return image
    upright = image.transpose(_TURNS[orientation])
    upright.info.clear()  # it would still ask to be turned
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as RGB: grey scaled to 8 bits, transparency on white."""
    if image.mode.startswith("I;16"):
        # as Pillow reads colours of 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = _scaled_grey(image)
    if image.has_transparency_data:
        return _opaque(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Grey of 32 bits: the brightest pixel is white."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
    brightest = max(float(values.max()), 1e-9)
    scaled = np.clip(np.rint(values * (255 / brightest)), 0, 255)
    return Image.fromarray(scaled.astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """A transparent image on white."""
    # a conversion to itself would be a copy
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    result = Image.new("RGB", layer.size, "white")
    result.paste(layer, mask=layer)
    return result


@contextlib.contextmanager
def _decoding(n_bytes: int | None = None) -> Iterator[None]:
    """Inside, Pillow warns of nothing (odd metadata, palettes), and what it raises
    becomes ``Unreadable``.
    """
    size = "" if n_bytes is None else f"{n_bytes:,} bytes, "
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Unreadable:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Unreadable(
            "image too large", str(error) or "it takes more memory than there is"
        ) from None
    # the message of the first two holds an address of memory, which differs per run
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError | SyntaxError)
        detail = "not an image file" if unknown else f"{type(error).__name__}: {error}"
        raise Unreadable("corrupt image", f"{size}{detail}") from None


def _open(data: bytes) -> Image.Image:
    formats = _formats_of(data)
    if formats == ("JPEG",):
        # `Image.open` would refuse one above its bound, however small it is decoded
        return JpegImagePlugin.jpeg_factory(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=formats)


def _formats_of(data: bytes) -> tuple[str, ...]:
    """The formats that a file may have, by its first bytes."""
    for magic, name in _UNBOUNDED.items():
        if data.startswith(magic):
            raise Unreadable("no decoder", f"{name}: convert it to PNG or JPEG")
    if data[4:8] == b"ftyp":
        box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        brands = {box[i : i + 4] for i in range(0, len(box), 4)}
        if brands & {b"avif", b"avis"}:
            return ("AVIF",)
        if brands & _HEIF_BRANDS:
            _register_heif()
            return ("HEIF",)
    for magic, formats in _FORMATS:
        if data.startswith(magic):
            return formats
    return _OTHERS


def _register_heif() -> None:
    """Pillow's plug-in registers itself."""
    try:
        importlib.import_module("pillow_heif.HeifImagePlugin")
    except ModuleNotFoundError:
        raise Unreadable("no decoder", "HEIC: pip install pillow-heif") from None


def _check_pixels(image: Image.Image, max_pixels: int | None = None) -> None:
    """Refuses too many pixels; all coefficients of a progressive JPEG are in memory, so
    it has the lower bound.
    """
    width, height = image.size
    reducible = image.format in ("JPEG", "MPO") and "progressive" not in image.info
    most = max_pixels or (MAX_JPEG_PIXELS if reducible else MAX_PIXELS)
    if width * height > most:
        raise Unreadable(
            "image too large", f"{width}×{height} pixels, the limit is {most:,}"
        )
