"""The model card: what is in it, and what never is."""

import json
import shutil

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import OBJECTIVE, write_model

from cloob import load_model
from cloob.errors import InputError
from cloob.export.card import data_name, describe_model, model_name, write_card
from cloob.export.exported import Exported
from cloob.models.load import fingerprint

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
NUMBERS = {"acc1": 0.123, "acc1_interval": [0.1, 0.15], "acc5": 0.5, "n": 1540}
ROW = {
    "model": "run",
    "settings": OBJECTIVE,
    "zeroshot": {"noto-emoji": NUMBERS},
    "retrieval": {
        "demo:val": {
            "image_to_text@1": 0.25,
            "image_to_text@1_interval": [0.2, 0.3],
            "n": 500,
        }
    },
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


def card(run, folder, results=None):
    """Metadata and text of a run's card."""
    description = describe_model(str(run), load_model(run, device="cpu"), results)
    write_card(
        folder,
        description,
        Exported("open_clip", "", "`use`", (), ("clip", "clip")),
        "me/small",
        "mit",
    )
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run_and_its_results(run, tmp_path):
    own = {**ROW, "fingerprint": fingerprint(load_model(run, device="cpu"))}
    other = {**ROW, "model": "run", "fingerprint": "0" * 32, "zeroshot": {}}
    (tmp_path / "results.json").write_text(
        json.dumps({"level": 0.9, "rows": [other, own]})
    )
    metadata, body = card(run, tmp_path, tmp_path / "results.json")
    assert metadata["library_name"] == "open_clip"
    assert metadata["license"] == "mit"
    assert metadata["pipeline_tag"] == "zero-shot-image-classification"
    assert metadata["tags"] == ["cloob", "clip"]
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert [(metric["type"], metric["value"]) for metric in metrics] == [
        ("accuracy", 12.3),
        ("accuracy", 50.0),
    ]
    for line in (
        "| objective | cloob |",
        "| τ⁻¹ | 25.0 |",
        "| β | 9.0 |",
        "| steps | 40 |",
        "| pairs seen | 5,120 |",
        "| retrieval joins | after 50% |",
        "|  |  | (90% interval) | n |",
        "| zero-shot, noto-emoji | top-1 % | 12.3 (10.0–15.0) | 1540 |",
        "| zero-shot, noto-emoji | top-5 % | 50.0 | 1540 |",
        "| retrieval, demo:val | image → text, recall@1 % | 25.0 (20.0–30.0) | 500 |",
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


def test_results_of_other_weights_are_refused(run, tmp_path):
    results = tmp_path / "results.json"
    for row in ({**ROW, "fingerprint": "0" * 32}, ROW):
        results.write_text(json.dumps({"rows": [row]}))
        with pytest.raises(InputError, match="has no row of the weights of"):
            card(run, tmp_path, results)


def test_a_model_without_a_run(small, tmp_path):
    model = shutil.copytree(
        small, tmp_path / "model", ignore=shutil.ignore_patterns("objective.json")
    )
    metadata, body = card(model, tmp_path)
    assert "model-index" not in metadata
    assert "is not known here" in body
    assert "Not measured" in body


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
