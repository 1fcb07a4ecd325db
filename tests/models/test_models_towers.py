"""create_model: names, sizes, seeds, errors; nothing of open_clip leaks out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloob.models.load import load_model
from cloob.models.towers import TINY_MODELS, create_model, open_clip
from support import fill_hub_cache, free_port, use_hub


def test_an_open_clip_config_by_name_and_by_its_slash_name() -> None:
    encoder = create_model("ViT-S-32-alt", seed=0, image_size=32)
    assert encoder.image_size == 32 and encoder.config.settings["vision_cfg"]["image_size"] == 32
    assert encoder.context_length == 77 and encoder.embed_dim == 256
    # the override stays in this model
    assert open_clip().get_model_config("ViT-S-32-alt")["vision_cfg"]["image_size"] == 224
    assert create_model("tiny/vit", seed=0).name == "tiny-vit"


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


def test_a_file_of_open_clips_training_with_siglip(tmp_path: Path) -> None:
    trained = create_model("tiny-vit", seed=0)
    weights = trained.model.state_dict() | {"logit_bias": torch.tensor(-3.0)}
    weights["logit_scale"] = torch.tensor(10.0).log()
    state = {f"module.{key}": value.contiguous() for key, value in weights.items()}
    file = tmp_path / "run" / "checkpoints" / "epoch_3.pt"
    file.parent.mkdir(parents=True)
    (tmp_path / "run" / "params.txt").write_text("epochs: 3\nmodel: tiny-vit\n")
    optimizer = torch.optim.AdamW(trained.model.parameters()).state_dict()
    torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer}, file)
    encoder = create_model("tiny-vit", pretrained=str(file), seed=1)
    assert encoder.objective_config["bias"] == -3.0
    assert encoder.objective_config["inv_tau"] == pytest.approx(10.0)
    assert encoder.config == trained.config and not encoder.model.logit_scale.requires_grad
    assert encoder.model.visual.proj.requires_grad
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    by_its_path = load_model(file)  # ../params.txt names its towers
    assert by_its_path.name == "tiny-vit" and by_its_path.objective_config == encoder.objective_config
    assert torch.equal(by_its_path.model.visual.proj, weights["visual.proj"])


def test_a_tag_brings_its_weights_activation_and_pixels(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache. OpenAI's weights were trained with QuickGELU; ViT-B-32's configuration alone says GELU."""
    fill_hub_cache(tmp_path, "some/tiny", tower)
    use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path)
    tag = {"hf_hub": "some/tiny/", "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    monkeypatch.setitem(open_clip().pretrained._PRETRAINED, "tiny-vit", {"mine": tag})
    encoder = load_model("tiny-vit/mine")
    assert type(encoder.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert encoder.config.settings["quick_gelu"] is True
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.preprocess_cfg["interpolation"] == "bilinear"
    assert torch.equal(encoder.model.visual.proj, load_model(tower).model.visual.proj)
