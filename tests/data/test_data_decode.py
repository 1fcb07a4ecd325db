from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cloob.data.decode as module
from cloob.data.batch import BadSample
from cloob.data.decode import decode, read_image_file


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_every_common_format_comes_out_as_rgb(kind: str) -> None:
    red = Image.new("RGB", (9, 5), (200, 10, 30))
    image = decode(saved(red, kind))
    assert image.mode == "RGB" and image.size == (9, 5)
    assert np.abs(np.asarray(image, dtype=int) - (200, 10, 30)).max() <= 12  # JPEG, WebP lossy


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_comes_out_as_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(saved(Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode), kind)).getpixel((1, 1)) == (
        255,
        255,
        255,
    )


def test_palette_with_transparency_raises_no_warning() -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30] * 256)
    assert decode(saved(image, "PNG", transparency=bytes(range(256)))).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x10\0\0\0WEBPVP8 "]
)
def test_damaged_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        decode(data, "k")
    assert caught.value.reason == "corrupt image" and caught.value.key == "k"
    assert "0x" not in caught.value.detail  # an address would make two runs' reports differ


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_in_the_middle_is_corrupt(image: Callable[..., bytes], kind: str) -> None:
    whole = image(0, 64, 64, kind)
    decode(whole)
    with pytest.raises(BadSample, match="corrupt image"):
        decode(whole[: len(whole) // 2])


@pytest.mark.parametrize("size", [(20_000, 10_000), (10_001, 10_000)])
def test_too_many_pixels_are_refused_before_decoding_and_without_a_warning(size: tuple[int, int]) -> None:
    with pytest.raises(BadSample) as caught:
        decode(png_header(*size))
    assert caught.value.reason == "image too large"


def test_below_the_limit_pillows_own_warning_is_not_ours() -> None:
    with pytest.raises(BadSample, match="corrupt image"):  # 95 MP: Pillow would warn, we try and find the data missing
        decode(png_header(9_500, 10_000))


def test_read_image_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_image_file(tmp_path / "a", "k") == b"12345"
    for path in (tmp_path / "absent", tmp_path, f"{tmp_path}/a\0b"):
        with pytest.raises(BadSample, match="missing image"):
            read_image_file(path, "k")
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(BadSample, match="image too large"):
        read_image_file(tmp_path / "a", "k")
