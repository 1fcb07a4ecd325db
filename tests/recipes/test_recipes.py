from __future__ import annotations

import dataclasses
import io
import json
import math
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from cloob.objective import OBJECTIVES
from cloob.recipes import RECIPES, describe, get_recipe
from cloob.training.config import TrainConfig


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built(name: str) -> None:
    from cloob.models.source import known_models
    from cloob.models.towers import open_clip
    from cloob.objective import make_objective

    config = get_recipe(name)
    assert get_recipe(name.replace("-", "_")) == config
    assert TrainConfig.from_dict(json.loads(config.to_json())) == config
    towers, align = config.towers, config.align
    assert (towers.model is not None) + (towers.init is not None) + (align.image_encoder is not None) == 1
    if towers.model is not None:
        assert towers.model in known_models()
    if towers.init is not None:  # a tag that open_clip knows, wherever its weights are
        model, _, tag = towers.init.partition("/")
        assert tag in open_clip().list_pretrained_tags_by_model(model)
    assert (align.text_encoder is None) == (align.image_encoder is None)
    objective = make_objective(config.loss.objective, **config.loss.overrides())
    assert objective.name == config.loss.objective
    assert describe(name).endswith(".") and len(describe(name)) < 110
    assert not any(Path(spec).is_absolute() for spec in (*config.pairs.data, *config.pairs.val_data))
    outs = [get_recipe(other).save.out for other in RECIPES]
    assert len(set(outs)) == len(outs)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "model", sorted({model for name in RECIPES if (model := get_recipe(name).towers.model) is not None})
)
def test_the_towers_of_every_recipe_can_be_made(model: str) -> None:
    from cloob.training.optim import parameter_groups
    from cloob.training.towers.build import make_encoder

    config = next(c for name in RECIPES if (c := get_recipe(name)).towers.model == model)
    encoder = make_encoder(config)
    assert encoder.image_size == (config.towers.image_size or encoder.image_size)
    groups = parameter_groups(encoder, nn.Module(), config.optim.weight_decay, 0.75)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in encoder.parameters())


def test_families_differ_in_the_objective_alone() -> None:
    usual = {"cloob", "clip", "infoloob", "infonce-hopfield"}
    for family, names in (("cc3m-", usual), ("pictograms-", usual | {"siglip"}), ("demo-scratch-", set(OBJECTIVES))):
        members = [get_recipe(name) for name in RECIPES if name.startswith(family)]
        assert {member.loss.objective for member in members} == names
        assert len({(m.pairs, m.towers, m.optim, m.run, m.log, m.align) for m in members}) == 1
    warm, cloob = get_recipe("pictograms-cloob-warm").loss, get_recipe("pictograms-cloob").loss
    assert (warm.retrieval_from, dataclasses.replace(warm, retrieval_from=0.0)) == (0.5, cloob)
    demos = [get_recipe(f"demo-{name}").override(lr=1e-3, head_dropout=0.3) for name in OBJECTIVES]  # tuned each
    assert len({(d.pairs, d.towers, d.optim, d.run, d.log, d.align) for d in demos}) == 1


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


def test_the_cc3m_recipe_trains_on_the_authors_table(tmp_path: Path) -> None:
    """Tab-separated under the name .csv; two steps with small towers."""
    from cloob.training.loop import train

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


def shards(folder: Path, sizes: dict[str, int]) -> Path:
    """WebDataset tars of small pictures, with the sizes.json that the authors have beside theirs."""
    folder.mkdir()
    for shard, n in sizes.items():
        with tarfile.open(folder / shard, "w") as tar:
            for i in range(n):
                picture = io.BytesIO()
                Image.new("RGB", (70, 64), (20 * i, 200 - 20 * i, 90)).save(picture, "JPEG")
                for ending, content in (("jpg", picture.getvalue()), ("txt", f"photo {i} of {shard}".encode())):
                    member = tarfile.TarInfo(f"{shard[:-4]}-{i}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("yfcc-rn50-cloob", {"model": "tiny-resnet"}),
        pytest.param("yfcc-vit-b-32-clip", {"model": "tiny-vit"}, marks=pytest.mark.nightly),
        pytest.param("pictograms-infoloob", {}, marks=pytest.mark.nightly),
        ("finetune", {"init": "INIT", "average_with_start": 0.5}),
        ("lit", {"init": "INIT"}),
    ],
)
def test_recipes_train_on_shards(recipe: str, changes: dict[str, object], tmp_path: Path) -> None:
    """Two steps of each kind, on tiny towers."""
    from cloob.models.folder import save_model
    from cloob.models.load import load_model
    from cloob.models.towers import create_model
    from cloob.objective import make_objective
    from cloob.training.loop import train

    if "init" in changes:
        save_model(tmp_path / "init", create_model("tiny-vit", seed=1), make_objective("clip").config())
        changes = {**changes, "init": str(tmp_path / "init")}
    data = shards(tmp_path / "data", {"00000.tar": 5, "00001.tar": 3})
    config = get_recipe(recipe).override(
        data=[str(data)], batch_size=4, epochs=1, workers=0, device="cpu", out=tmp_path / "run", **changes
    )
    result = train(config)
    assert (result.steps, result.samples_seen) == (2, 8)
    assert load_model(result.run).image_size == 64
    assert (result.run / "averaged").is_dir() == (recipe == "finetune")
