"""What is refused by its first bytes and its header, before a pixel of it is decoded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

MAX_PIXELS = 178_956_970
"""An image with more pixels is refused by its header: Pillow's own bound. At 4 bytes a pixel it takes 0.7 GB."""

MAX_JPEG_PIXELS = 2_048_000_000
"""The same for a JPEG, of which a decoder needs to give an eighth of the sides only."""

MAX_DECODED_BYTES = 1 << 30
"""An image is refused that would take more than about this at any time, until it is upright RGB."""

MAX_IMAGE_BYTES = 256 * 1024 * 1024
"""An image file of more bytes is refused before it is read."""

SLOW_PIXELS = 1 << 24
"""An image with more pixels is refused where Pillow decodes in Python: run-length coded BMP, QOI, PPM in plain text."""

MAX_SCANNED = 1 << 32
"""A JPEG of more pixels times scans is refused: each scan goes over all pixels, and may be 10 bytes short."""

Fault = Literal["corrupt image", "image too large", "no decoder"]

# Asking Pillow for the one format that the first bytes announce spares it the attempts at all others (a fifth of the
# time of a small image). Anything else is tried as one of these: a format that Pillow hands to another program (EPS) is
# not among them.
_FORMATS = ((b"\xff\xd8\xff", ("JPEG",)), (b"\x89PNG", ("PNG",)), (b"RIFF", ("WEBP",)))
_OTHERS = (
    *("GIF", "BMP", "TIFF", "PPM", "DIB", "ICO", "PCX", "PSD", "QOI", "SGI", "WEBP", "PNG", "JPEG"),
    "TGA",  # last: it has no magic
)
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_IN_PYTHON = ("bmp_rle", "ppm_plain", "qoi")  # Pillow's names of decoders
_SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e]")  # marker and length, of one to four channels
_HELD = {"WEBP": 16, "AVIF": 12, "HEIF": 8}  # bytes a pixel, as measured
_MOST_LAYERS = 8  # over each other in a file, each of another channel
_MOST_SHARED = 16  # how often parts of a TIFF may have the same bytes
_MOST_PART = 512 << 20  # bytes of a strip or tile of a TIFF, which is held whole beside the picture
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


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


def formats_of(data: bytes) -> tuple[str, ...]:
    """Pillow's names of the formats that the first bytes leave possible.

    Raises:
        Unreadable: ``"no decoder"``.
    """
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
            _register_heif()
            return ("HEIF",)
    return next((formats for magic, formats in _FORMATS if data.startswith(magic)), _OTHERS)


def _register_heif() -> None:
    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener  # may be missing
        except ModuleNotFoundError:
            raise Unreadable("no decoder", "HEIC: pip install pillow-heif") from None
        register_heif_opener()


def check_pixels(image: Image.Image) -> None:
    """Refuses an opened image above ``MAX_PIXELS``, ``MAX_JPEG_PIXELS`` or ``MAX_DECODED_BYTES``.

    Raises:
        Unreadable: ``"image too large"``.
    """
    width, height = image.size
    is_jpeg = image.format in ("JPEG", "MPO")
    most = MAX_JPEG_PIXELS if is_jpeg else MAX_PIXELS
    if width * height > most:
        raise Unreadable("image too large", f"{width}×{height} pixels, the limit is {most:,}")
    if is_jpeg and "progressive" not in image.info:
        return
    most = MAX_DECODED_BYTES // _bytes_a_pixel(image)
    if width * height > most:
        kind = f"{'progressive ' * is_jpeg}{image.format or 'an image'} of mode {image.mode}"
        raise Unreadable("image too large", f"{width}×{height} pixels of {kind}, the limit is {most:,}")


def _bytes_a_pixel(image: Image.Image) -> int:
    """What is held at once on the way to upright RGB, about."""
    if image.format in ("JPEG", "MPO"):  # coefficients; of the pixels it gives few
        return 2 * len(image.getbands())
    if image.format in _HELD:
        return _HELD[image.format]
    layer = image.has_transparency_data and image.mode != "RGBA"
    turned = "exif" in image.info or (image.format == "TIFF" and Base.Orientation in image.tag_v2)  # type: ignore[attr-defined]
    copies = (image.mode != "RGB" or image.has_transparency_data) + (layer or turned)
    return (1 if image.mode in ("1", "L", "P") else 4) + 4 * copies


def check_header(image: Image.Image, data: bytes) -> None:
    """Refuses what has too many pixels, or has a decoder go over them again and again, or over each in Python.

    Args:
        image: Opened, not loaded.
        data: The file's bytes.

    Raises:
        Unreadable: ``"corrupt image"`` or ``"image too large"``.
    """
    check_pixels(image)
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
