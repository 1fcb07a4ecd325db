"""What a terminal shows of a training."""

from types import SimpleNamespace

import pytest

from cloob.training.callbacks import ProgressDisplay


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
    expected = [
        f"cloob: step 1/4, epoch 1, loss 0.2500, {speed}, 0:00:00 left",
        f"cloob: step 2/4, epoch 1, loss -, {speed}, 0:00:00 left",
        "cloob: epoch 1 done, mean loss 0.2500, validation loss 0.5000, mean recall"
        " 25.0 %; skipped samples (named in skipped.jsonl): 3 corrupt image",
    ]
    assert told == expected
