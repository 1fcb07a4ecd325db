"""Fine-tuning: depth of a parameter, learning rates by layer, frozen towers, averaging with the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training.build import make_encoder, make_loss
from cloob.training.config import TrainConfig
from cloob.training.config.checks import check_combination
from cloob.training.config.parts import OptimConfig
from cloob.training.finetune import layer_depths, tower_of
from cloob.training.loop import train
from cloob.training.optim import make_optimizer, set_learning_rate


def names_of(model: str) -> list[str]:
    return [name for name, _ in create_model(model, seed=0).named_parameters()]


# By hand: open_clip's vision transformer; timm's, and Hugging Face's BERT. Order as their named_parameters.
OWN = {
    "model.visual.class_embedding": 0,
    "model.visual.conv1.weight": 0,
    "model.visual.ln_pre.bias": 0,
    "model.visual.transformer.resblocks.0.mlp.c_proj.weight": 1,
    "model.visual.ln_post.weight": 2,
    "model.visual.proj": 2,
    "model.positional_embedding": 0,
    "model.transformer.resblocks.0.attn.in_proj_weight": 1,
    "model.transformer.resblocks.1.attn.in_proj_weight": 2,
    "model.token_embedding.weight": 0,
    "model.ln_final.bias": 3,
    "model.text_projection": 3,
}
OTHERS = {
    "module.visual.trunk.cls_token": 0,
    "module.visual.trunk.patch_embed.proj.weight": 0,
    "module.visual.trunk.blocks.0.mlp.fc1.weight": 1,
    "module.visual.trunk.blocks.1.mlp.fc1.weight": 2,
    "module.visual.trunk.norm.weight": 3,
    "module.visual.head.proj.weight": 3,
    "model.text.transformer.embeddings.LayerNorm.weight": 0,
    "model.text.transformer.encoder.layer.0.attention.output.LayerNorm.bias": 1,
    "model.text.transformer.encoder.layer.1.attention.output.LayerNorm.bias": 2,
    "model.text.transformer.pooler.dense.weight": 3,
    "model.text.proj.0.weight": 3,
}


@pytest.mark.parametrize("depths", [OWN, OTHERS], ids=["open_clip", "timm and Hugging Face"])
def test_depths_by_names(depths: dict[str, int]) -> None:
    assert {name: depth.depth for name, depth in layer_depths(list(depths)).items()} == depths


def test_every_depth_of_a_tower_is_taken(nano_configs: Path) -> None:
    for model in ("tiny-resnet", "tiny-vit", "tiny-convnext"):
        depths = layer_depths(names_of(model))
        for tower in ("image", "text"):
            found = {depth for name, depth in depths.items() if tower_of(name) == tower}
            (top,) = {depth.top for depth in found}
            assert {depth.depth for depth in found} == set(range(top + 1)), (model, tower)


def test_layer_decay_groups_and_one_step(nano_configs: Path) -> None:
    """AdamW's first step without decay moves each weight by its own learning rate (for gradients far above eps)."""
    encoder, objective = create_model("nano-vit", seed=0), make_objective("clip")
    config = OptimConfig(lr=0.1, weight_decay=0.0, eps=1e-12, layer_decay=0.5)
    optimizer = make_optimizer(encoder, objective, config, torch.device("cpu"))
    named = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in [*named.values(), *objective.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.2)
    start = float(objective.log_inv_tau.detach())
    optimizer.step()
    assert float(objective.log_inv_tau.detach()) == pytest.approx(start - 0.2, abs=1e-6)  # the temperature is no layer
    for name, depth in layer_depths(named).items():
        moved = before[name] - named[name].detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.2 * 0.5 ** (depth.top - depth.depth)))
    assert len({group["lr"] for group in optimizer.param_groups}) == 3


def weights(model: DualEncoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tower: str) -> dict[str, bool]:
    ignored = ("logit_scale", "num_batches_tracked")
    return {n: torch.equal(a[n], b[n]) for n in a if tower_of(n) == tower and not n.endswith(ignored)}


@pytest.fixture
def few(base: TrainConfig, tmp_path: Path) -> TrainConfig:
    return base.override(model="nano-resnet", epochs=1, warmup=0, save_every=0, out=tmp_path / "run")


@pytest.mark.parametrize("micro", [pytest.param(0, marks=pytest.mark.nightly), 4])
def test_a_frozen_image_tower_keeps_weights_and_statistics(few: TrainConfig, micro: int) -> None:
    result = train(few.override(freeze="image", micro_batch_size=micro))
    start, end = weights(create_model("nano-resnet", seed=0)), weights(load_model(result.run))
    assert all(same(start, end, "image").values())
    assert torch.equal(start["visual.bn1.num_batches_tracked"], end["visual.bn1.num_batches_tracked"])
    assert not any(same(start, end, "text").values())
    state = torch.load(result.checkpoint / "trainer.pt", weights_only=True)["optimizer"]  # type: ignore[operator]
    text = [name for name in start if tower_of(name) == "text" and name != "logit_scale" and "attn_mask" not in name]
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) == len(text)


