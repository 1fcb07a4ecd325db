"""Weights & Biases, by a module that has its documented calls as it is not installed;
and what a terminal shows.
"""

import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
from train_helpers import lines

from cloob.training.callbacks import ProgressDisplay
from cloob.training.loop import train
from support import fork


@pytest.fixture
def wandb(monkeypatch):
    fake = Mock()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_and_its_resumption(trained, tmp_path, wandb):
    config = trained.config.override(
        out=tmp_path / "run", epochs=1, keep=1, wandb="cloob-tests"
    )
    train(config)
    train(config.override(epochs=2, resume="auto"))
    run = wandb.init.return_value
    sent = [(each.kwargs["step"], each.args[0]) for each in run.log.call_args_list]
    assert run.finish.call_args_list == [call(exit_code=0)] * 2
    train(config.override(overwrite=True))
    first, second, anew = (each.kwargs for each in wandb.init.call_args_list)
    assert first.keys() == {"project", "config", "resume", "name", "id", "dir"}
    assert (first["project"], first["resume"], first["name"]) == (
        "cloob-tests",
        "allow",
        "run",
    )
    assert first["config"]["inv_tau"] == pytest.approx(30)  # the resolved configuration
    assert (
        first["id"] == second["id"] != anew["id"]
    )  # the second goes on in the run of the first
    # All numbers of metrics.jsonl and epochs.jsonl, and nothing else.
    steps = [(step, data) for step, data in sent if "train/loss" in data]
    assert [step for step, _ in steps] == list(range(1, 11))
    for (_, here), there in zip(
        steps[:5], trained.recorder.of("step")[:5], strict=True
    ):
        assert here.keys() == {
            f"train/{key}"
            for key, value in there.items()
            if key != "step" and value is not None
        }
        assert all(
            here[f"train/{k}"] == there[k]
            for k in ("epoch", "samples_seen", "loss", "grad_norm")
        )
    assert [step for step, data in sent if "epoch/loss" in data] == [5, 10]


def test_a_tracker_that_fails_does_not_end_the_training(
    trained, tmp_path, wandb, caplog
):
    log = wandb.init.return_value.log
    log.side_effect = [None, None, ConnectionError("the server is gone")]
    train(trained.config.override(out=tmp_path / "run", epochs=1, wandb="x"))
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 5 and log.call_count == 3
    assert (
        caplog.text.count(
            "WandB failed (the server is gone) and is left out from here on"
        )
        == 1
    )


def test_a_tracker_that_cannot_begin_ends_all_ranks_in_one_line(
    trained, tmp_path, wandb
):
    wandb.init.side_effect = ValueError("no API key configured")
    config = trained.config.override(out=tmp_path / "run", epochs=1, wandb="x")
    ranks = fork(tmp_path / "ranks", 2, lambda: train(config) and None)
    assert ranks.wait() == [1, 1]
    for output in ranks.outputs:
        said = output.read_text().splitlines()[-1]
        assert said.endswith(
            "InputError: wandb: no API key configured; log in there, or leave"
            " --wandb out"
        )


def metrics(step, **more):
    speed = {
        "images_per_second": 100.0,
        "images_per_second_per_rank": 50.0,
        "data_wait": 0.25,
        "peak_memory": 3 << 29,
    }
    return {"step": step, "epoch": 1, "loss": 0.25, **speed, "skipped": {}} | more


@pytest.mark.parametrize("rank", [0, 1])
def test_progress(rank, capsys):
    display = ProgressDisplay(title="cloob", every_seconds=0.0)
    display.on_start(SimpleNamespace(rank=rank, total_steps=4, start_step=0))
    display.on_step(metrics(1))
    display.on_step(metrics(2, loss=None))
    display.on_epoch_end(metrics(2, val_loss=0.5, skipped={"corrupt image": 3}))
    display.on_end(None)
    told = capsys.readouterr().err.splitlines()
    if rank == 1:
        assert told == []
        return
    speed = "100 pairs/s, 25% waiting for data, 1.5 GiB at most"
    assert told == [
        f"cloob: step 1/4, epoch 1, loss 0.2500, {speed}, 0:00:00 left",
        f"cloob: step 2/4, epoch 1, loss skipped, {speed}, 0:00:00 left",
        "cloob: epoch 1 done, mean loss 0.2500, validation loss 0.5000; skipped samples"
        " (named in skipped.jsonl): 3 corrupt image",
    ]


def test_a_line_says_what_the_steps_since_the_last_have_waited(capsys):
    display = ProgressDisplay(every_seconds=1000)
    display.on_start(SimpleNamespace(rank=0, total_steps=4, start_step=0))
    for step, wait in enumerate((0.5, 0.1, 0.3), 1):
        display.every_seconds = 0.0 if step == 3 else 1000
        display.on_step(metrics(step, data_wait=wait))
    told = [line.partition(", 1.5 GiB")[0] for line in capsys.readouterr().err.split()]
    assert [line for line in told if line.endswith("%")] == ["50%", "20%"]
