"""How long a run is: by passes, by pairs seen or by steps, and the same after it was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from train_helpers import Trained, exact, lines

from cloob.cli import main
from cloob.errors import InputError
from cloob.train.callbacks import Callback
from cloob.train.config import TrainConfig
from cloob.train.config.checks import check_combination
from cloob.train.config.run import RunConfig
from cloob.train.loop import train


class Interrupted(Callback):
    """Raises after a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("length", [{"steps": 15}, {"samples": 120}, {"samples": 113}])
def test_the_length_of_three_epochs_in_other_words_is_the_same_run(
    length: dict[str, int], trained: Trained, base: TrainConfig, tmp_path: Path
) -> None:
    result = train(base.override(out=tmp_path / "run", **length))
    assert (result.steps, result.epochs) == (15, 3)
    assert exact(result.run) == exact(trained.run)


def test_a_run_that_ends_inside_an_epoch_validates_there_and_is_resumed_to_the_bit(
    base: TrainConfig, pairs_folder: Path, tmp_path: Path
) -> None:
    config = base.override(steps=7, val_data=[str(pairs_folder)])
    whole = train(config.override(out=tmp_path / "whole"))
    assert whole.checkpoint is not None and whole.checkpoint.name == "step-00000007"
    assert [line["step"] for line in lines(whole.run / "epochs.jsonl")] == [5, 7]
    assert all(line["val_loss"] is not None for line in lines(whole.run / "epochs.jsonl"))
    assert lines(whole.run / "metrics.jsonl")[-1]["lr"] < config.optim.lr / 4  # the schedule ends there too
    for stop in (3, 6):
        cut = config.override(out=tmp_path / f"cut-{stop}")
        with pytest.raises(KeyboardInterrupt):
            train(cut, callbacks=[Interrupted(stop)])
        resumed = train(cut.override(resume="auto"))
        assert resumed.steps == 7 and exact(resumed.run) == exact(whole.run)
    again = train(cut.override(resume="auto"))
    assert again.steps == 7 and len(lines(again.run / "metrics.jsonl")) == 7


def test_validation_every_other_epoch_and_at_the_end(base: TrainConfig, pairs_folder: Path, tmp_path: Path) -> None:
    config = base.override(val_data=[str(pairs_folder)], out=tmp_path / "run")
    result = train(config.override(epochs=5, val_every=2))
    losses = [line["val_loss"] for line in lines(result.run / "epochs.jsonl")]
    assert [loss is not None for loss in losses] == [False, True, False, True, True]
    assert not train(config.override(val_every=3, resume="auto")).stopped  # the run is over: nothing is looked at
    with pytest.raises(InputError, match="val_every is 2, but there are no held-out pairs"):
        check_combination(TrainConfig().override(val_every=2))


def test_patience_counts_the_looks_at_the_held_out_pairs(
    base: TrainConfig, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of nearly nothing no look after the first finds a better recall."""
    config = base.override(val_data=[str(pairs_folder)], best="val_recall", lr=1e-12, warmup=0, ema=0.0)
    result = train(config.override(epochs=9, val_every=2, patience=2, out=tmp_path / "run"))
    assert result.epochs == 6
    command = ["train", "--config", str(result.run / "config.json"), "--resume", "auto", "--epochs", "12"]
    assert main(command) == 0
    assert capsys.readouterr().out == (
        f"{result.run}: already finished (6 epochs, {result.steps} steps); the patience was used up; "
        "a larger --patience, or 0, goes on, --overwrite or another --out starts anew\n"
    )
    assert main([*command, "--patience", "0", "--epochs", "7"]) == 0
    assert len(lines(result.run / "epochs.jsonl")) == 7


def test_exactly_one_length_has_a_value() -> None:
    assert RunConfig().epochs == 30
    config = TrainConfig().override(steps=5)
    assert (config.run.epochs, config.run.samples, config.run.steps) == (None, None, 5)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict({"run": {"samples": 100}}).run.epochs is None
    assert config.override(epochs=2).run.steps is None
    with pytest.raises(InputError, match="epochs is 2 and steps is 5; give one of them"):
        RunConfig(epochs=2, steps=5)
    with pytest.raises(InputError, match="samples is 0; it must be 1 or more"):
        RunConfig(samples=0)
    assert RunConfig(samples=1001, batch_size=100).total_steps(7) == 11


def test_a_config_of_the_last_release_is_read() -> None:
    config = TrainConfig.from_dict({"pairs": {"data": ["a", "b"], "weights": [1.0, 2.0]}, "run": {"epochs": 3}})
    assert config.pairs.data_weights == (1.0, 2.0) and config.run.epochs == 3
    with pytest.raises(InputError, match=r"unknown key 'pairs\.weights'"):
        TrainConfig.from_dict({"pairs": {"data": ["a"], "data_weights": [1.0], "weights": [2.0]}})
