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


def invented(n: int = 96) -> Any:
    """Features of pictures and captions that share a few directions; each test set has four classes."""
    from benchmarks.frozen.features import Data, Labelled, Pairs
    from benchmarks.pictograms.cells import ZEROSHOT

    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n + 60, 4, generator=generator)
    images = shared @ torch.randn(4, 12, generator=generator) + 0.3 * torch.randn(n + 60, 12, generator=generator)
    table = shared @ torch.randn(4, 8, generator=generator) + 0.3 * torch.randn(n + 60, 8, generator=generator)
    train, val = np.arange(n), np.arange(n, n + 40)
    pairs = {"train": Pairs(images[:n], train, train[::-1].copy())}
    pairs |= {name: Pairs(images[n : n + 40], val, val[::-1].copy()) for name in ("val", "tuxpaint-captions")}
    labelled = Labelled(images[:8], np.arange(8) % 4, np.arange(8).reshape(2, 4).T.copy())
    texts = tuple(f"thing {i}" for i in range(n + 60))
    return Data(pairs, dict.fromkeys(ZEROSHOT, labelled), texts, table, np.arange(n + 40, n + 60))


def a_cell(method: str = "cloob", stage: str = "cells", **changes: Any) -> Any:
    from benchmarks.frozen.cells import DEFAULTS, Cell
    from benchmarks.frozen.worlds import World

    setting = dataclasses.replace(DEFAULTS[method], batch_size=16, **changes)
    return Cell(stage, method, World("linear", "swap", 0.5, 96), 3, 4, setting)


def test_swapped_captions_keep_no_place_and_all_stay_in_use() -> None:
    from benchmarks.frozen.captions import wrong_rows

    own = np.arange(100, 200)
    rows = wrong_rows("swap", 0.4, own, own, own, np.random.default_rng(0))
    assert (rows != own).sum() == 40 and sorted(rows) == own.tolist()
    assert (wrong_rows("swap", 0.0, own, own, own, np.random.default_rng(0)) == own).all()
    names = np.array([7, 8])
    rows = wrong_rows("name", 0.25, own, own, names, np.random.default_rng(0))
    assert np.isin(rows, names).sum() == 25 and (np.isin(rows, names) | (rows == own)).all()
    rows = wrong_rows("cut", 1.0, own, own + 1000, names, np.random.default_rng(0))
    assert (rows == own + 1000).all()
    with pytest.raises(ValueError, match="swap, cut or name"):
        wrong_rows("typo", 0.1, own, own, names, np.random.default_rng(0))


def test_a_cut_caption_is_a_run_of_its_words() -> None:
    from benchmarks.frozen.captions import cut_all, file_names

    caption = "a red cross on white"
    parts = cut_all([caption] * 200, seed=0)
    words = caption.split()
    runs = {" ".join(words[i:j]) for i in range(5) for j in range(i + 1, 6)} - {caption}
    assert set(parts) == runs
    assert cut_all(["bell"], seed=0) == ["bell"]
    names = file_names(500, seed=0)
    assert len(set(names)) == 500 and names == file_names(500, seed=0) and "IMG_9127.JPG" in names


