from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cloob.objective import OBJECTIVES, make_objective
from cloob.recipes import RECIPES, describe, get_recipe
from cloob.training.config import TrainConfig
from make import tiny_model, write_pairs


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built(name: str) -> None:
    from cloob.models.source import known_models
    from cloob.models.towers import open_clip

    config = get_recipe(name)
    assert get_recipe(name.replace("-", "_")) == config
    towers, align = config.towers, config.align
    starts = [towers.model, towers.init, align.image_encoder]
    assert sum(start is not None for start in starts) == (name != "vectors")  # which makes heads for the files given
    if towers.model is not None:
        assert towers.model in known_models()
    if towers.init is not None:  # a tag that open_clip knows, wherever its weights are
        model, _, tag = towers.init.partition("/")
        assert tag in open_clip().list_pretrained_tags_by_model(model)
    assert (align.text_encoder is None) == (align.image_encoder is None)
    assert describe(name).endswith(".") and len(describe(name)) < 110
    assert not any(Path(spec).is_absolute() for spec in (*config.pairs.data, *config.pairs.val_data))
    for objective in OBJECTIVES:
        member = get_recipe(name, objective=objective)
        assert TrainConfig.from_dict(json.loads(member.to_json())) == member
        assert make_objective(objective, **member.loss.overrides()).name == member.loss.objective == objective
        if name != "demo":  # which is tuned for each
            assert {part: getattr(member, part) for part in ("pairs", "towers", "optim", "run", "align")} == {
                part: getattr(config, part) for part in ("pairs", "towers", "optim", "run", "align")
            }


def test_the_papers_hyper_parameters() -> None:
    """PAPER.md, "Published recipe"."""
    cloob, clip = get_recipe("cc3m"), get_recipe("cc3m", objective="clip")
    assert (cloob.towers.model, cloob.towers.image_size) == ("RN50-quickgelu", 224)
    assert (cloob.run.batch_size, cloob.run.epochs) == (512, 70)
    optim = cloob.optim
    assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2, optim.eps) == (1e-3, 0.1, 0.9, 0.999, 1e-8)
    assert (optim.schedule, optim.warmup, optim.restarts) == ("cosine-restarts", 20_000, 10)
    assert cloob.pairs.crop_scale == (0.9, 1.0) and not cloob.pairs.flip
    assert (cloob.pairs.image_column, cloob.pairs.caption_column) == ("filepath", "title")
    assert (cloob.loss.inv_tau, cloob.loss.beta) == (30, 8)
    assert make_objective("cloob", **cloob.loss.overrides()).scale == "paper"
    assert clip.loss.inv_tau == pytest.approx(14.3, abs=0.05) and clip.loss.learnable_inv_tau
    vit = get_recipe("yfcc", model="ViT-B-32").optim
    assert (vit.lr, vit.weight_decay, vit.beta2, vit.eps) == (5e-4, 0.2, 0.98, 1e-6)
    assert get_recipe("yfcc", model="RN101-quickgelu").optim == optim and get_recipe("yfcc").towers == cloob.towers


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
def test_recipes_train(recipe: str, changes: dict[str, object], tmp_path: Path) -> None:
    """Two steps of each kind, on tiny towers."""
    from cloob.models.load import load_model
    from cloob.training.loop import train

    if "init" in changes:
        changes = changes | {"init": str(tiny_model(tmp_path / "init", seed=1, objective="clip"))}
    colours = {f"{n}": ((30 * n, 255 - 30 * n, 128), f"a picture, number {n}") for n in range(8)}
    changes = changes | {"data": [str(write_pairs(tmp_path / "pairs", colours))], "out": tmp_path / "run"}
    config = get_recipe(recipe).override(batch_size=4, epochs=1, workers=0, device="cpu", **changes)
    result = train(config)
    assert (result.steps, result.samples_seen) == (2, 8)
    assert load_model(result.run).image_size == 64
    assert (result.run / "averaged").is_dir() == (recipe == "finetune")
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)
    if recipe == "cc3m":
        assert [line["lr"] for line in lines] == pytest.approx([1e-3 / 20_000, 2e-3 / 20_000])
