"""Pixels by Pillow alone are those of open_clip's evaluation transform."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import InterpolationMode

from cloob.errors import InputError
from cloob.models.pixels import EvalTransform

SIZE = 24


def theirs(image: Image.Image, config: dict[str, Any]) -> torch.Tensor:
    """open_clip's pixels; lanczos, which it does not have, by its bicubic transform with another filter."""
    lanczos = config["interpolation"] == "lanczos"
    known = config | ({"interpolation": "bicubic"} if lanczos else {})
    transform = image_transform_v2(PreprocessCfg(**known, mean=(0, 0, 0), std=(1, 1, 1)), is_train=False)
    if lanczos:
        transform.transforms[0].interpolation = InterpolationMode.LANCZOS
    return (transform(image) * 255).round().byte()


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@settings(max_examples=40)
@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 9))
def test_pixels_are_open_clips(mode: str, interpolation: str, width: int, height: int, seed: int) -> None:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(noise.numpy())
    config = {"size": SIZE, "interpolation": interpolation, "resize_mode": mode}
    own = pickle.loads(pickle.dumps(EvalTransform(config)))(image)
    assert own.dtype == torch.uint8 and torch.equal(own, theirs(image, config))


def test_a_way_that_open_clip_does_not_have_is_one_line() -> None:
    with pytest.raises(InputError, match="resize_mode 'tall'"):
        EvalTransform({"size": SIZE, "resize_mode": "tall"})
