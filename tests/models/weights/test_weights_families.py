"""What the families' committed files do not show: torch files that are no zip, shards, weights that name no program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import own_files
import pytest
import torch
from torch import Tensor, nn

from cloob import load_model


def inputs() -> tuple[Tensor, Tensor]:
    """Pictures, and tokens with their end at different places; the end is the last word."""
    source = torch.Generator().manual_seed(5)
    images, tokens = torch.randn(6, 3, 32, 32, generator=source), torch.randint(5, 38, (6, 77), generator=source)
    for row, length in zip(tokens, (3, 9, 20, 76, 40, 12), strict=True):
        row[length] = 39
        row[length + 1 :] = 0
    return images, tokens


def test_mljku_in_a_file_that_is_no_zip(tmp_path: Path) -> None:
    model, (images, tokens) = own_files.open_clip_towers(), inputs()
    content = {"epoch": 28, "name": "x", "state_dict": own_files.mljku_state(model), "method": "cloob"}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    encoder = load_model(tmp_path / "m.pt")
    assert encoder.objective_config["beta"] == pytest.approx(8.0)
    assert float(encoder.make_objective().inv_tau) == pytest.approx(float(model.logit_scale.exp()), rel=1e-6)
    torch.testing.assert_close(encoder.model.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.model.encode_text(tokens), model.encode_text(tokens), rtol=1e-4, atol=1e-5)


def as_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Halved as OpenAI's ``convert_weights`` does it."""
    return {key: value.half() if value.ndim > 1 else value for key, value in state.items()}


@pytest.mark.parametrize("change", [dict, as_openai])
def test_what_may_be_another_programs_is_taken_for_openais_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Tensor]], object]
) -> None:
    torch.save(change(own_files.open_clip_towers().state_dict()), tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").config.settings["quick_gelu"]
    assert len([message for message in caplog.messages if "taken for OpenAI's" in message]) == (change is dict)


def test_transformers_clip_in_shards(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, (images, tokens) = own_files.write_transformers_clip(tmp_path, "quick_gelu", "quick_gelu", "40KB"), inputs()
    assert (tmp_path / "model.safetensors.index.json").exists()
    encoder, found = load_model(tmp_path), model(input_ids=tokens, pixel_values=images)
    rows = nn.functional.normalize(encoder.model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(encoder.encode_image(images), found.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows, found.text_embeds, rtol=1e-4, atol=1e-5)
