"""From the bytes of an image file to upright RGB pixels: the one decoder of training, evaluation and ``encode_image``.

What the pixels are, whatever the file holds:

- Turned as the EXIF orientation says (1 to 8), as browsers and phones show the picture.
- Transparency is composited on white.
- Grey of 16 bits keeps its high byte. Grey of 32 bits or floating point says not what white is: the narrowest of the
  ranges 1 (floating point only), 2⁸, 2¹⁶ and 2³² that holds the brightest pixel counts.
- Of an animation the first frame. A CMYK JPEG holds its inks inverted, as Adobe writes them and browsers take them.
- Colour profiles (ICC) are not applied: open_clip's models were trained on pixels without.
- A JPEG above ``WHOLE_PIXELS`` is decoded at a half or a quarter of its width and height.

Needs Pillow and NumPy (the extra ``train``).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import IcoImagePlugin, Image
from PIL.ExifTags import Base

from cloob.errors import InputError, require
from cloob.files import TooLarge, read_at_most

MAX_PIXELS = 178_956_970
"""An image with more pixels is refused by its header: Pillow's own bound. At 4 bytes a pixel it takes 0.7 GB."""

MAX_DECODED_BYTES = 1 << 30
"""An image is refused that would take more than about this at any time, until it is upright RGB."""

MAX_IMAGE_BYTES = 256 * 1024 * 1024
"""An image file of more bytes is refused before it is read."""

WHOLE_PIXELS = 32_000_000
"""A JPEG with more pixels is decoded smaller, which bounds what its pixels take to 128 MB (Pillow: 4 bytes each)."""

SLOW_PIXELS = 1 << 24
"""An image with more pixels is refused where Pillow decodes in Python: run-length coded BMP, QOI, PPM in plain text."""

MAX_SCANNED = 1 << 32
"""A JPEG of more pixels times scans is refused: each scan goes over all pixels, and may be 10 bytes short."""

MOST_RATIO = 64
"""Of a picture's sides, up to which all of it is resized for a model that looks at its middle."""

Fault = Literal["corrupt image", "image too large", "no decoder"]

# Asking Pillow for the one format that the first bytes announce spares it the attempts at all others (a fifth of the
# time of a small image). Anything else is tried as one of these: a format that Pillow hands to another program (EPS) is
# not among them.
_FORMATS = ((b"\xff\xd8\xff", ("JPEG",)), (b"\x89PNG", ("PNG",)), (b"RIFF", ("WEBP",)))
_OTHERS = (
    *("GIF", "BMP", "TIFF", "PPM", "DIB", "ICO", "PCX", "PSD", "QOI", "SGI", "WEBP", "PNG", "JPEG"),
    "TGA",  # last: it has no magic
)
_ICON = b"\0\0\1\0"
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_IN_PYTHON = ("bmp_rle", "ppm_plain", "qoi")  # Pillow's names of decoders
_SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e]")  # marker and length, of one to four channels
_HELD = {"WEBP": 16, "AVIF": 12, "HEIF": 8}  # bytes a pixel, as measured
_MOST_LAYERS = 8  # over each other in a file, each of another channel
_MOST_SHARED = 16  # how often parts of a TIFF may have the same bytes
_MOST_PART = 512 << 20  # bytes of a strip or tile of a TIFF, which is held whole beside the picture
_BLOCK = 1024  # pixels a side
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGEST_REDUCTION = 8  # what a JPEG decoder can do


