"""A run as a model: which checkpoint its name means, on every way in, and what is said of names that mean nothing."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import cloob
from cloob import cli
from cloob.models.towers import create_model
from make import tiny_model, write_classes
from support import refused

BEST, LAST = 60, 160


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for step in (BEST, LAST):
        tiny_model(folder / str(step), seed=step)
    return folder


@pytest.fixture
def runs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``runs/mine`` was better at step 60 than at the end, ``runs/plain`` held nothing out."""
    monkeypatch.chdir(tmp_path)
    for run, step, recall in (("mine", BEST, 0.32), ("mine", LAST, 0.25), ("plain", BEST, None), ("plain", LAST, None)):
        checkpoint = tmp_path / "runs" / run / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(models / str(step), checkpoint / "model", copy_function=os.link)
        if recall is not None:
            values = {"metric": "val_recall", "val_loss": 1.0, "val_recall": recall}
            (checkpoint / "validation.json").write_text(json.dumps(values))
    write_classes(tmp_path / "pictures", {"red": (255, 0, 0), "blue": (0, 0, 255)}, 2)
    return tmp_path / "runs"


@functools.cache
def projection(seed: int) -> torch.Tensor:
    weight: torch.Tensor = create_model("tiny-vit", seed=seed).model.visual.proj
    return weight


def step_of(model: cloob.models.encoder.DualEncoder) -> int:
    """Of which checkpoint above a model is."""
    return next(seed for seed in (BEST, LAST) if torch.equal(projection(seed), model.model.visual.proj))


def test_a_run_is_its_best_checkpoint(runs: Path) -> None:
    names = {"runs/mine": BEST, "local-dir:runs/mine": BEST, "runs/mine:best": BEST, "runs/mine:last": LAST}
    for name, step in (names | {"runs/plain": LAST}).items():
        assert step_of(cloob.load_model(name, device="cpu")) == step, name


def test_every_command_takes_the_best(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["runs/mine", "runs/mine:last", "runs/mine:best", "--zeroshot", "pictures", "--device", "cpu"]
    assert cli.main(["eval", *words, "--out", "e"]) == 0
    said = "cloob: runs/mine: its best checkpoint, step 60 (runs/mine:last is the last)\n"
    assert capsys.readouterr().err.count(said) == 1
    rows = json.loads(Path("e/results.json").read_text())["rows"]
    best, last, named = (row["fingerprint"] for row in rows)
    assert [row["model"] for row in rows] == ["mine", "mine:last", "mine:best"] and best == named != last
    Path("table.csv").write_text("filepath,title\n" + "".join(f"pictures/{c}/0.png,{c}\n" for c in ("red", "blue")))
    pairs = ["--pairs", "table.csv", "--similar", "0", "--device", "cpu"]
    geometry = {}
    for name in ("runs/mine", "runs/mine:last"):
        assert cli.main(["analyze", name, *pairs, "--out", "a"]) == 0
        (geometry[name],) = json.loads(Path("a/analysis.json").read_text())["runs"]
    assert geometry["runs/mine"]["geometry"] != geometry["runs/mine:last"]["geometry"]
    assert [each["step"] for each in geometry["runs/mine"]["checkpoints"]] == [BEST, LAST]  # the curve has all
    assert cli.main(["convert", "runs/mine", "converted"]) == 0
    assert step_of(cloob.load_model("converted", device="cpu")) == BEST


def test_an_index_says_which_checkpoint_it_was_made_by(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["index", "pictures", "--model", "runs/mine", "--out", "i", "--device", "cpu"]) == 0
    with cloob.Index.open("i") as index:
        model = index.model()
        assert (model.name, model.spec) == ("mine", f"{runs}/mine:best")
        assert step_of(index.encoder()) == BEST
    # A search takes it by either name; without a cutoff no unrelated words are embedded.
    for name in ("mine", "runs/mine"):
        assert cli.main(["search", "i", "red", "--model", name, "--cutoff", "none"]) == 0
    # By its whole name it is the same model; the last checkpoint is another one.
    assert cli.main(["index", "--model", "runs/mine:best", "--out", "i", "--device", "cpu"]) == 0
    assert cli.main(["index", "--model", "runs/mine:last", "--out", "i", "--device", "cpu"]) == 0
    with cloob.Index.open("i") as index:
        assert [each.name for each in index.models] == ["mine", "mine:last"]
    # The run goes on and gets better: the index has vectors of the checkpoint that was the best.
    better = runs / "mine" / "checkpoints" / "step-00000200"
    tiny_model(better / "model", seed=3)
    values = {"metric": "val_recall", "val_loss": 1.0, "val_recall": 0.5}
    (better / "validation.json").write_text(json.dumps(values))
    capsys.readouterr()
    assert cli.main(["search", "i", "red", "--model", "mine"]) == 2
    said = capsys.readouterr().err
    assert "mine: has other weights" in said and f"({runs}/mine:best)" in said and said.count("\n") == 2


def test_a_name_that_means_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (
        ("runs/mine:worst", "runs/mine has no ':worst'; ':best' and ':last' are there"),
        ("runs/nosuch", "runs/nosuch: no such folder; in runs/: mine, plain"),
        ("nowhere/nosuch", "nowhere/nosuch: no such folder, and no NAME/TAG of open_clip (such as RN50/openai)"),
    ):
        for words in (["index", "pictures", "--out", "i", "--model", name], ["convert", name, "converted"]):
            assert refused(capsys, *words) == f"cloob: {said}\n"
