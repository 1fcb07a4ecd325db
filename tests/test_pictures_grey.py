"""Grey of more than 8 bits becomes 8 bits the same way, whatever the block."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cloob import pictures


def test_of_grey_of_16_bits_the_high_byte() -> None:
    values = np.arange(0, 65536, 7, dtype=np.uint16).reshape(1, -1)
    assert np.array_equal(np.asarray(pictures.upright(Image.fromarray(values)))[..., 0], values >> 8)
