"""The study on frozen encoders: captions as wrong as said, a fair search, runs that equal ``cloob train align``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cloob.data.open import open_source
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.towers import create_model, open_clip
from cloob.objective import make_objective
from cloob.train.config import TrainConfig
from cloob.train.loop import train as train_align
from cloob.train.towers import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def a_cell(method: str = "cloob", stage: str = "cells", **changes: Any) -> Any:
    from benchmarks.frozen.cells import DEFAULTS, Cell
    from benchmarks.frozen.worlds import World

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
    from benchmarks.frozen import running
    from benchmarks.frozen.features import Data, Pairs

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
