from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from cloob.errors import InputError
from cloob.recipes import RECIPES, describe, get_recipe
from cloob.train.config import TrainConfig


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built(name: str) -> None:
    from cloob.models.towers import list_models
    from cloob.objective import make_objective

    config = get_recipe(name)
    assert TrainConfig.from_dict(json.loads(config.to_json())) == config
    assert config.towers.model in list_models()
    objective = make_objective(config.loss.objective, **config.loss.overrides())
    assert objective.name == config.loss.objective
    assert describe(name).endswith(".") and len(describe(name)) < 110
    outs = [get_recipe(other).save.out for other in RECIPES]
    assert len(set(outs)) == len(outs)


def test_names() -> None:
    assert {"demo-cloob", "demo-clip", "cc3m-cloob", "cc3m-clip"} <= RECIPES.keys()
    assert get_recipe("demo_cloob") == get_recipe("demo-cloob")
    with pytest.raises(InputError, match="unknown recipe 'demo-cloop'; did you mean demo-cloob"):
        get_recipe("demo-cloop")


def test_the_papers_hyper_parameters() -> None:
    """PAPER.md, "Published recipe"."""
    cloob, clip = get_recipe("cc3m-cloob"), get_recipe("cc3m-clip")
    assert (cloob.towers.model, cloob.towers.image_size) == ("RN50", 224)
    assert (cloob.run.batch_size, cloob.run.epochs) == (512, 70)
    optim = cloob.optim
    assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2, optim.eps) == (1e-3, 0.1, 0.9, 0.999, 1e-8)
    assert (optim.schedule, optim.warmup, optim.restarts) == ("cosine-restarts", 20_000, 10)
    assert cloob.pairs.crop_scale == (0.9, 1.0) and not cloob.pairs.flip
    assert (cloob.pairs.image_column, cloob.pairs.caption_column) == ("filepath", "title")
    assert (cloob.loss.inv_tau, cloob.loss.beta, cloob.loss.scale) == (30, 8, "paper")
    assert clip.loss.inv_tau == pytest.approx(14.3, abs=0.05) and clip.loss.learnable_inv_tau
    assert (clip.optim, clip.run, clip.pairs, clip.towers) == (cloob.optim, cloob.run, cloob.pairs, cloob.towers)


def test_demo_recipes_differ_in_the_objective_only() -> None:
    demos = [get_recipe(name) for name in RECIPES if name.startswith("demo-")]
    assert len({(d.pairs, d.towers, d.optim, d.run, d.log) for d in demos}) == 1
    assert {d.loss.objective for d in demos} == {"cloob", "clip", "infoloob", "infonce-hopfield"}
    assert demos[0].pairs.data == ("demo",) and demos[0].towers.model == "tiny-resnet"


def test_the_cc3m_recipe_trains_on_the_authors_table(tmp_path: Path) -> None:
    """Tab-separated under the name .csv; two steps with small towers."""
    from cloob.train.loop import train

    rows = ["filepath\ttitle"]
    for n in range(8):
        Image.new("RGB", (80, 64), (30 * n, 255 - 30 * n, 128)).save(tmp_path / f"{n}.jpg")
        rows.append(f"{tmp_path / f'{n}.jpg'}\ta picture, number {n}")
    table = tmp_path / "train.csv"
    table.write_text("\n".join(rows) + "\n")
    config = get_recipe("cc3m-cloob").override(
        data=[str(table)],
        model="tiny-resnet",
        image_size=64,
        batch_size=4,
        epochs=1,
        workers=0,
        device="cpu",
        out=tmp_path / "run",
    )
    result = train(config)
    assert result.steps == 2 and result.samples_seen == 8
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 / 20_000, 2e-3 / 20_000])
    assert all(math.isfinite(line["loss"]) for line in lines)
