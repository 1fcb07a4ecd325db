"""The model card: what is in it, and what never is."""

import json
import shutil

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import write_model

from cloob import load_model
from cloob.export.card import data_name, model_name, write_card
from cloob.export.exported import Exported

CONFIG = {
    "data": [
        "/home/xaver/secret/pairs.csv",
        "s3://key:word@bucket/x/{0..9}.tar?sig=abc",
        "sets/a|b.csv",
    ],
    "model": "small",
    "init": None,
    "objective": "cloob",
    "retrieval_from": 0.5,
    "lr": 0.001,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "ema": 0.0,
    "batch_size": 128,
    "precision": "fp32",
    "seed": 7,
    "out": "/home/xaver/secret/run",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two checkpoints, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_model(folder / "checkpoints" / "step-00000040" / "model")
    write_model(folder / "checkpoints" / "step-00000020" / "model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    lines = [{"epoch": n, "step": 20 * n, "samples_seen": 2560 * n} for n in (1, 2)]
    (folder / "epochs.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    return folder


def card(source, folder):
    """Metadata and text of a model's card."""
    exported = Exported("open_clip", "", "`use`", (), ("clip", "clip"))
    encoder = load_model(source, device="cpu")
    write_card(folder, str(source), encoder, exported, "me/small", "mit")
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run(run, tmp_path):
    metadata, body = card(run, tmp_path)
    assert metadata["library_name"] == "open_clip"
    assert metadata["license"] == "mit"
    assert metadata["pipeline_tag"] == "zero-shot-image-classification"
    assert metadata["tags"] == ["cloob", "clip"]
    for line in (
        "| objective | cloob |",
        "| τ⁻¹ | 25.0 |",
        "| β | 9.0 |",
        "| steps | 40 |",
        "| pairs seen | 5,120 |",
        "| retrieval joins | after 50% |",
    ):
        assert line in body.splitlines()


def test_a_card_says_a_checkpoints_own_steps_and_no_place_of_this_machine(
    run, tmp_path
):
    _, body = card(run / "checkpoints" / "step-00000020", tmp_path)
    assert "| steps | 20 |" in body
    assert "| pairs seen | 2,560 |" in body
    for secret in (
        "/home",
        "xaver",
        "secret",
        "key:",
        "word@",
        "bucket",
        "sig=",
        str(tmp_path),
    ):
        assert secret not in body
    assert "| data | pairs.csv, {0..9}.tar, sets/a\\|b.csv |" in body


def test_a_model_without_a_run(small, tmp_path):
    model = shutil.copytree(
        small, tmp_path / "model", ignore=shutil.ignore_patterns("objective.json")
    )
    _, body = card(model, tmp_path)
    assert "is not known here" in body


@example("~", "https://host.org/")
@given(
    st.text(max_size=40),
    st.sampled_from(["", "/", "~/", "../", "https://host.org/", "s3://b/", "a/"]),
)
def test_the_name_of_data_is_never_a_place(tail, start):
    name = data_name(start + tail)
    if start == "a/" and ".." not in tail:
        assert name == start + tail
    elif start:
        assert name
        assert not name.startswith(("/", "~", ".."))
        assert "host.org" not in name
        assert "://" not in name


def test_a_model_that_training_began_with_keeps_its_owner_and_loses_its_place():
    for name in (
        "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "ViT-B-32/laion2b_s34b_b79k",
    ):
        assert model_name(name) == name
    for source in (
        "mine:best",
        "/home/xaver/secret/mine:best",
        "local-dir:/home/xaver/secret/mine",
    ):
        assert model_name(source) == "mine"
    for source, name in (
        ("runs/mine:best", "runs/mine"),
        ("hf-hub:/home/xaver", "xaver"),
        ("w.pkl:port", "w.pkl"),
    ):
        assert model_name(source) == name
