"""Small files that would keep a decoder busy for minutes are refused unread; ordinary ones of their kind are not."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, features

from cloob import pictures
from cloob.pictures import limits, rgb

SIDE = 64
SCAN = b"\xff\xda\0\x08\x01\x01\x00\x01\x3f\x00"  # of one channel, without content


def saved(kind: str, mode: str = "L", size: tuple[int, int] = (SIDE, SIDE), **options: object) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, kind, **options)
    return file.getvalue()


def bmp(width: int, height: int, runs: bytes, *, file_header: bool = True) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    dib = head + b"".join(bytes([grey, grey, grey, 0]) for grey in range(256)) + runs
    return b"BM" + struct.pack("<IHHI", 14 + len(dib), 0, 0, 14 + 40 + 1024) + dib if file_header else dib


def icon(part: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 8, len(part), 22) + part


def tiff(tags: dict[int, int | list[int]], content: bytes) -> bytes:
    """Of one picture; numbers are of 32 bits."""
    lists, entries = content + bytes(len(content) % 2), b""
    for tag, value in sorted(tags.items()):
        if isinstance(value, list):
            entries += struct.pack("<HHII", tag, 4, len(value), 8 + len(lists))
            lists += struct.pack(f"<{len(value)}I", *value)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(lists)) + lists + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiles(width: int, height: int, side: int) -> bytes:
    """A TIFF of tiles that all have the same bytes."""
    content = zlib.compress(bytes(side * side))
    n = -(-width // side) * -(-height // side)
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side}
    return tiff({**tags, 324: [8] * n, 325: [len(content)] * n}, content)


def refused(monkeypatch: pytest.MonkeyPatch, data: bytes) -> str:
    """Why it was refused, before a pixel was decoded."""
    with monkeypatch.context() as patched:
        patched.setattr(Image, "_getdecoder", lambda *_: pytest.fail("it was decoded"))
        with pytest.raises(pictures.Unreadable) as caught:
            pictures.Encoded(data)
    return f"{caught.value.reason}: {caught.value.detail}"


def test_a_jpeg_of_thousands_of_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = saved("JPEG", "RGB", size=(2000, 1000), progressive=True)
    assert pictures.decode(ordinary).size == (2000, 1000)
    data = ordinary[:-2] + 2200 * SCAN + ordinary[-2:]
    assert refused(monkeypatch, data) == "image too large: 2,210 scans of 2000×1000 pixels"
    assert pictures.decode(ordinary[:-2] + 100 * SCAN + ordinary[-2:]).size == (2000, 1000)


def test_of_a_video_behind_a_jpeg_no_scan_is_counted() -> None:
    """Phones append one; the two bytes of the marker are there by chance."""
    data = saved("JPEG", "RGB", size=(2000, 1000)) + 5000 * b"\xff\xda\x31\x08"
    assert pictures.decode(data).size == (2000, 1000)


def test_a_jpeg_of_several_pictures_counts_the_scans_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved("MPO", "RGB", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])
    assert Image.open(io.BytesIO(data)).format == "MPO" and pictures.decode(data).size == (SIDE, SIDE)
    monkeypatch.setattr(limits, "MAX_SCANNED", 2 * SIDE * SIDE - 1)
    assert refused(monkeypatch, data) == "image too large: 2 scans of 64×64 pixels"


def test_a_run_length_coded_bmp(monkeypatch: pytest.MonkeyPatch) -> None:
    row = b"\xff\x07" * 4 + b"\x04\x07\0\0"
    for data in (bmp(1024, 600, row * 600), bmp(1024, 600, row * 600, file_header=False)):
        assert np.all(np.asarray(pictures.decode(data)) == 7)
    for file_header in (True, False):
        short = bmp(2_000_000, 1, b"\1\1\0\0", file_header=file_header)  # the row's end fills it pixel by pixel
        assert refused(monkeypatch, short).endswith("bytes cannot hold 2000000×1 pixels")
        long = bmp(1 << 20, 20, bytes(1 << 18), file_header=file_header)
        assert "20971520" not in refused(monkeypatch, long) and "the limit is 16,777,216" in refused(monkeypatch, long)


@pytest.mark.parametrize("head", [b"P2 5000 5000 255\n", b"qoif" + struct.pack(">IIBB", 5000, 5000, 3, 0)])
def test_formats_that_are_decoded_in_python(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    said = refused(monkeypatch, head + bytes(100))
    assert said.startswith("image too large: 5000×5000 pixels of ") and said.endswith("the limit is 16,777,216")


TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    ("kind", "mode", "options", "bytes_a_pixel"),
    [
        ("JPEG", "RGB", {"progressive": True}, 6),
        ("JPEG", "CMYK", {"progressive": True}, 8),
        ("PNG", "RGB", {}, 4),
        ("PNG", "RGB", {"exif": TURNED}, 8),
        ("PNG", "RGB", {"transparency": (7, 7, 7)}, 12),
        ("PNG", "P", {}, 5),
        ("PNG", "P", {"transparency": 7, "exif": TURNED}, 9),
        ("PNG", "RGBA", {}, 8),
        ("TIFF", "RGB", {}, 4),
        ("TIFF", "RGB", {"tiffinfo": {0x0112: 6}}, 8),
        ("WEBP", "RGB", {}, 16),
        ("AVIF", "RGB", {}, 12),
    ],
)
def test_what_a_picture_takes_is_limited(
    monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, options: dict[str, object], bytes_a_pixel: int
) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    data = saved(kind, mode, **options)
    limit = bytes_a_pixel * SIDE * SIDE
    assert limits.MAX_DECODED_BYTES >= 178_956_970 * 6  # JPEGs in colour: as many pixels as ever
    monkeypatch.setattr(limits, "MAX_DECODED_BYTES", limit)
    assert pictures.decode(data).size == (SIDE, SIDE)
    monkeypatch.setattr(limits, "MAX_DECODED_BYTES", limit - 1)
    kind = f"progressive {kind}" if kind == "JPEG" else kind
    assert refused(monkeypatch, data) == f"image too large: 64×64 pixels of {kind} of mode {mode}, the limit is 4,095"


def test_transparency_behind_the_pixels_counts_before_it_is_composited(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved("PNG", "RGB", transparency=(7, 7, 7))
    start, end = data.index(b"tRNS") - 4, data.index(b"tRNS") + 14
    data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    monkeypatch.setattr(limits, "MAX_DECODED_BYTES", 5 * SIDE * SIDE)
    encoded = pictures.Encoded(data)
    with pytest.raises(pictures.Unreadable, match=r"image too large.*the limit is 1,706"):
        encoded.rgb()


def test_a_tiff_of_one_part_that_would_be_held_beside_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    content = zlib.compress(bytes(100))
    tags = {256: 10_000, 257: 10_000, 259: 8, 262: 2, 277: 3, 273: 8, 279: len(content)}
    data = tiff({**tags, 258: [16, 16, 16]}, content)
    assert refused(monkeypatch, data) == "image too large: 600,000,000 bytes in one part, the limit is 536,870,912"
    assert pictures.Encoded(tiff({**tags, 258: [8, 8, 8]}, content)).size == (10_000, 10_000)


@pytest.mark.parametrize("bare", [True, False])
def test_jpeg_2000_is_not_read(monkeypatch: pytest.MonkeyPatch, bare: bool) -> None:
    """As a picture and within an icon; its precincts of a few pixels take a kilobyte each."""
    data = saved("JPEG2000", "RGB", no_jp2=bare)
    assert refused(monkeypatch, data).startswith("no decoder: JPEG 2000: convert it")
    assert refused(monkeypatch, icon(data)).startswith("corrupt image")


def test_a_ppm_of_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.all(np.asarray(pictures.decode(b"P2 2 1 255 # two\n7 7 # pixels\n")) == 7)
    assert refused(monkeypatch, b"P2 1 1 9 " + 2000 * b"#\n" + b"0 ") == "corrupt image: more than 1,000 comments"


def test_what_lies_in_an_icon_is_looked_at_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pictures.decode(saved("ICO", "RGBA", sizes=[(32, 32), (16, 16)])).size == (32, 32)
    assert pictures.decode(saved("ICO", "RGB", sizes=[(32, 32)], bitmap_format="bmp")).size == (32, 32)
    assert pictures.decode(icon(saved("PNG"))).size == (SIDE, SIDE)  # the directory says 16
    runs = bmp(2_000_000, 2, b"\1\1\0\0", file_header=False)
    assert refused(monkeypatch, icon(runs)).endswith("bytes cannot hold 2000000×2 pixels")
    monkeypatch.setattr(limits, "MAX_PIXELS", SIDE * SIDE - 1)
    said = "image too large: 64×64 pixels, the limit is 4,095"
    assert refused(monkeypatch, icon(saved("PNG"))) == said


def test_a_tiff_of_tiles_far_larger_than_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pictures.decode(tiles(300, 200, 128)).size == (300, 200)
    said = refused(monkeypatch, tiles(1, 200_000, 1024))
    assert said == "image too large: 205,520,896 pixels in tiles, the limit is 178,956,970"


def test_a_tiff_of_parts_that_share_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    strips = {256: 1, 257: 500, 258: 8, 262: 1, 277: 1, 278: 1}
    content = 50_000 * b"\x80" + b"\0\7"  # PackBits that do nothing, and a pixel
    data = tiff({**strips, 259: 32773, 273: [8] * 500, 279: [len(content)] * 500}, content)
    assert refused(monkeypatch, data) == f"corrupt image: its parts have 25,001,000 bytes, the file {len(data):,}"
    bits = {256: 800, 257: 400, 258: 1, 259: 1, 262: 1, 277: 1, 278: 399}
    data = tiff({**bits, 273: [8] * 1000, 279: [100] * 1000}, bytes(40_000))
    assert refused(monkeypatch, data) == "corrupt image: its parts cover 800×400 pixels 500 times"
    for planes in (1, 2):
        ordinary = io.BytesIO()
        Image.new("CMYK", (300, 200)).save(ordinary, "TIFF", tiffinfo={278: 8, 284: planes})
        assert pictures.decode(ordinary.getvalue()).size == (300, 200)


@pytest.mark.parametrize(("brightest", "white"), [(0.5, 1), (200, 255), (6e4, 65535), (1e9, 2**32 - 1), (1e20, 1e20)])
def test_grey_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch, brightest: float, white: float) -> None:
    monkeypatch.setattr(rgb, "_BLOCK", 32)
    values = np.random.default_rng(3).uniform(-1, 1, (70, 90)).astype(np.float32)
    values *= np.float32(brightest) / values.max()
    kinds = [values] if brightest in (0.5, 1e20) else [values, values.astype(np.int32)]
    for given in kinds:
        expected = np.clip(np.rint(given * np.float32(255 / white)), 0, 255)
        if given is values:
            given[:2, :3], expected[:2, :3] = [[np.nan, np.inf, -np.inf]] * 2, [[0, 255, 0]] * 2
        shown = np.asarray(pictures.upright(Image.fromarray(given)))
        assert np.array_equal(shown[..., 0], expected) and expected.max() > 50


def test_grey_in_floating_point_takes_no_arrays_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rgb, "_BLOCK", 64)
    image = Image.new("F", (1024, 1024), 0.5)
    tracemalloc.start()
    try:
        pictures.upright(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 1024 * 1024  # NumPy's alone


def test_of_grey_of_16_bits_the_high_byte() -> None:
    values = np.arange(0, 65536, 7, dtype=np.uint16).reshape(1, -1)
    assert np.array_equal(np.asarray(pictures.upright(Image.fromarray(values)))[..., 0], values >> 8)
