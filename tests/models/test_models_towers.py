"""create_model: names, sizes, seeds, errors; nothing of open_clip leaks out."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cloob.errors import InputError
from cloob.models.folder import save_model
from cloob.models.names import known_models
from cloob.models.runs import CONFIG_FILE, WEIGHTS_FILE
from cloob.models.towers import TINY_MODELS, create_model, open_clip


def test_known_models_has_ours_and_open_clips() -> None:
    names = known_models()
    assert names[:3] == list(TINY_MODELS)
    assert {"RN50", "RN101", "RN50x4", "ViT-B-32", "ViT-B-16"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_tower_is_small_and_trainable(name: str) -> None:
    encoder = create_model(name, seed=0)
    parameters = sum(p.numel() for p in encoder.parameters()) - encoder.model.token_embedding.weight.numel()
    assert parameters <= 5_000_000
    assert (encoder.image_size, encoder.context_length, encoder.embed_dim) == (64, 24, 256)
    assert encoder.training
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    tokens = encoder.tokenizer(["a red apple", "a bus", "rain", "two dogs"])
    assert tokens.shape == (4, 24)
    image_features, text_features = encoder(images, tokens)
    torch.testing.assert_close(image_features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(text_features.norm(dim=1), torch.ones(4))
    weights = torch.randn_like(image_features)
    ((image_features - text_features) * weights).sum().backward()
    missing = [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert [key for key, p in encoder.named_parameters() if not p.requires_grad] == ["model.logit_scale"]
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_an_open_clip_config_by_name_and_by_its_slash_name() -> None:
    encoder = create_model("RN50", seed=0, image_size=32)
    assert encoder.image_size == 32 and encoder.config.settings["vision_cfg"]["image_size"] == 32
    assert encoder.context_length == 77 and encoder.embed_dim == 1024
    # the override stays in this model
    assert open_clip().get_model_config("RN50")["vision_cfg"]["image_size"] == 224
    assert create_model("ViT-B/32", image_size=32, seed=0).name == "ViT-B-32"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_seed_alone_decides_the_weights(name: str) -> None:
    torch.manual_seed(1)
    first = create_model(name, seed=0).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = create_model(name, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = create_model(name, seed=1).state_dict()
    assert not torch.equal(first["model.token_embedding.weight"], other["model.token_embedding.weight"])


def test_other_image_size() -> None:
    encoder = create_model("tiny-resnet", image_size=96, seed=0).eval()
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    assert encoder.encode_image(images).shape == (1, 256)


def test_creation_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    handlers, filters = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    create_model("tiny-convnext", seed=0)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert logging.getLogger().handlers == handlers and logging.getLogger().filters == filters


def test_a_loader_worker_gets_transform_and_tokenizer_without_the_towers() -> None:
    encoder = create_model("tiny-resnet", seed=0)
    assert len(pickle.dumps(encoder.preprocess)) < 10_000
    tokenizer = pickle.loads(pickle.dumps(encoder.tokenizer))
    assert torch.equal(tokenizer(["a cat"]), encoder.tokenizer(["a cat"]))


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise OSError("no\nroute")

    open_clip()
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", refuse)
    with pytest.raises(InputError, match="laion2b") as caught:
        create_model("ViT-B-32", pretrained="laion2b_s34b_b79k")
    assert "\n" not in str(caught.value) and "no route" in str(caught.value)


def grown(key: str, rows: int) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key] = torch.randn(rows, state[key].shape[1])

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["visual.proj"].fill_(torch.nan), "visual.proj holds NaN"),
        (grown("positional_embedding", 77), r"positional_embedding has shape \(77, 128\), \(24, 128\) is wanted"),
        (grown("visual.positional_embedding", 50), r"visual\.positional_embedding has shape \(50, 192\)"),
        (lambda state: state.pop("ln_final.bias"), r"ln_final\.bias is missing"),
        (lambda state: state.update(more=torch.zeros(2)), "more is unknown"),
    ],
)
def test_a_file_of_weights_has_to_fit(change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in create_model("tiny-vit", seed=0).model.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "epoch_3.pt")
    with pytest.raises(InputError, match=rf"epoch_3\.pt: its weights .*{said}") as caught:
        create_model("tiny-vit", pretrained=str(tmp_path / "epoch_3.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_of_open_clips_training_with_siglip(ending: str, tmp_path: Path) -> None:
    trained = create_model("tiny-vit", seed=0)
    weights = trained.model.state_dict() | {"logit_bias": torch.tensor(-3.0)}
    weights["logit_scale"] = torch.tensor(10.0).log()
    state = {f"module.{key}": value.contiguous() for key, value in weights.items()}
    file = tmp_path / f"epoch_3.{ending}"
    if ending == "pt":
        optimizer = torch.optim.AdamW(trained.model.parameters()).state_dict()
        torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer}, file)
    else:
        save_file(state, file)
    encoder = create_model("tiny-vit", pretrained=str(file), seed=1)
    assert encoder.objective_config["bias"] == -3.0
    assert encoder.objective_config["inv_tau"] == pytest.approx(10.0)
    assert encoder.config == trained.config and not encoder.model.logit_scale.requires_grad
    assert encoder.model.visual.proj.requires_grad
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_a_configuration_beside_a_file_of_weights_that_says_something_else(tmp_path: Path) -> None:
    save_model(tmp_path, create_model("tiny-vit", seed=0), {})
    weights, path = str(tmp_path / WEIGHTS_FILE), tmp_path / CONFIG_FILE
    create_model("tiny-vit", pretrained=weights)  # a warning would be an error
    config = json.loads(path.read_text())
    config["preprocess_cfg"].update(mean=[0.5] * 3, resize_mode="squash")
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="has another mean and resize_mode and quick_gelu than tiny-vit") as caught:
        create_model("tiny-vit", pretrained=weights)
    assert str(caught[0].message).startswith(f"{path}: ") and "\n" not in str(caught[0].message)


def test_tag_brings_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's weights were trained with QuickGELU; ViT-B-32's configuration alone says GELU."""
    import open_clip.transformer as transformer

    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: None)
    encoder = create_model("ViT-B-32", pretrained="openai", image_size=32, seed=0)
    assert isinstance(encoder.model.transformer.resblocks[0].mlp.gelu, transformer.QuickGELU)
    assert encoder.config.settings["quick_gelu"] is True


def test_a_tag_without_an_activation_keeps_that_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """As roberta-ViT-B-32/laion2b_s12b_b32k."""
    import open_clip.transformer as transformer

    tag = {"hf_hub": "some/model/", "mean": (0.5,) * 3}
    monkeypatch.setattr(open_clip(), "get_pretrained_cfg", lambda *_: tag)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: None)
    encoder = create_model("ViT-B-32-quickgelu", pretrained="openai", image_size=32, seed=0)
    assert isinstance(encoder.model.transformer.resblocks[0].mlp.gelu, transformer.QuickGELU)