def test_a_frozen_text_tower_and_an_unlocked_top(few: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    result = train(few.override(freeze="text", unlocked=1))
    assert "the text tower is frozen with random weights; --init gives trained ones" in caplog.text
    start, end = weights(create_model("nano-resnet", seed=0)), weights(load_model(result.run))
    changed = {name for name, equal in same(start, end, "text").items() if not equal}
    assert changed == {"ln_final.weight", "ln_final.bias", "text_projection"}
    assert not same(start, end, "image")["visual.bn1.running_mean"]


@pytest.fixture
def pictured(nano_configs: Path, tmp_path: Path) -> Path:
    """A model folder whose pixels are normalised in another way than open_clip's towers do from the start."""
    encoder = create_model("nano-resnet", seed=7)
    encoder.preprocess_cfg |= {"mean": (0.5, 0.25, 0.5), "std": (0.5, 0.5, 0.25)}
    with torch.no_grad():
        encoder.model.visual.bn1.running_mean.add_(0.5)
    save_model(tmp_path / "pictured", encoder, {})
    return tmp_path / "pictured"


def test_a_new_text_tower_beside_a_trained_image_tower(few: TrainConfig, pictured: Path) -> None:
    source = load_model(pictured, device="cpu")
    config = few.override(init_image=str(pictured), model=None, freeze="image", objective="infoloob")
    encoder = make_encoder(config)
    assert encoder.name == "nano-resnet" and encoder.mean == source.mean == (0.5, 0.25, 0.5)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder.eval().encode_image(pixels), source.encode_image(pixels))
    assert all(same(weights(encoder), weights(source), "image").values())
    assert all(same(weights(encoder), weights(create_model("nano-resnet", seed=config.run.seed)), "text").values())
    result = train(config)
    end = load_model(result.run, device="cpu")
    assert all(same(weights(end), weights(source), "image").values()) and end.std == source.std
    assert not any(same(weights(end), weights(encoder), "text").values())
    kept = TrainConfig.from_json(result.run / "config.json").towers
    assert (kept.model, kept.init_image, kept.freeze) == ("nano-resnet", str(pictured), "image")
    assert train(config.override(epochs=2, resume="auto")).epochs == 2
    file = pictured / "open_clip_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name": "mine"}))
    with pytest.raises(InputError, match="does not say what its towers are called; give --model"):
        make_encoder(config)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nano-vit", r"another image tower \(visual.* has .*, nano-vit has .*\); --model"),
        ("nano-tanh", r"trained with GELU, nano-tanh has GELU \{'approximate': 'tanh'\}"),
    ],
)
def test_other_image_towers_are_refused(few: TrainConfig, pictured: Path, model: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        train(few.override(init_image=str(pictured), model=model))


def test_a_run_writes_the_average_with_its_start(few: TrainConfig, tmp_path: Path) -> None:
    first = train(few)
    config = few.override(model=None, init=str(first.run), average_with_start=0.25, out=tmp_path / "tuned")
    second = train(config)
    start, tuned, averaged = (weights(load_model(place)) for place in (first.run, second.run, second.run / "averaged"))
    moved = 0
    for name, value in averaged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * tuned[name], rtol=1e-5, atol=1e-7, msg=name)
            moved += not torch.equal(start[name], tuned[name])
    assert moved > 30
    objective = json.loads((second.run / "averaged" / "objective.json").read_text())
    assert objective == load_model(second.run).objective_config
    # Of a run that has ended the one that is asked for; 0 is the start, exactly.
    assert train(config.override(average_with_start=0.0, resume="auto")).already_finished
    averaged = weights(load_model(second.run / "averaged"))
    assert all(torch.equal(value, start[name]) for name, value in averaged.items() if value.is_floating_point())
    train(config.override(average_with_start=None, overwrite=True))
    assert not (second.run / "averaged").exists()  # an old average does not stay beside a new run


def test_an_average_is_with_the_very_weights_that_the_run_began_with(few: TrainConfig, tmp_path: Path) -> None:
    """The start's run goes on meanwhile; its checkpoint of then is still there."""
    first = train(few)
    config = few.override(model=None, init=str(first.run), average_with_start=0.0, out=tmp_path / "tuned")
    stopped = train(config.override(average_with_start=None))
    train(few.override(resume="auto", epochs=few.run.epochs + 1))
    change = {"resume": "auto", "epochs": few.run.epochs + 1}
    with pytest.raises(InputError, match="holds other weights than the run began with, so averaged is not"):
        train(config.override(**change))
    assert not (stopped.run / "averaged").exists()
    train(config.override(**change, init=str(first.checkpoint)))
    start, averaged = weights(load_model(first.checkpoint)), weights(load_model(stopped.run / "averaged"))
    assert all(torch.equal(value, start[name]) for name, value in averaged.items() if value.is_floating_point())


@pytest.mark.parametrize("key", ["init", "init_image"])
def test_a_run_does_not_overwrite_what_it_starts_from(key: str, few: TrainConfig) -> None:
    first = train(few)
    config = few.override(model=None, overwrite=True)
    for start in (first.run, first.checkpoint):
        with pytest.raises(InputError, match=f"^{key} '{start}' lies in {first.run}, which --overwrite would remove"):
            train(config.override(**{key: str(start)}))
    assert first.checkpoint is not None and first.checkpoint.is_dir()


def test_scales_come_from_init_only_when_asked_for(tmp_path: Path) -> None:
    trained = make_objective("cloob", inv_tau=17.0, beta=11.0)
    save_model(tmp_path / "m", create_model("tiny-resnet", seed=0), trained.config())
    start = TrainConfig().override(init=str(tmp_path / "m"), objective="cloob")
    encoder = make_encoder(start)

    def scales(**leaves: object) -> tuple[float, float]:
        settings = make_loss(start.override(**leaves), encoder).config()
        return round(settings["inv_tau"], 4), round(settings["beta"], 4)

    assert scales() == (30.0, 8.0)
    assert scales(init_scales=True) == (17.0, 11.0)
    assert scales(init_scales=True, beta=3.0) == (17.0, 3.0)
    assert scales(init_scales=True, objective="clip")[0] == 17.0
    with pytest.raises(InputError, match="init_scales needs a model"):
        check_combination(TrainConfig().override(init_scales=True, data=["x"]))
