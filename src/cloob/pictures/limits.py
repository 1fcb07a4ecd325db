"""What is refused by its first bytes and its header, before a pixel of it is decoded."""

from __future__ import annotations

from typing import Literal

from PIL import Image

MAX_PIXELS = 178_956_970
"""An image with more pixels is refused by its header: Pillow's own bound. At 4 bytes a pixel it takes 0.7 GB."""

MAX_JPEG_PIXELS = 2_048_000_000
"""The same for a JPEG, of which a decoder needs to give an eighth of the sides only."""

MAX_IMAGE_BYTES = 256 * 1024 * 1024
"""An image file of more bytes is refused before it is read."""

MAX_SCANS = 24
"""A progressive JPEG that goes over more pixels than so many scans of the largest picture do is refused."""

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


def check_pixels(image: Image.Image, max_pixels: int | None = None) -> None:
    """Refuses an opened image above ``max_pixels``; None: above ``MAX_PIXELS`` or ``MAX_JPEG_PIXELS``.

    Of a progressive JPEG all coefficients are held, so it has no larger bound than others.
    """
    width, height = image.size
    reducible = image.format in ("JPEG", "MPO") and "progressive" not in image.info
    most = max_pixels or (MAX_JPEG_PIXELS if reducible else MAX_PIXELS)
    if width * height > most:
        raise Unreadable("image too large", f"{width}×{height} pixels, the limit is {most:,}")


def check_header(image: Image.Image, data: bytes, max_pixels: int | None = None) -> None:
    """As ``check_pixels``; refuses a JPEG too that has a decoder go over its pixels again and again."""
    check_pixels(image, max_pixels)
    scanned = MAX_SCANS * max(MAX_PIXELS, max_pixels or 0)
    if "progressive" in image.info and (scans := data.count(b"\xff\xda")) * image.width * image.height > scanned:
        raise Unreadable("image too large", f"{scans:,} scans of {image.width}×{image.height} pixels")


def raise_bound(pixels: int) -> None:
    """Lets Pillow, whose bound is one for all threads, open images of so many pixels."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, pixels)
