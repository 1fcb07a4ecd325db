"""TensorBoard, by a writer that keeps what it is given; and what a terminal shows."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch.utils.tensorboard
from train_helpers import lines

from cloob.training.callbacks import ProgressDisplay
from cloob.training.loop import train


@pytest.fixture
def writer(monkeypatch):
    fake = Mock()
    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", fake)
    return fake


def test_tensorboard_has_the_numbers_of_the_logs(trained, tmp_path, writer):
    config = trained.config.override(out=tmp_path / "run", epochs=1, tensorboard=True)
    train(config)
    train(config.override(epochs=2, resume="auto"))
    begun = [each.kwargs["purge_step"] for each in writer.call_args_list]
    assert begun == [1, 6] and writer.return_value.close.call_count == 2
    sent = [each.args for each in writer.return_value.add_scalar.call_args_list]
    for group, log in (("train", "metrics"), ("epoch", "epochs")):
        wanted = [
            (f"{group}/{name}", value, line["step"])
            for line in lines(tmp_path / "run" / f"{log}.jsonl")
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        ]
        assert [each for each in sent if each[0].startswith(group)] == wanted


def test_a_writer_that_fails_does_not_end_the_training(
    trained, tmp_path, writer, caplog
):
    add = writer.return_value.add_scalar
    add.side_effect = [None, None, OSError("no space is left")]
    train(trained.config.override(out=tmp_path / "run", epochs=1, tensorboard=True))
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 5 and add.call_count == 3
    failed = "TensorBoard failed (no space is left) and is left out from here on"
    assert caplog.text.count(failed) == 1


def metrics(step, **more):
    speed = {"images_per_second": 100.0, "data_wait": 0.25}
    line = {"step": step, "epoch": 1, "loss": 0.25, "skipped": {}, "val_recall": None}
    return line | speed | more


@pytest.mark.parametrize("rank", [0, 1])
def test_progress(rank, capsys):
    display = ProgressDisplay(title="cloob", every_seconds=0.0)
    display.on_start(SimpleNamespace(rank=rank, total_steps=4, start_step=0))
    display.on_step(metrics(1))
    display.on_step(metrics(2, loss=None))
    display.every_seconds = 1000.0
    display.on_step(metrics(3))
    bad = {"corrupt image": 3}
    display.on_epoch_end(metrics(2, val_loss=0.5, val_recall=0.25, skipped=bad))
    told = capsys.readouterr().err.splitlines()
    if rank == 1:
        assert told == []
        return
    speed = "100 pairs/s, 25% waiting for data"
    assert told == [
        f"cloob: step 1/4, epoch 1, loss 0.2500, {speed}, 0:00:00 left",
        f"cloob: step 2/4, epoch 1, loss -, {speed}, 0:00:00 left",
        "cloob: epoch 1 done, mean loss 0.2500, validation loss 0.5000, mean recall"
        " 25.0 %; skipped samples (named in skipped.jsonl): 3 corrupt image",
    ]
