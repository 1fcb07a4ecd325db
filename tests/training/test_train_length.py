"""How long a run is: by passes, by pairs seen or by steps, and the same after it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import Trained, exact, lines

from cloob.cli import main
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.loop import train


def test_the_length_of_three_epochs_in_other_words_is_the_same_run(
    trained: Trained, base: TrainConfig, tmp_path: Path
) -> None:
    result = train(base.override(out=tmp_path / "run", samples=113, save_every=0))
    assert (result.steps, result.epochs) == (15, 3)
    assert exact(result.run) == exact(trained.run)


def without_times(log: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(log)]


@pytest.mark.parametrize(
    ("name", "values", "save_every"),
    [("steps", (3, 7), 0), pytest.param("samples", (17, 26, 56), 1, marks=pytest.mark.nightly)],
)
def test_a_longer_run_goes_on_with_the_rest_of_the_epoch(
    name: str, values: tuple[int, ...], save_every: int, base: TrainConfig, pairs_folder: Path, tmp_path: Path
) -> None:
    """At constant rates it is the run of that length from the start, its lines of epochs and bad pairs included."""
    config = base.override(schedule="constant", val_data=[str(pairs_folder)], save_every=save_every, keep=0)
    whole = train(config.override(out=tmp_path / "whole", **{name: values[-1]}))
    parts = config.override(out=tmp_path / "parts", resume="auto")
    for value in values:
        result = train(parts.override(**{name: value}))
        assert not result.already_finished
        epoch = lines(result.run / "epochs.jsonl")[-1]
        assert epoch["step"] == result.steps and epoch["val_loss"] is not None
        assert (list_checkpoints(result.run)[-1] / "validation.json").is_file()
        again = train(parts.override(**{name: value}))
        assert again.already_finished and not again.out_of_patience and again.steps == result.steps
    assert (result.steps, result.epochs) == (whole.steps, whole.epochs) == (whole.steps, whole.steps // 5)
    assert exact(result.run) == exact(whole.run)
    here, there = (load_model(run).state_dict() for run in (result.run, whole.run))
    assert all(torch.equal(here[key], there[key]) for key in there)
    assert without_times(result.run / "epochs.jsonl") == without_times(whole.run / "epochs.jsonl")
    # Held-out pairs are named at the first look, wherever that is.
    named = [[line["key"] for line in lines(run / "skipped.jsonl")] for run in (result.run, whole.run)]
    assert sorted(named[0]) == sorted(named[1])


def test_validation_every_other_epoch_and_at_the_end(base: TrainConfig, pairs_folder: Path, tmp_path: Path) -> None:
    config = base.override(val_data=[str(pairs_folder)], out=tmp_path / "run")
    result = train(config.override(epochs=3, val_every=2, save_every=0))
    losses = [line["val_loss"] for line in lines(result.run / "epochs.jsonl")]
    assert [loss is not None for loss in losses] == [False, True, True]
    named = [line for line in lines(result.run / "skipped.jsonl") if line.get("held_out")]
    assert {(line["key"], line["epoch"]) for line in named} == {("13.png", 2), ("27.png", 2)} and len(named) == 2


def test_patience_counts_the_looks_at_the_held_out_pairs(
    base: TrainConfig, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of nearly nothing no look after the first finds a better recall."""
    config = base.override(val_data=[str(pairs_folder)], best="val_recall", lr=1e-12, warmup=0, save_every=0)
    words = ["--epochs", "9", "--patience", "2", "--out", str(tmp_path / "run")]
    (tmp_path / "start.json").write_text(config.to_json())
    assert main(["train", "--config", str(tmp_path / "start.json"), *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path / 'run'}: 15 steps, ")
    best = lines(tmp_path / "run" / "epochs.jsonl")[0]["val_recall"]
    assert said[1] == "stopped at epoch 3: no better for 2 epochs"
    assert said[2] == f"{tmp_path / 'run'}:best: val_recall {best:.4g} (step-00000005)"
    run = tmp_path / "run"
    command = ["train", "--config", str(run / "config.json"), "--resume", "auto", "--epochs", "12"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run}: already finished (3 epochs, 15 steps); the patience was used up")
    assert main([*command, "--patience", "0", "--epochs", "4"]) == 0
    assert len(lines(run / "epochs.jsonl")) == 4