@pytest.mark.parametrize("head", ["mlp", "linear", "new-text", "fine-tune"])
def test_each_method_gets_as_many_runs_and_the_claim_comes_first(head: str) -> None:
    from benchmarks.frozen import cells, worlds

    scores: dict[str, float] = {}
    done: dict[str, float] = {}
    order = []
    assert cells.next_cell(scores, done, head) == next((c for c in cells.runs(scores) if c.world.head == head), None)
    for cell in cells.runs(scores):  # which goes on from the scores as they come
        known = scores if cell.stage == "search" else done
        if cell.id not in known:
            known[cell.id] = (len(known) * 37 % 101) / 101
            order += [cell] if cell.world.head == head else []
    assert cells.next_cell(scores, done) is None
    here = [world for world in worlds.WORLDS if world.head == head]
    core = [world for world in here if world in worlds.CORE]
    afterwards = [(m, world) for m in ("clip", "cloob", "infoloob") for world in core]
    listed = [(method, world) for world in here for method in worlds.methods(world)]
    whole = sum(cells.runs_a_method(world) for _, world in listed)
    assert len([c for c in order if c.stage == "search"]) == whole + len(afterwards) * len(cells.DECAYS)
    again = [
        world for m, world in afterwards if cells.chosen_with_decay(m, world, scores) != cells.chosen(m, world, scores)
    ]
    masked = [world for world in worlds.MASKED if world.head == head]
    whole = sum(len(worlds.seeds(world)) for _, world in listed)
    assert len([c for c in order if c.stage == "cells"]) == whole + len(worlds.SEEDS) * (len(again) + 2 * len(masked))
    assert bool(again) == bool(core)
    if core:
        assert cells.RUNS_A_METHOD >= 12 and {cells.runs_a_method(world) for world in core} == {cells.RUNS_A_METHOD}
        block = 2 * (cells.RUNS_A_METHOD + len(worlds.SEEDS))
        assert [c.world.share for c in order[: 3 * block : block]] == [0.4, 0.0, 0.6]
        assert {c.method for c in order[: 3 * block]} == {"clip", "cloob"}
    for method, world in listed:
        runs = [cell for _, cell in cells.search(method, world, scores)]
        best = cells.chosen(method, world, scores)
        assert best is not None and scores[best.id] == max(scores[cell.id] for cell in runs)
        assert len(runs) == len({cell.id for cell in runs}) == cells.runs_a_method(world)
        assert {cell.seed for cell in runs} == {cells.SEARCH_SEED} and cells.SEARCH_SEED not in worlds.SEEDS
        assert [c.seed for c in cells.cells_of(method, world, scores)] == list(worlds.seeds(world))
        masked_cells = cells.cells_of(method, world, scores, masked=True)
        assert all(cell.setting.mask_duplicates and "_masked" in cell.id for cell in masked_cells)
    for method, world in afterwards:
        tried = [cells.chosen(method, world, scores), *cells.decays(method, world, scores)]
        best = cells.chosen_with_decay(method, world, scores)
        assert [cell.setting.weight_decay for cell in tried] == [0.1, 1, 3, 10]
        assert best in tried and scores[best.id] == max(scores[cell.id] for cell in tried)
    assert cells.Cell.from_config(json.loads(json.dumps(order[-1].config()))) == order[-1]


def test_a_search_beside_the_claim_starts_from_the_claims_choice() -> None:
    from benchmarks.frozen.cells import chosen, search
    from benchmarks.frozen.worlds import CORE, World, nearest

    scores: dict[str, float] = {}
    fewer = World("linear", "swap", 0.4, 10_819)
    assert not list(search("clip", fewer, scores))
    base = World("linear", "swap", 0.4)
    while (best := chosen("clip", base, scores)) is None:
        scores |= {cell.id: cell.setting.lr + cell.epochs for _, cell in search("clip", base, scores)}
    ((name, start),) = search("clip", fewer, scores)
    assert (name, start.setting, start.world) == ("start", best.setting, fewer)
    assert start.epochs == 2 * best.epochs  # a quarter of the pairs: half the steps
    assert nearest(World("mlp", "name", 0.4)) == World("mlp", "swap", 0.4) == nearest(World("mlp", "swap", 0.2))
    assert nearest(World("mlp", "cut", 1.0)) == World("mlp", "swap", 0.0)
    assert not any(map(nearest, CORE))
    assert nearest(World("fine-tune", "swap", 0.4)) == World("new-text", "swap", 0.4)


def test_methods_see_the_same_wrong_captions_and_held_out_pairs_are_as_wrong() -> None:
    from benchmarks.frozen.running import View

    data = invented()
    views = [View(data, a_cell(method)) for method in ("clip", "cloob")]
    assert (views[0].rows == views[1].rows).all() and (views[0].held_out == views[1].held_out).all()
    train, val = data.pairs["train"], data.pairs["val"]
    assert (views[0].rows != train.own).mean() == 0.5 and (views[0].held_out != val.own).mean() == 0.5
    fewer = dataclasses.replace(a_cell(), world=dataclasses.replace(a_cell().world, pairs=32))
    view = View(data, fewer)
    assert len(set(view.pictures)) == 32 and (view.rows != train.own[view.pictures]).sum() == 16
    assert sorted(view.rows) == sorted(train.own[view.pictures])


