"""Grey of more than 8 bits becomes 8 bits the same way, whatever the block."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cloob import pictures
from cloob.pictures import rgb


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


def test_of_grey_of_16_bits_the_high_byte() -> None:
    values = np.arange(0, 65536, 7, dtype=np.uint16).reshape(1, -1)
    assert np.array_equal(np.asarray(pictures.upright(Image.fromarray(values)))[..., 0], values >> 8)