class Unreadable(Exception):  # noqa: N818 - the file is at fault, not the program
    """An image file that cannot be decoded.

    Attributes:
        reason: One of ``Fault``.
        detail: What was found.
    """

    def __init__(self, reason: Fault, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Fault = reason
        self.detail = detail


class Encoded:
    """An image file of which the header has been read, and nothing decoded yet.

    Of a PNG with EXIF all is decoded when its orientation, ``size``, ``whole`` or ``exif`` is asked for: that chunk may
    come last.

    Attributes:
        in_file: Width and height as the file has them, pixels.
        stored: Width and height as the decoder gives them, pixels; of a JPEG above ``WHOLE_PIXELS`` those it is decoded
            at.
    """

    def __init__(self, data: bytes) -> None:
        """Reads the header.

        Args:
            data: The bytes of a file: JPEG, PNG, WebP, GIF, AVIF, HEIC, TIFF, BMP, and what else ``_OTHERS`` names.

        Raises:
            Unreadable: ``"corrupt image"``, ``"image too large"`` above ``MAX_PIXELS``, ``MAX_DECODED_BYTES``,
                ``SLOW_PIXELS`` or ``MAX_SCANNED``, or ``"no decoder"`` for a format that needs another package, and
                for JPEG 2000.
        """
        self._bytes = len(data)
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, of palettes and, below our own limit, of large images: nothing to act on.
            warnings.simplefilter("ignore")
            try:
                if data.startswith(_ICON):
                    # Pillow decodes its first picture while it opens the icon.
                    entry = IcoImagePlugin.IcoFile(io.BytesIO(data)).entry[0]
                    _check(Image.open(io.BytesIO(data[entry.offset :]), formats=("PNG", "DIB")), data)
                self._image: Image.Image = Image.open(io.BytesIO(data), formats=_formats(data))
                _check(self._image, data)
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
        return 1 if self._image.format == "TIFF" else _orientation(self._image)

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
        return _exif(self._image)

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
            Unreadable: ``"corrupt image"``, or ``"image too large"`` where transparency or EXIF behind the pixels of a
                PNG lead above ``MAX_DECODED_BYTES``.
        """
        orientation = self.orientation  # which goes with the metadata
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                factor = min(_LARGEST_REDUCTION, self._least * reduction)
                if factor > 1 and self._reducible:
                    width, height = self.in_file
                    # Pillow takes the largest factor that leaves at least this much, which is `factor` itself.
                    self._image.draft("RGB", (max(1, width // factor), max(1, height // factor)))
                self._image.load()
                _check_pixels(self._image)
                image = _rgb(self._image)
                image.info.clear()
            except Unreadable:
                raise
            except Exception as error:
                raise self._bad(error) from None
        return _turned(image, orientation) if upright else image

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
        if isinstance(error, Image.DecompressionBombError):
            return Unreadable("image too large", str(error))
        # Pillow's message for an unknown format holds the address of our buffer, which would differ per run.
        said = "not an image file" if "cannot identify" in str(error) else f"{type(error).__name__}: {error}"
        return Unreadable("corrupt image", f"{self._bytes:,} bytes, {said}")


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
            _check_pixels(image)
            image.load()  # before the orientation is asked for: a TIFF is turned while it is loaded
            orientation = _orientation(image)
            return _turned(_rgb(image), orientation)
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


def axes(orientation: int) -> tuple[bool, bool, bool]:
    """How a stored picture becomes upright: whether rows and columns change places, then whether each is reversed.

    Args:
        orientation: EXIF's, 1 to 8.

    Returns:
        ``(swap, reverse_rows, reverse_columns)``, to be done in this order.
    """
    return orientation >= 5, orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)


def _formats(data: bytes) -> tuple[str, ...]:
    """The formats that the first bytes leave possible."""
    if data.startswith(_JPEG_2000):  # OpenJPEG makes gigabytes of a few hundred bytes that ask for small precincts
        raise Unreadable("no decoder", "JPEG 2000 is not read; convert it to PNG or JPEG")
    if data[4:8] == b"ftyp":
        box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        brands = {box[i : i + 4] for i in range(0, len(box), 4)}
        if brands & {b"avif", b"avis"}:
            Image.init()
            if "AVIF" not in Image.OPEN:
                raise Unreadable("no decoder", "AVIF; Pillow 11.3 or later reads it")
            return ("AVIF",)
        if brands & _HEIF_BRANDS:
            _register_heif()
            return ("HEIF",)
    return next((formats for magic, formats in _FORMATS if data.startswith(magic)), _OTHERS)


def _register_heif() -> None:
    if "HEIF" not in Image.OPEN:
        try:
            require("pillow_heif", "heif").register_heif_opener()
        except InputError as error:
            raise Unreadable("no decoder", f"HEIC; {error}") from None


def _check_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unreadable("image too large", f"{width}×{height} pixels, the limit is {MAX_PIXELS:,}")
    most = MAX_DECODED_BYTES // _bytes_a_pixel(image)
    if width * height > most:
        kind = f"{image.format or 'an image'} of mode {image.mode}"
        raise Unreadable("image too large", f"{width}×{height} pixels of {kind}, the limit is {most:,}")


def _bytes_a_pixel(image: Image.Image) -> int:
    """What is held at once on the way to upright RGB, about."""
    if image.format in ("JPEG", "MPO"):  # coefficients, if it has several scans; of the pixels it gives few
        return 2 * len(image.getbands())
    if image.format in _HELD:
        return _HELD[image.format]
    layer = image.has_transparency_data and image.mode != "RGBA"
    turned = "exif" in image.info or (image.format == "TIFF" and _ORIENTATION in image.tag_v2)  # type: ignore[attr-defined]
    copies = (image.mode != "RGB" or image.has_transparency_data) + (layer or turned)
    return (1 if image.mode in ("1", "L", "P") else 4) + 4 * copies


def _check(image: Image.Image, data: bytes) -> None:
    """Refuses what has too many pixels, or has a decoder go over them again and again, or over each in Python."""
    _check_pixels(image)
    shown, pixels = f"{image.width}×{image.height} pixels", image.width * image.height
    tiles = getattr(image, "tile", [])
    codec = tiles[0][0] if tiles else ""
    if codec in _IN_PYTHON and pixels > SLOW_PIXELS:
        raise Unreadable("image too large", f"{shown} of {image.format}, the limit is {SLOW_PIXELS:,}")
    if codec == "bmp_rle" and pixels > 128 * len(data):  # a run of 255 has two bytes
        raise Unreadable("corrupt image", f"{len(data):,} bytes cannot hold {shown}")
    if codec == "ppm_plain" and data.count(b"#") > 1000:  # each comment moves all that follows it
        raise Unreadable("corrupt image", "more than 1,000 comments")
    most = MAX_SCANNED // pixels
    if image.format in ("JPEG", "MPO") and len(data) > 10 * most and _markers(data) > most:
        scans = sum(1 for _ in _SCAN.finditer(data))
        if scans > most:
            raise Unreadable("image too large", f"{scans:,} scans of {shown}")
    covered = sum((right - left) * (lower - upper) for _, (left, upper, right, lower), *_ in tiles)
    if covered > _MOST_LAYERS * pixels:
        raise Unreadable("corrupt image", f"its parts cover {shown} {covered // pixels:,} times")
    if image.format == "TIFF":
        _check_parts(image.tag_v2, len(data))  # type: ignore[attr-defined]


def _markers(data: bytes) -> int:
    """How often the bytes of a JPEG's scan header are in a file; elsewhere too they may be by chance."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(two == 0xDAFF)) for two in pairs)


def _check_parts(tags: Mapping[int, Any], size: int) -> None:
    """Refuses a TIFF in tiles far larger than the picture, all of which are decoded, or in parts that share bytes."""
    width, height = tags.get(Base.TileWidth, 1), tags.get(Base.TileLength, 1)
    padded = -(-tags[Base.ImageWidth] // width) * width * -(-tags[Base.ImageLength] // height) * height
    if padded > MAX_PIXELS:
        raise Unreadable("image too large", f"{padded:,} pixels in tiles, the limit is {MAX_PIXELS:,}")
    counts = tags.get(Base.TileByteCounts) or tags.get(Base.StripByteCounts, ())
    whole = tags[Base.ImageLength]
    rows = tags.get(Base.TileLength) or min(tags.get(Base.RowsPerStrip, whole), whole)
    part = rows * tags.get(Base.TileWidth, tags[Base.ImageWidth]) * sum(tags.get(Base.BitsPerSample, (1,))) // 8
    if part > _MOST_PART:
        raise Unreadable("image too large", f"{part:,} bytes in one part, the limit is {_MOST_PART:,}")
    if sum(counts) > _MOST_SHARED * size:
        raise Unreadable("corrupt image", f"its parts have {sum(counts):,} bytes, the file {size:,}")


def _exif(image: Image.Image) -> Image.Exif | None:
    """None where there is none, or where it is damaged: whatever stands there, the pixels are not concerned."""
    if "exif" not in image.info:
        return None
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
    except Exception:
        return None
    return exif


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 where there is none, and where it is not one of eight.

    Not ``getexif()``, which in later Pillows also looks into XMP; browsers do not.
    """
    exif = _exif(image)
    try:
        orientation = 1 if exif is None else exif.get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _least_reduction(width: int, height: int) -> int:
    """The smallest of 1, 2, 4, 8 at which a JPEG has at most ``WHOLE_PIXELS``."""
    reduction = 1
    while reduction < _LARGEST_REDUCTION and width * height > WHOLE_PIXELS * reduction**2:
        reduction *= 2
    return reduction


def _reduced(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _TURNS:
        return image
    turned = image.transpose(_TURNS[orientation])
    turned.info.clear()  # it would still ask to be turned
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    """A loaded image as RGB: grey scaled to 8 bits, transparency on white."""
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")  # a conversion to itself would be a copy
        paper = Image.new("RGB", image.size, "white")
        paper.paste(layer, mask=layer)
        return paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floating point as 8 bits."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # as Pillow reads colours of 16 bits
    brightest = max(float(np.nanmax(values, initial=0, where=np.isfinite(values))) for _, values in _blocks(image))
    ranges = (1.0, 2.0**8 - 1, 2.0**16 - 1, 2.0**32 - 1)[image.mode != "F" :]
    white = next((white for white in ranges if brightest <= white), brightest)
    grey = np.empty((image.height, image.width), np.uint8)
    for place, values in _blocks(image):
        scaled = np.nan_to_num(values * np.float32(255 / white), nan=0.0)
        grey[place] = np.clip(np.rint(scaled), 0, 255)
    return Image.fromarray(grey)


def _blocks(image: Image.Image) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Where each block lies, rows and columns, and its values: of all at once the steps take 17 bytes a pixel."""
    for top in range(0, image.height, _BLOCK):
        for left in range(0, image.width, _BLOCK):
            lower, right = min(top + _BLOCK, image.height), min(left + _BLOCK, image.width)
            place = slice(top, lower), slice(left, right)
            yield place, np.asarray(image.crop((left, top, right, lower)))
