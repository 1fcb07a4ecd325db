"""``cloob train align``: heads on frozen encoders, each picture and text embedded
once.
"""

import logging
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from cloob import train_heads
from cloob.data.open import open_source
from cloob.errors import InputError
from cloob.heads.config import HeadsConfig
from cloob.heads.features import embedded, first_captions, open_encoders
from cloob.heads.parts import Batches
from cloob.heads.settings import HeadSettings
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.load import load_model
from make import tiny_model, write_forty
from support import raises, read_json, read_lines, run_cloob


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    """40 pairs of 40 pixels; one picture is no picture and one caption is empty."""
    folder = write_forty(tmp_path_factory.mktemp("pairs"))
    (folder / "13.png").write_bytes(b"this is no picture")
    (folder / "27.txt").write_text("  ")
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Two encoders: the image tower of one model, the text tower of another."""
    folder = tmp_path_factory.mktemp("towers")
    return [str(tiny_model(folder / str(seed), seed=seed)) for seed in (7, 8)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(towers, pairs_folder, tmp_path):
    return HeadsConfig(
        objective="cloob",
        image_encoder=towers[0],
        text_encoder=towers[1],
        data=(str(pairs_folder),),
        val_data=(str(pairs_folder),),
        embed_dim=12,
        head="linear",
        dropout=0.2,
        lr=3e-3,
        epochs=3,
        batch_size=8,
        patience=0,
        workers=0,
        max_bad_fraction=0.2,
        device="cpu",
        out=tmp_path / "run",
    )


@pytest.fixture
def encoder(towers):
    return open_encoders(*towers)


@pytest.fixture
def computed(caplog):
    """Whether features were computed since the last question: the log says how far it
    is.
    """
    caplog.set_level(logging.INFO, "cloob.heads.features")

    def ask():
        said = ": features of " in caplog.text
        caplog.clear()
        return said

    return ask


def open_table(folder, rows):
    """A source of rows of a picture and a caption."""
    table = "".join(f"{picture}\t{caption}\n" for picture, caption in rows)
    (folder / "t.csv").write_text(f"filepath\ttitle\n{table}")
    return open_source(folder / "t.csv")


def weights(run):
    files = (run / "checkpoints").rglob("heads.safetensors")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_held_out_pairs_choose_the_objective(config):
    run = train_heads(config.override(objective="auto", batch_size=0, epochs=1)).run
    decided = read_json(run / "decisions.json")["objective"]
    assert decided["start"] in ("closed-form", "random")


def test_features_are_computed_once(config, computed, tmp_path):
    """Training and held-out pairs are the same here: one file."""
    first = train_heads(config)
    assert computed()
    again = train_heads(config.override(out=tmp_path / "again"))
    assert not computed()
    assert weights(again.run) == weights(first.run)
    (file,) = (tmp_path / "cache/features").glob("*.safetensors")
    closed = config.override(
        objective="cca", head=None, dropout=None, out=tmp_path / "closed"
    )
    result = train_heads(closed)
    assert load_model(result.run).embed_dim == 12
    assert not computed()
    assert result.recall > 0.8  # as many pairs as directions, nearly
    file.write_bytes(file.read_bytes()[:1000])
    other = config.override(out=tmp_path / "other", epochs=1)
    raises(InputError, rf"{file.name} cannot be read", train_heads, other)


def test_every_distinct_picture_and_text_is_embedded_once(
    encoder, pairs_folder, tmp_path, monkeypatch
):
    """Ten pictures with five captions of three texts each, and a copy of a picture
    under another name.
    """
    shutil.copy(pairs_folder / "00.png", tmp_path / "copy.png")
    names = [f"{pairs_folder}/{i:02}.png" for i in range(10)]
    names.append(f"{tmp_path}/copy.png")
    rows = []
    for i, name in enumerate(names):
        rows += [(name, f"text {(i + j) % 3}") for j in range(5)]
    counted = {"image": 0, "text": 0}
    for side in counted:
        compute = getattr(encoder, f"{side}_features")

        def counting(batch, side=side, compute=compute):
            counted[side] += len(batch)
            return compute(batch)

        monkeypatch.setattr(encoder, f"{side}_features", counting)
    pairs, _ = embedded(open_table(tmp_path, rows), encoder)
    assert counted == {"image": 10, "text": 3}
    assert len(pairs) == len(rows)
    assert pairs.a.shape[0] == 10
    assert pairs.b.shape[0] == 3
    for place in (0, 7, 50, 54):
        name, text = rows[place]
        pixels = encoder.preprocess(Image.open(name).convert("RGB"))[None]
        tokens = encoder.tokenizer([text])
        expected = encoder.image_features(pixels), encoder.text_features(tokens)
        assert_close(pairs.batch(np.array([place])).parts, expected)


def test_a_bad_caption_loses_no_picture_and_a_bad_picture_all_its_captions(
    encoder, pairs_folder, tmp_path
):
    rows = []
    for name, texts in (("00", ["  ", "a", "b"]), ("13", "cd"), ("01", "e")):
        rows += [(f"{pairs_folder}/{name}.png", text) for text in texts]
    pairs, rows_of_source = embedded(open_table(tmp_path, rows), encoder)
    assert rows_of_source.tolist() == [1, 2, 5]
    first, second, third = pairs.rows[:, 0]
    assert first == second
    assert first != third
    reasons = [skip.reason for skip in pairs.skipped]
    assert reasons == ["empty caption", "corrupt image", "corrupt image"]


def test_features_are_those_of_the_bytes_that_are_there(
    encoder, pairs_folder, tmp_path, monkeypatch
):
    """Two pictures exchanged under their names, sizes and times: other features.

    The same bytes elsewhere: the same ones.
    """
    folder = tmp_path / "pairs"
    shutil.copytree(pairs_folder, folder)

    def features(folder):
        pairs, _ = embedded(open_source(folder), encoder)
        return torch.from_numpy(pairs.a[pairs.rows[:, 0]])

    before = features(folder)
    paths = [folder / "00.png", folder / "01.png"]
    contents = [path.read_bytes() for path in reversed(paths)]
    for path, content in zip(paths, contents, strict=True):
        time = path.stat().st_mtime_ns
        path.write_bytes(content)
        os.utime(path, ns=(time, time))  # as an editor that keeps the time
    after = features(folder)
    assert_close(after[[1, 0]], before[:2])
    assert torch.equal(after[2:], before[2:])
    assert not torch.allclose(after[0], before[0])
    shutil.move(folder, tmp_path / "elsewhere")
    for side in ("image", "text"):  # they are in the cache
        monkeypatch.setattr(AlignedEncoder, f"{side}_features", None)
    assert torch.equal(features(tmp_path / "elsewhere"), after)


def test_pairs_that_cannot_be_used_are_named_counted_and_limited(
    config, pairs_folder, tmp_path
):
    """Also where the features come from the cache: 22 of 40 pictures are gone, 2 others
    are bad.
    """
    folder = tmp_path / "pairs"
    shutil.copytree(pairs_folder, folder)
    for path in sorted(folder.glob("*.png"))[-22:]:
        path.unlink()
    config = config.override(data=(str(folder),), val_data=(str(folder),), epochs=2)
    said = (
        rf"^{folder}: 23 of 40 (samples|held-out pairs) cannot be used, more than"
        r" max_bad_fraction = 0\.5 allows: 22 missing image \(e\.g\. 18\.txt: no image"
        r" next to .*18\.txt\); 1 corrupt image \(e\.g\. 13\.png: .+\)$"
    )
    raises(InputError, said, train_heads, config.override(max_bad_fraction=0.5))
    result = train_heads(
        config.override(max_bad_fraction=0.6, batch_size=4, resume="auto")
    )
    named = read_lines(result.run / "skipped.jsonl")
    gone = {f"{i:02}.txt": "missing image" for i in range(18, 40)}
    gone["13.png"] = "corrupt image"
    for held_out in (False, True):
        part = [line for line in named if line.get("held_out", False) == held_out]
        assert {line["key"]: line["reason"] for line in part} == gone
        assert len(part) == 23
        assert all(line["detail"] for line in part)
    assert result.skipped == {"missing image": 22, "corrupt image": 1}
    other = config.override(max_bad_fraction=0.5, out=tmp_path / "other")
    raises(InputError, said, train_heads, other)  # by the features in the cache


def test_a_picture_with_several_captions_is_one_pair_of_an_epoch(
    encoder, pairs_folder, tmp_path
):
    """Ten pictures with one to three captions: one is drawn for each epoch, and the
    batch is fitted to pictures; a held-out picture has its first.
    """
    captions = []
    for i in range(10):
        captions += [(i, f"caption {i} {j}") for j in range(1 + i % 3)]
    rows = [(f"{pairs_folder}/{i:02}.png", text) for i, text in captions]
    pairs, _ = embedded(open_table(tmp_path, rows), encoder)
    numbered = replace(pairs, ids=np.arange(len(pairs)))
    cpu = torch.device("cpu")
    batches = Batches(numbered, HeadSettings("clip", batch_size=5), cpu)

    def drawn(epoch):
        found = {}
        for batch in batches.epoch(epoch):
            found.update(captions[id_] for id_ in batch.ids.tolist())
        return found

    epochs = [drawn(epoch) for epoch in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert drawn(3) == epochs[3]
    assert len({epoch[2] for epoch in epochs}) > 1
    firsts = [captions[id_][1] for id_ in first_captions(numbered).ids]
    assert firsts == [f"caption {i} 0" for i in range(10)]


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_run_is_a_model_of_the_encoders_with_heads(head, config, towers, encoder):
    result = train_heads(config.override(head=head))
    model = load_model(result.run)
    assert isinstance(model, AlignedEncoder)
    state = encoder.state_dict()
    for name, value in model.state_dict().items():
        if "_head." not in name:
            assert torch.equal(value, state[name])
    config = read_json(result.run / "config.json")
    assert config["kind"] == "heads"
    assert config["image_encoder"] == towers[0]
    assert model.encode_text(["a red disc"]).shape == (1, 12)
    last = read_lines(result.run / "epochs.jsonl")[-1]
    assert 0 < last["val_recall"] <= 1


def test_a_share_is_held_out_once_for_all(config, tmp_path, caplog):
    """A run that goes on reads its ledger; eval judges by the same pairs."""
    caplog.set_level(logging.INFO, "cloob.heads")
    config = config.override(val_data=(), val_split=0.2, epochs=2)
    run = train_heads(config).run
    rows = read_json(run / "decisions.json")["held_out"]
    assert len(rows) == 8
    assert caplog.text.count("reading all pairs once") == 1
    longer = train_heads(config.override(resume="auto", epochs=4))
    assert longer.epochs == 4
    assert caplog.text.count("reading all pairs once") == 1
    words = f"eval {run} --held-out --workers 0 --device cpu"
    run_cloob(f"{words} --out {tmp_path}/e")
    row = read_json(tmp_path / "e/results.json")["rows"][0]
    (found,) = row["retrieval"].values()
    assert found["n"] == 8
    assert found["chose"] == ["epoch"]


def test_other_pairs_are_refused_before_they_go_through_the_encoders(
    config, pairs_folder, computed
):
    train_heads(config)
    assert computed()
    others = config.override(data=(str(pairs_folder),) * 2, resume="auto", epochs=6)
    raises(InputError, "is a run of other pairs or settings", train_heads, others)
    assert not computed()


MISTAKES = [
    (
        {"text_encoder": None},
        "a is missing; give --a and --b, files of vectors, or",
    ),
    ({"ids": "ids.txt"}, "ids is 'ids.txt'; it must be left out with pictures"),
    ({"val_split": 0.1}, "val_split is 0.1; it must be left out with held-out"),
    ({"image_encoder": None, "text_encoder": None}, "a is missing; give --a and"),
    ({"image_size": 4}, "image_size is 4; it must be greater than"),
]


@pytest.mark.parametrize(("change", "error"), MISTAKES)
def test_a_mistake_is_named_in_one_line(config, change, error):
    def train():
        train_heads(config.override(**change))

    raises(InputError, re.escape(error), train)


def test_every_setting_of_pictures_has_an_effect_or_is_refused(
    config, towers, pairs_folder, tmp_path
):
    """A table with two columns of pictures, one of them bad, and two of captions."""
    table = "filepath\tpicture\ttitle\tcaption\n"
    for i in range(14):
        pictures = f"{pairs_folder}/{i:02}.png\t{pairs_folder}/{i + 1:02}.png"
        table += f"{pictures}\ttext {i % 5}\tother {i % 5}\n"
    (tmp_path / "t.csv").write_text(table)
    (tmp_path / "u.csv").write_text(table.replace("text 3", "x"))
    start = config.override(data=(str(tmp_path / "t.csv"),), val_data=(), val_split=0.2)
    start = start.override(objective="clip", epochs=1, batch_size=4)
    changes = {
        "data": (str(tmp_path / "u.csv"),),
        "val_split": 0.4,
        "image_encoder": towers[1],
        "text_encoder": towers[0],
        "image_size": 16,
        "image_column": "picture",
        "caption_column": "caption",
        "mask_duplicates": True,
        "max_bad_fraction": 0.0,
        "a": "a.npy",
        "drop": ("title",),
    }
    usual = weights(train_heads(start.override(out=tmp_path / "usual")).run)
    for name, value in changes.items():
        config = start.override(**{name: value}, out=tmp_path / name)
        try:
            found = weights(train_heads(config).run)
        except InputError as error:
            found = str(error).replace("-", "_")
        assert found != usual and (isinstance(found, dict) or name in found), name
