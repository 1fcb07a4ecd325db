"""The studies' machinery: a stopped run ends as one that was not, and its training is the library's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cloob.data.open import open_source
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.towers import create_model, open_clip
from cloob.objective import make_objective
from cloob.training import build
from cloob.training.config import TrainConfig
from cloob.training.loop import train as train_align
from paper_loops import objective_loop

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.nightly


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


# --- factors


def tiny(**changes: Any) -> Any:
    from benchmarks.factors.world import World

    return World(**{"pool": 300, "batch": 32, "seen": 640, "held_out": 200, "pictures": 400, **changes})


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan with two small worlds, two methods, a search of three settings and one seed."""
    from benchmarks.factors import plan

    monkeypatch.setattr(plan, "worlds", lambda: [tiny(wrong=0.4, seen=320), tiny(wrong=0.0, seen=320)])
    monkeypatch.setattr(plan, "is_side", lambda world: False)
    monkeypatch.setattr(plan, "METHODS", ("clip",))
    monkeypatch.setattr(plan, "ADDED", ("sum",))
    monkeypatch.setattr(plan, "_MAIN", (lambda *_: [{"lr": 3e-3}, {"lr": 3e-4}],))
    monkeypatch.setattr(plan, "SEARCH_SEEDS", (100,))
    monkeypatch.setattr(plan, "SEEDS", (0,))
    return plan


@pytest.mark.parametrize(("wrong", "n", "expected"), [(0.0, 300, 0), (0.4, 300, 120), (0.6, 50, 30), (0.8, 25, 20)])
def test_exactly_the_share_of_captions_is_another_pairs(wrong: float, n: int, expected: int) -> None:
    from benchmarks.factors.world import draw

    clean, noisy = (draw(tiny(wrong=w, pool=n), seed=3).train for w in (0.0, wrong))
    assert torch.equal(clean.pictures, noisy.pictures)
    changed = (clean.captions != noisy.captions).any(1)
    assert int(noisy.wrong.sum()) == expected and torch.equal(changed, noisy.wrong)
    # No caption is lost: they have changed places.
    assert torch.equal(clean.captions.sum(1).sort().values, noisy.captions.sum(1).sort().values)


def test_a_stopped_study_goes_on_and_comes_to_the_same_records(tiny_plan: Any, tmp_path: Path) -> None:
    from benchmarks.factors.run import train
    from benchmarks.studies.__main__ import go

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for study, limits in ((whole, (None,)), (parts, (1, 4, 100))):
        for limit in limits:
            go(study, lambda study=study: tiny_plan.runs(*tiny_plan.scores(study)), train, limit)  # type: ignore[misc]
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.json"))
    assert files == sorted(path.relative_to(parts) for path in parts.rglob("*.json"))
    assert len(files) == 2 * 2 * (3 + 1)
    for file in files:
        one, other = (json.loads((root / file).read_text(encoding="utf-8")) for root in (whole, parts))
        assert {k: v for k, v in one.items() if k != "cpu_seconds"} == {
            k: v for k, v in other.items() if k != "cpu_seconds"
        }
        assert tiny_plan.Run.from_config(one["config"]).id == file.stem == one["id"]
        assert ("zero_shot" in one) == (file.parts[1] == "cells"), "no choice may see zero-shot accuracy"
    assert tiny_plan.search("clip", tiny_plan.worlds()[0], *tiny_plan.scores(whole)).complete


def test_the_sum_is_the_mean_of_its_two_objectives_by_the_formula() -> None:
    from benchmarks.factors.plan import Setting
    from benchmarks.factors.run import objective_of

    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    summed = objective_of("sum", Setting(7.0, beta=3.0))
    assert summed.hopfield and float(summed.inv_tau) == 7.0 and float(summed.beta) == 3.0
    rows = x.tolist(), y.tolist()
    parts = [objective_loop(*rows, 7.0, 3.0, hopfield=hopfield, scale="unit") for hopfield in (False, True)]
    assert float(summed(x, y)) == pytest.approx(sum(parts) / 2, rel=1e-5)


# --- frozen encoders


def a_cell(method: str = "cloob", stage: str = "cells", **changes: Any) -> Any:
    from benchmarks.frozen.plan import DEFAULTS, Cell, World

    setting = dataclasses.replace(DEFAULTS[method], batch_size=16, **changes)
    return Cell(stage, method, World("linear", "swap", 0.5, 96), 3, 4, setting)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Heads between two tiny towers on 32 pairs, 3 epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("aligned")
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    (folder / "frozen-nano.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip().add_model_config(folder / "frozen-nano.json")
    save_model(folder / "towers", create_model("frozen-nano", seed=7), make_objective("clip").config())
    random = np.random.default_rng(0)
    (folder / "pairs").mkdir()
    for i in range(32):
        picture = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "pairs" / f"{i:02d}.png")
        (folder / "pairs" / f"{i:02d}.txt").write_text(f"thing number {i}")
    return TrainConfig().override(
        data=[str(folder / "pairs")],
        image_encoder=str(folder / "towers"),
        text_encoder=str(folder / "towers"),
        cache_dir=folder / "cache",
        out=folder / "run",
        batch_size=8,
        epochs=3,
        lr=2e-3,
        schedule="cosine",
        weight_decay=0.1,
        seed=3,
        workers=0,
        device="cpu",
        tensorboard=False,
    )


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_run_equals_cloob_train_align(
    kind: str, aligned: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.frozen import run as running
    from benchmarks.frozen.data import Data, Pairs

    config = aligned.override(head=kind, embed_dim=running.EMBED_DIM, out=tmp_path / "run")
    result = train_align(config)
    theirs = load_model(str(result.run))
    encoder = build.make_encoder(config)
    loader = build.make_loader(open_source(config.pairs.data[0]), encoder, config, torch.device("cpu"))
    images, texts, *_ = loader.features  # type: ignore[union-attr]
    own = np.arange(32)
    data = Data({name: Pairs(images, own, own) for name in ("train", "val")}, {}, tuple(map(str, own)), texts, own)
    cell = a_cell(lr=2e-3)
    world = dataclasses.replace(cell.world, head=kind, share=0.0, pairs=32)
    setting = dataclasses.replace(cell.setting, batch_size=8)
    cell = dataclasses.replace(cell, world=world, setting=setting, epochs=3)
    # Validation grows without end, so that the last epoch is the one that is kept.
    count = iter(range(9))
    monkeypatch.setattr(running, "recalls", lambda *_: {"mean_recall": next(count)})
    ours, *_ = running.train(cell, running.View(data, cell), data)
    for side, head in (("image", ours.visual), ("text", ours.text)):
        expected = getattr(theirs.model, f"{side}_head").state_dict()
        for name, value in head.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
