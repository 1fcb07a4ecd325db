from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloob.data.batch import BadSample, read_image_file
from cloob.pictures import Encoded, Unreadable, decode
from cloob.pictures import encoded as decoder


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """A picture that has the same look at every size."""
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(160, 96), (101, 77), (13, 9), (1, 1)])
@pytest.mark.parametrize("reduction", [1, 4])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_comes_out_smaller_by_the_factor(
    size: tuple[int, int], reduction: int, options: dict[str, object]
) -> None:
    data = saved(smooth(*size), "JPEG", quality=95, **options)
    encoded = Encoded(data)
    assert encoded.size == size
    image = encoded.rgb(reduction)
    assert image.mode == "RGB" and image.size == (-(-size[0] // reduction), -(-size[1] // reduction))
    if min(size) >= 64:  # each pixel is the mean of those it stands for; the rim may be a part of a block
        means = np.asarray(decode(data).reduce(reduction), dtype=int)
        assert np.abs(np.asarray(image, dtype=int) - means)[:-1, :-1].mean() < 1.5


def test_a_jpeg_of_several_pictures_is_its_first() -> None:
    first, second = Image.new("RGB", (64, 48), (250, 0, 0)), Image.new("RGB", (64, 48), (0, 0, 250))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    for reduction, size in ((1, (64, 48)), (4, (16, 12))):
        image = Encoded(data).rgb(reduction)
        assert image.size == size and image.getpixel((2, 2))[0] > 200


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})],
)
def test_a_jpeg_that_lacks_its_end_is_taken(mode: str, options: dict[str, object]) -> None:
    """What is there is as it was; what is missing is grey, a tenth of the rows at most."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).convert(mode), "JPEG", quality=90, **options)
    whole = np.asarray(decode(data))
    for end in (1, 2, 30, len(data) // 20):
        encoded = Encoded(data[:-end])
        found = np.asarray(encoded.rgb())
        assert encoded.truncated or end <= 2
        assert "progressive" in options or np.array_equal(found[:432], whole[:432])
        assert end > 2 or np.array_equal(found, whole)
        smaller = Encoded(data[:-end])
        assert smaller.rgb(4).size == (160, 120) and (smaller.truncated or end <= 2)
    if "progressive" not in options:
        with pytest.raises(Unreadable, match=r"2\d% of its rows missing"):
            decode(data[: len(data) * 3 // 4])
    encoded = Encoded(data)
    encoded.rgb()
    assert not encoded.truncated


def test_a_jpeg_of_200_megapixels_is_decoded_smaller() -> None:
    data = saved(Image.new("L", (20_000, 10_000), 90), "JPEG")
    encoded = Encoded(data)
    assert encoded.in_file == (20_000, 10_000) and encoded.stored == (5_000, 2_500)
    assert encoded.rgb().size == (5_000, 2_500)


def test_read_image_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_image_file(tmp_path / "a", "k") == b"12345"
    for path in (tmp_path / "absent", tmp_path, f"{tmp_path}/a\0b"):
        with pytest.raises(BadSample, match="missing image"):
            read_image_file(path, "k")
    monkeypatch.setattr(decoder, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(BadSample, match="image too large"):
        read_image_file(tmp_path / "a", "k")