def test_a_run_keeps_its_best_epoch_and_the_search_sees_no_test_set() -> None:
    from benchmarks.frozen.running import run

    data = invented()
    record = run(a_cell(), data)
    recalls = [line["recall"] for line in record["curve"]]
    assert len(recalls) == 4 and record["score"] == max(recalls) == recalls[record["best_epoch"] - 1]
    assert set(record["zeroshot"]) == set(data.sets)
    again = run(a_cell(), data)
    assert {**again, "cpu_seconds": 0} == {**record, "cpu_seconds": 0}
    searched = run(a_cell(stage="search"), data)
    assert {"zeroshot", "val", "tuxpaint-captions"}.isdisjoint(searched) and searched["curve"] == record["curve"]
    curves = [run(a_cell(method), data)["curve"][0]["loss"] for method in ("sum", "cloob", "infoloob")]
    assert min(curves[1:]) < curves[0] < max(curves[1:])
    assert run(a_cell("cloob-warm"), data)["curve"][:2] == run(a_cell("infoloob"), data)["curve"][:2]
    assert run(a_cell(mask_duplicates=True), data)["curve"] == record["curve"]  # all captions differ
    data.pairs["train"].own[1::2] = data.pairs["train"].own[::2]
    assert run(a_cell(mask_duplicates=True), data)["curve"] != run(a_cell(), data)["curve"]
    data.pairs["train"].images[:] = float("nan")
    lost = run(a_cell(stage="search"), data)["curve"]
    assert [(line["loss"], line["skipped_steps"]) for line in lost] == [(None, 6)] * 4


def test_a_new_text_tower_is_trained_on_tokens_beside_a_linear_head() -> None:
    from benchmarks.frozen import running, worlds

    data, cell = invented(), a_cell("clip", "search", lr=1e-3)
    cell = dataclasses.replace(cell, world=dataclasses.replace(cell.world, head=worlds.NEW_TEXT, share=0.0), epochs=6)
    fresh = running.TextTower(cell.seed).state_dict()
    heads, _, curve = running.train(cell, running.View(data, cell), data)
    assert curve[-1]["loss"] < curve[0]["loss"] and data.tokens.shape == (156, 24)
    moved = {name for name, value in heads.text.state_dict().items() if not torch.equal(value, fresh[name])}
    assert "encoder.model.token_embedding.weight" in moved and not any(".visual." in name for name in moved)
    assert {world.head for world in worlds.LIT} == {worlds.NEW_TEXT} and isinstance(heads.visual, running.Head)


def test_the_upper_part_of_the_image_encoder_is_fine_tuned_the_lower_ones_more_slowly() -> None:
    from benchmarks.frozen import running, worlds
    from benchmarks.frozen.tuned import Below, open_encoder

    encoder = open_encoder(running.IMAGE_SIZE)
    pixels = torch.randn(156, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    maps = Below(encoder)(pixels).half()
    data = invented()
    cell = a_cell("infoloob", "search", lr=1e-3)
    tuned = dataclasses.replace(cell.world, head=worlds.FINE_TUNE, pairs=32)
    cell = dataclasses.replace(cell, world=tuned, epochs=2)
    train, val = data.pairs["train"], data.pairs["val"]
    data.pairs["train"] = dataclasses.replace(train, images=maps[:32], own=train.own[:32], cut=train.cut[:32])
    data.pairs["val"] = dataclasses.replace(val, images=maps[96:136])
    fresh = running.Heads((encoder.features, 8), worlds.FINE_TUNE, cell.seed).eval()
    whole = encoder(pixels[:8])
    torch.testing.assert_close(fresh.visual.features(maps[:8]), whole, rtol=0.02, atol=0.02)
    heads, _, curve = running.train(cell, running.View(data, cell), data)
    assert curve[1]["loss"] < curve[0]["loss"]
    before, moved = fresh.state_dict(), heads.state_dict()
    steps = {name: (moved[name] - before[name]).abs().mean() for name in before if name.endswith("conv_pw.weight")}
    assert all(step > 0 for step in steps.values())
    assert steps["visual.blocks.5.0.conv_pw.weight"] < steps["visual.blocks.6.0.conv_pw.weight"]
    torch.testing.assert_close(heads.visual.head.mean, encoder(pixels[:32]).mean(0), rtol=0.02, atol=0.02)


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
