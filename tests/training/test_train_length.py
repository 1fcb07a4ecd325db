"""How long a run is: by passes, by pairs seen or by steps, and the same after it was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_helpers import Trained, exact, lines

from cloob.cli import main
from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.loop import train


def test_the_length_of_three_epochs_in_other_words_is_the_same_run(
    trained: Trained, base: TrainConfig, tmp_path: Path
) -> None:
    result = train(base.override(out=tmp_path / "run", samples=113, save_every=0))
    assert (result.steps, result.epochs) == (15, 3)
    assert exact(result.run) == exact(trained.run)


@pytest.mark.parametrize(
    ("name", "values", "steps"),
    [("steps", (3, 7), [3, 7]), ("samples", (17, 26, 56), [3, 4, 7])],
    ids=["steps", "samples"],
)
def test_a_longer_run_goes_on_with_the_next_epoch(
    name: str, values: tuple[int, ...], steps: list[int], base: TrainConfig, pairs_folder: Path, tmp_path: Path
) -> None:
    """Each length ends with a validation, and is then finished."""
    config = base.override(val_data=[str(pairs_folder)], save_every=0, keep=0, out=tmp_path / "run", resume="auto")
    for value in values:
        result = train(config.override(**{name: value}))
        assert not result.already_finished and (list_checkpoints(result.run)[-1] / "validation.json").is_file()
        again = train(config.override(**{name: value}))
        assert again.already_finished and not again.out_of_patience and again.steps == result.steps
    epochs = lines(result.run / "epochs.jsonl")
    assert [line["step"] for line in epochs] == steps and all(line["val_loss"] is not None for line in epochs)
    rates = [line["lr"] for line in lines(result.run / "metrics.jsonl")]
    whole = train(base.override(**{name: values[-1]}, out=tmp_path / "whole"))
    assert rates[steps[-2] :] == [line["lr"] for line in lines(whole.run / "metrics.jsonl")][steps[-2] :]


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
