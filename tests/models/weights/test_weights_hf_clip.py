"""What folders of transformers' ``CLIPModel`` say of pictures and activations: followed, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_files import write_transformers_clip
from PIL import Image
from torch import Tensor, nn

from cloob import load_model
from cloob.errors import InputError
from make import noise_image

transformers = pytest.importorskip("transformers")

SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
PROCESSOR = dict.fromkeys(["do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"], True) | {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "crop_size": SQUARE,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
OTHER = {"resample": 2, "image_mean": [0.1, 0.5, 0.9], "image_std": [0.5, 0.4, 0.3]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, whose processor each test writes, and its ``CLIPModel``."""
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_transformers_clip(folder, "gelu", "gelu")


def processed(folder: Path, processor: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    """The folder with this processor and no other."""
    for old in ("preprocessor_config.json", "processor_config.json"):
        (folder / old).unlink(missing_ok=True)
    (folder / name).write_text(json.dumps(processor))
    return folder


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in PROCESSOR.items() if key not in keys}


def picture() -> Image.Image:
    """Twice as wide as high, so that squashed and cropped pictures are others."""
    return noise_image(0, 8, 8).resize((180, 90), Image.Resampling.BICUBIC)


def theirs(folder: Path, model: Any) -> Tensor:
    """The unit row of the picture by transformers' own processor and towers."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        row = model.get_image_features(torch.as_tensor(processor(picture(), return_tensors="pt")["pixel_values"]))
    return nn.functional.normalize(getattr(row, "pooler_output", row), dim=-1)


@pytest.mark.parametrize(
    ("processor", "mode"),
    [
        (PROCESSOR, "shortest"),
        (PROCESSOR | OTHER, "shortest"),
        (PROCESSOR | {"size": SQUARE, "do_center_crop": False}, "squash"),
        (without("resample", "do_rescale", "rescale_factor", "image_processor_type"), "shortest"),
    ],
    ids=["shortest", "other colours", "squash", "few fields"],
)
def test_pictures_are_prepared_as_transformers_does(
    clip: tuple[Path, Any], processor: dict[str, Any], mode: str
) -> None:
    folder, model = clip
    encoder = load_model(processed(folder, processor), device="cpu")
    assert encoder.preprocess_cfg["resize_mode"] == mode
    assert encoder.preprocess_cfg["interpolation"] == {2: "bilinear", 3: "bicubic"}[processor.get("resample", 3)]
    assert list(encoder.mean) == processor["image_mean"] and list(encoder.std) == processor["image_std"]
    if "image_processor_type" not in processor:  # transformers of today asks for it
        processed(folder, processor | {"image_processor_type": "CLIPImageProcessor"})
    assert float((encoder.encode_image([picture()]) * theirs(folder, model)).sum()) > 0.999


def test_the_processor_that_transformers_5_writes(clip: tuple[Path, Any]) -> None:
    folder, _ = clip
    wanted = load_model(processed(folder, PROCESSOR | OTHER), device="cpu").preprocess_cfg
    whole = {"processor_class": "CLIPProcessor", "image_processor": PROCESSOR | OTHER}
    processed(folder, whole, "processor_config.json")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))  # which transformers passes over then
    assert load_model(folder, device="cpu").preprocess_cfg == wanted


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (PROCESSOR | {"size": 48}, "size is 48"),
        (without("crop_size"), "crop_size is 224; 32 or"),
        (PROCESSOR | {"do_rescale": False}, "do_rescale is False"),
        (PROCESSOR | {"image_processor_type": "ViTImageProcessor"}, "image_processor_type"),
    ],
)
def test_other_pictures_are_refused(clip: tuple[Path, Any], processor: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"preprocessor_config.json: {said}"):
        load_model(processed(clip[0], processor))


def test_each_tower_has_its_own_activation(tmp_path: Path) -> None:
    write_transformers_clip(tmp_path / "mixed", "quick_gelu", "gelu")
    config = (tmp_path / "mixed" / "config.json").read_text()
    (tmp_path / "mixed" / "config.json").write_text(config.replace('"quick_gelu"', '"mish"'))
    with pytest.raises(
        InputError, match=r"config\.json: hidden_act is 'mish'; gelu, quick_gelu, gelu_pytorch_tanh are"
    ):
        load_model(tmp_path / "mixed")
    (tmp_path / "mixed" / "config.json").write_text(f"\ufeff{config}", encoding="utf-8")  # as editors on Windows do
    with pytest.raises(InputError, match=r"config\.json: .* hidden_act quick_gelu and gelu"):
        load_model(tmp_path / "mixed")
    model = write_transformers_clip(tmp_path / "clip", "gelu", "gelu_pytorch_tanh")
    encoder = load_model(tmp_path / "clip", device="cpu")
    pixels, tokens = torch.randn(3, 3, SIDE, SIDE), torch.randint(5, 38, (3, 77))
    tokens[:, 20] = 39
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=pixels)
        rows = encoder.model.encode_image(pixels, normalize=True), encoder.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(rows[0], found.image_embeds, rtol=0, atol=2e-6)
    torch.testing.assert_close(rows[1], found.text_embeds, rtol=0, atol=2e-6)
