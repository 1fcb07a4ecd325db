"""Each family's format written by the test: it loads as the towers that it was written from, and trains as they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import own_files
import pytest
import torch
from torch import Tensor, nn

from cloob import load_model
from cloob.models.encoder import DualEncoder
from cloob.objective import ContrastiveObjective

Features = tuple[Tensor, Tensor]


def inputs(vocabulary: int = 40) -> tuple[Tensor, Tensor]:
    """Pictures, and tokens with their end at different places; the end is the last word."""
    source = torch.Generator().manual_seed(5)
    images = torch.randn(6, 3, 32, 32, generator=source)
    tokens = torch.randint(5, vocabulary - 2, (6, 77), generator=source)
    for row, length in zip(tokens, (3, 9, 20, 76, 40, 12), strict=True):
        row[length] = vocabulary - 1
        row[length + 1 :] = 0
    return images, tokens


def features_of(encoder: DualEncoder, images: Tensor, tokens: Tensor) -> Features:
    return encoder.model.encode_image(images), encoder.model.encode_text(tokens)


def step(features: Callable[[], Features], parameters: list[Tensor]) -> None:
    """One step of SGD, so large that a wrong gradient shows in the features."""
    rows = [nn.functional.normalize(side, dim=-1) for side in features()]
    loss = ContrastiveObjective.clip(inv_tau=5.0, learnable_inv_tau=False)(*rows)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= 2.0 * gradient


def check(encoder: DualEncoder, direct: Callable[[], Features], parameters: list[Tensor], tokens: Tensor) -> None:
    """Features are equal, before a step and after it."""
    images, _ = inputs()
    trained = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    before = [side.detach() for side in direct()]
    for _ in range(2):
        for ours, theirs in zip(features_of(encoder, images, tokens), direct(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        step(lambda: features_of(encoder, images, tokens), trained)
        step(direct, parameters)
    for first, last in zip(before, direct(), strict=True):
        assert (first - last).abs().max() > 1e-2


def check_clip(encoder: DualEncoder, model: nn.Module) -> None:
    """As ``check``, against a module of open_clip's own."""
    images, tokens = inputs()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check(encoder, lambda: (model.encode_image(images), model.encode_text(tokens)), parameters, tokens)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_mljku(tmp_path: Path, zipped: bool) -> None:
    model = own_files.open_clip_towers()
    content = {"epoch": 28, "name": "x", "state_dict": own_files.mljku_state(model), "method": "cloob"}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    encoder = load_model(tmp_path / "m.pt")
    assert encoder.objective_config["beta"] == pytest.approx(8.0)
    assert float(encoder.make_objective().inv_tau) == pytest.approx(float(model.logit_scale.exp()), rel=1e-6)
    check_clip(encoder, model)


@pytest.mark.parametrize("kind", ["state_dict", "archive"])
def test_openai(tmp_path: Path, kind: str) -> None:
    model = own_files.open_clip_towers()
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 40}
    state = model.state_dict()
    if kind == "archive":
        own_files.scripted(state, tmp_path / "m.pt")
    else:
        state |= {key: torch.tensor(size) for key, size in sizes.items()}
        torch.save(state, tmp_path / "m.pt")
    check_clip(load_model(tmp_path / "m.pt"), model)


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


def test_open_clip(tmp_path: Path) -> None:
    model = own_files.open_clip_towers(quick_gelu=False)
    config = {"model_cfg": own_files.CLIP | {"quick_gelu": False}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    check_clip(load_model(tmp_path), model)


def test_transformers_clip_in_shards(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = own_files.write_transformers_clip(tmp_path, "quick_gelu", "quick_gelu", "40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    encoder = load_model(tmp_path)
    model.logit_scale.requires_grad_(False)
    images, tokens = inputs()

    def direct() -> Features:
        found = model(input_ids=tokens, pixel_values=images)
        return found.image_embeds, found.text_embeds

    for mine, theirs in zip(features_of(encoder, images, tokens), direct(), strict=True):
        torch.testing.assert_close(nn.functional.normalize(mine, dim=-1), theirs, rtol=1e-4, atol=1e-5)
