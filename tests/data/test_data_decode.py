from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cloob.pictures import Encoded, Unreadable, decode


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
