"""Heads on frozen encoders through the ordinary loop: features once, resume, early
stopping, one-line errors.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from train_helpers import exact, lines

from cloob import cli
from cloob.data.batch import caption_id
from cloob.data.open import open_source
from cloob.errors import InputError
from cloob.models.aligned.encoders import ImageEncoder, TowerText
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.load import load_model
from cloob.training.config import TrainConfig
from cloob.training.given import make_encoder, make_loader
from cloob.training.loop import train
from make import tiny_model
from support import raises


@pytest.fixture(scope="module")
def towers(tmp_path_factory, nano_configs):
    """Two encoders: the image tower of one model, the text tower of another."""
    folder = tmp_path_factory.mktemp("towers")
    return [
        str(tiny_model(folder / str(seed), "nano-vit", seed, "clip")) for seed in (7, 8)
    ]


@pytest.fixture
def heads(base, towers, pairs_folder, tmp_path):
    encoders = {
        "model": None,
        "image_encoder": towers[0],
        "text_encoder": towers[1],
        "embed_dim": 12,
    }
    config = base.override(
        **encoders, head_dropout=0.2, val_data=[str(pairs_folder)], save_every=0
    )
    return config.override(cache_dir=tmp_path / "cache", out=tmp_path / "run")


@pytest.fixture
def computed(caplog):
    """Whether features were computed since the last question: the log says how far it
    is.
    """
    caplog.set_level(logging.INFO, "cloob.training.align")

    def ask():
        said = ": features of " in caplog.text
        caplog.clear()
        return said

    return ask


def test_held_out_pairs_choose_the_objective_where_no_batch_size_is_given(heads):
    config = heads.override(
        objective="auto",
        batch_size=0,
        warmup=None,
        epochs=1,
        patience=0,
        best="val_recall",
    )
    run = train(config).run
    assert json.loads((run / "objectives.json").read_text())["chosen"] in (
        "infoloob",
        "clip",
        "siglip",
        "cloob",
        "cca",
    )


def test_features_are_computed_once(heads, computed):
    """Training and held-out pairs are the same here: one file."""
    first = train(heads)
    assert computed()
    again = train(heads.override(out=heads.save.out / "again"))
    assert not computed()
    assert (first.stopped, again.stopped) == (
        None,
        None,
    )  # by a SIGTERM to whoever runs the tests
    assert exact(again.run) == exact(first.run)
    (file,) = (heads.pairs.cache_dir / "features").glob("*.safetensors")
    nothing = {"image_encoder": None, "text_encoder": None, "data": (), "val_data": ()}
    vectors = heads.override(
        **nothing, a=f"{file}:images", b=f"{file}:texts", out=heads.save.out / "vectors"
    )
    same, of_align = load_model(train(vectors).run), load_model(f"{first.run}:last")
    for head in ("image_head", "text_head"):
        ours, theirs = (
            getattr(model.model, head).state_dict() for model in (same, of_align)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    closed = train(heads.override(objective="cca", out=heads.save.out / "closed"))
    assert load_model(closed.run).embed_dim == 12 and not computed()
    with pytest.raises(InputError, match=r"38 distinct ids; --clean needs 100"):
        train(heads.override(clean="auto", out=heads.save.out / "clean"))
    assert (
        lines(closed.run / "epochs.jsonl")[0]["val_recall"] > 0.9
    )  # as many pairs as directions, nearly
    file.write_bytes(file.read_bytes()[:1000])
    raises(
        InputError,
        rf"{file.name} cannot be read",
        train,
        heads.override(out=heads.save.out / "other", epochs=1),
    )


def test_features_are_those_of_the_bytes_that_are_there(
    heads, pairs_folder, tmp_path, monkeypatch
):
    """Every picture replaced under its name, size and time: other features.

    The same bytes elsewhere: the same ones.
    """
    folder = tmp_path / "pairs"
    shutil.copytree(pairs_folder, folder)
    config = heads.override(data=[str(folder)])

    def features(config=config):
        loader = make_loader(
            open_source(folder), make_encoder(config), config, torch.device("cpu")
        )
        return torch.from_numpy(loader.pairs.a)

    before, paths = features(), [folder / "00.png", folder / "01.png"]
    for path, content in zip(
        paths, [path.read_bytes() for path in reversed(paths)], strict=True
    ):
        time = path.stat().st_mtime_ns
        path.write_bytes(content)
        os.utime(path, ns=(time, time))  # as an editor that keeps the time
    after = features()
    torch.testing.assert_close(after[[1, 0]], before[:2])
    assert torch.equal(after[2:], before[2:]) and not torch.allclose(
        after[0], before[0]
    )
    captions = features()
    (folder / "02.txt").write_text("another caption")
    assert (
        torch.equal(features(), captions)
        and len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 3
    )
    others = (
        {"image_encoder": config.align.text_encoder},
        {"text_encoder": config.align.image_encoder},
    )
    assert [
        torch.equal(features(config.override(**other)), captions) for other in others
    ] == [False, True]
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 5
    shutil.move(folder, tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    monkeypatch.setattr(AlignedEncoder, "features", None)  # they are in the cache
    assert torch.equal(features(), captions)


def test_pairs_that_cannot_be_used_are_named_counted_and_limited(
    heads, pairs_folder, tmp_path
):
    """As in other runs, also where the features come from the cache: 22 of 40 pictures
    are gone, 2 others are bad.
    """
    folder = tmp_path / "pairs"
    shutil.copytree(pairs_folder, folder)
    for path in sorted(folder.glob("*.png"))[-22:]:
        path.unlink()
    config = heads.override(data=[str(folder)], val_data=[str(folder)], epochs=2)
    said = (
        rf"^{folder}: 23 of 40 (samples|held-out pairs) cannot be used, more than"
        r" max_bad_fraction = {} allows: "
    )
    said += (
        r"22 missing image \(e\.g\. 18\.txt: no image next to .*18\.txt\); 1 corrupt"
        r" image \(e\.g\. 13\.png: .+\)$"
    )
    raises(
        InputError, said.format(r"0\.5"), train, config.override(max_bad_fraction=0.5)
    )
    train(config.override(max_bad_fraction=0.6, batch_size=4))
    named = lines(heads.save.out / "skipped.jsonl")
    gone = {f"{i:02}.txt": "missing image" for i in range(18, 40)} | {
        "13.png": "corrupt image"
    }
    for held_out in (False, True):
        part = [line for line in named if line.get("held_out", False) == held_out]
        assert {line["key"]: line["reason"] for line in part} == gone and len(
            part
        ) == 23
        assert {(line["epoch"], line["rank"]) for line in part} == {(1, 0)} and all(
            line["detail"] for line in part
        )
    epochs = lines(heads.save.out / "epochs.jsonl")
    counts = {"missing image": 22, "corrupt image": 1}
    assert [line["skipped"] for line in epochs] == [counts, {}]
    assert [line["val_skipped"] for line in epochs] == [counts, counts]
    other = config.override(max_bad_fraction=0.5, out=tmp_path / "other")
    raises(
        InputError, said.format(r"0\.5"), train, other
    )  # by the features in the cache
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_a_picture_with_several_captions_is_one_pair_of_an_epoch(
    heads, pairs_folder, tmp_path
):
    """Ten pictures with one to three captions: one is drawn for each epoch; a held-out
    picture has its first.
    """
    captions = [(i, f"caption {i} {j}") for i in range(10) for j in range(1 + i % 3)]
    table = "".join(f"{pairs_folder}/{i:02}.png\t{text}\n" for i, text in captions)
    (tmp_path / "t.csv").write_text(f"filepath\ttitle\n{table}")
    config = heads.override(data=[str(tmp_path / "t.csv")], batch_size=5)
    source, encoder = open_source(tmp_path / "t.csv"), make_encoder(config)
    texts = {caption_id(text): (i, text) for i, text in captions}

    def drawn(epoch, *, train=True):
        loader = make_loader(source, encoder, config, torch.device("cpu"), train=train)
        return dict(
            texts[id] for batch in loader.epoch(epoch) for id in batch.ids.tolist()
        )

    epochs = [drawn(epoch) for epoch in range(6)]
    assert (
        all(sorted(epoch) == list(range(10)) for epoch in epochs)
        and drawn(3) == epochs[3]
    )
    for i in range(10):
        assert {epoch[i] for epoch in epochs} <= {
            text for picture, text in captions if picture == i
        }
    assert len({epoch[2] for epoch in epochs}) > 1
    assert drawn(1, train=False) == {i: f"caption {i} 0" for i in range(10)}


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_only_the_heads_learn_and_the_run_is_a_model(head, heads, towers):
    result = train(heads.override(head=head))
    model = load_model(result.run)
    assert isinstance(model, AlignedEncoder)
    fresh = make_encoder(heads.override(head=head))
    start, end = fresh.state_dict(), model.state_dict()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert {name.split(".")[1] for name in changed} == {"image_head", "text_head"}
    learnt = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert learnt and all(
        ".image_head." in name or ".text_head." in name for name in learnt
    )
    assert {
        name for name in changed if not name.endswith((".mean", ".scale"))
    } == learnt
    config = json.loads((result.run / "config.json").read_text())
    assert (
        config["towers"]["model"] is None
        and config["align"]["image_encoder"] == towers[0]
    )
    assert (
        TrainConfig.from_json(result.run / "config.json").align
        == heads.override(head=head).align
    )
    assert model.encode_text(["a red disc"]).shape == (1, 12)
    last = lines(result.run / "epochs.jsonl")[-1]
    assert 0 < last["val_recall"] <= 1 and last["val_loss"] is not None


def test_members_stand_side_by_side(heads, capsys, caplog):
    caplog.set_level(logging.INFO, "cloob.training.select")
    assert cli.main(["train", "align", "--help"]) == 0
    assert "--members" in capsys.readouterr().out
    result = train(heads.override(members=2, best="val_recall", epochs=2))
    assert "joined: " in caplog.text
    joined = load_model(str(result.checkpoint)).heads
    assert joined is not None and {"members", "linear"} & {
        head.options["kind"] for head in joined
    }


def test_other_pairs_are_refused_before_they_go_through_the_encoders(
    heads, pairs_folder, computed
):
    ended = train(heads.override(steps=3, save_every=3))
    assert computed()
    others = heads.override(
        data=[str(pairs_folder)] * 2, resume=str(ended.run), steps=6
    )
    raises(
        InputError,
        r"the training pairs are not those of this checkpoint's run",
        train,
        others,
    )
    assert not computed()


def test_trained_heads_can_be_trained_on(heads, tmp_path):
    """``init`` takes such a run as any other: a step of next to no length leaves its
    embeddings as they were.
    """
    first = train(heads.override(epochs=1))
    again = heads.override(
        image_encoder=None,
        text_encoder=None,
        init=str(first.run),
        out=tmp_path / "again",
        lr=1e-30,
    )
    second = train(again.override(epochs=1))
    texts = ["a red disc", "a blue bar"]
    with torch.no_grad():
        before, after = (
            load_model(run).encode_text(texts) for run in (first.run, second.run)
        )
    torch.testing.assert_close(after, before)
    assert TrainConfig.from_json(second.run / "config.json").align.embed_dim == 12
    for change, said in (
        # What a new head would have counts like any other value.
        ({"embed_dim": 256}, f"embed_dim is 256, but init {str(first.run)!r} holds 12"),
        (
            {"head_dropout": 0.1},
            f"head_dropout is 0.1, but init {str(first.run)!r} holds 0.2",
        ),
    ):
        raises(
            InputError,
            re.escape(said),
            train,
            again.override(out=tmp_path / "refused", **change),
        )
    left_out = again.override(
        embed_dim=None, head_dropout=None, out=tmp_path / "left out", epochs=1
    )
    assert (left_out.align.head, left_out.align.embed_dim) == (None, None)
    assert TrainConfig.from_json(train(left_out).run / "config.json").align == replace(
        heads.align, image_encoder=None, text_encoder=None, head="linear"
    )
    fresh = make_encoder(heads)
    with torch.no_grad():
        assert (fresh.eval().encode_text(texts) - before).abs().max() > 0.01


def test_cloob_eval_runs_frozen_encoders_for_new_rows_alone(
    heads, pairs_folder, tmp_path, monkeypatch
):
    """Of several models on equal encoders each row goes through them once, and none
    that training kept features of.
    """
    cache = heads.pairs.cache_dir
    runs = [
        str(train(heads.override(epochs=1, seed=seed, out=tmp_path / f"{seed}")).run)
        for seed in (1, 2)
    ]
    pairs = tmp_path / "pairs"
    shutil.copytree(pairs_folder, pairs)  # 38 pairs with features
    shutil.copy(pairs / "01.png", pairs / "new name.png")
    (pairs / "new name.txt").write_text("new words")
    shutil.copy(pairs / "01.txt", pairs / "new picture.txt")
    (pairs / "both new.txt").write_text("other words")
    for stem, colour in (("new picture", "orange"), ("both new", "purple")):
        Image.new("RGB", (40, 40), colour).save(pairs / f"{stem}.png")
    counted = {ImageEncoder: 0, TowerText: 0}
    for kind, forward in [(kind, kind.forward) for kind in counted]:

        def counting(self, batch, kind=kind, forward=forward):
            counted[kind] += (
                len(batch) if len(batch) > 1 else 0
            )  # one is the probe of a folder that is opened
            return forward(self, batch)

        monkeypatch.setattr(kind, "forward", counting)

    def evaluate(*models, cache):
        counted.update(dict.fromkeys(counted, 0))
        words = [
            "--retrieval",
            str(pairs),
            "--workers",
            "0",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "e"),
        ]
        monkeypatch.setenv("CLOOB_CACHE", str(cache))
        assert cli.main(["eval", *models, *words]) == 0
        rows = json.loads((tmp_path / "e" / "results.json").read_text())["rows"]
        return rows, list(counted.values())

    alone, seen = evaluate(*runs, cache=tmp_path / "empty")
    assert seen == [40, 41] and alone[0]["retrieval"] != alone[1]["retrieval"]
    rows, seen = evaluate(*runs, cache=cache)
    assert seen == [2, 3]
    for row, expected in zip(rows, alone, strict=True):
        assert row["retrieval"] == expected["retrieval"]
