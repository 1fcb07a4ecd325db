"""The model card: what is in it, and what never is."""

import json
import shutil

import pytest
import yaml
from small_models import write_model

from cloob import load_model
from cloob.export.card import write_card
from cloob.export.exported import Exported

CONFIG = {
    "data": ["/home/xaver/pairs.csv", "s3://key:word@bucket/x/{0..9}.tar?sig=abc"],
    "init": "/home/xaver/mine",
    "retrieval_from": 0.5,
    "lr": 0.001,
    "batch_size": 128,
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
    for place in ("home", "xaver", "pairs.csv", "bucket", "sig=", str(tmp_path)):
        assert place not in body


def test_a_model_without_a_run(small, tmp_path):
    model = shutil.copytree(
        small, tmp_path / "model", ignore=shutil.ignore_patterns("objective.json")
    )
    _, body = card(model, tmp_path)
    assert "is not known here" in body
