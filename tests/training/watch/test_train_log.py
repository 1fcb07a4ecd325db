from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cloob.training.log import ProgressDisplay


def metrics(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "loss": 0.25, "images_per_second": 100.0, "skipped": {}} | more


@pytest.mark.parametrize(("bar", "rank"), [(False, 0), (True, 0), (False, 1)])
def test_progress(bar: bool, rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: bar)
    display = ProgressDisplay(title="cloob", every_seconds=0.0)
    display.on_start(SimpleNamespace(rank=rank, total_steps=4, start_step=0))  # type: ignore[arg-type]
    display.on_step(metrics(1))
    display.on_step(metrics(2, loss=None))
    display.on_epoch_end(metrics(2, val_loss=0.5, skipped={"corrupt image": 3}))
    display.on_end(None)
    told = capsys.readouterr().err
    if rank == 1:
        assert told == ""
        return
    assert "cloob: epoch 1 done, mean loss 0.2500, validation loss 0.5000; skipped samples (named in " in told
    assert "in skipped.jsonl): 3 corrupt image" in told
    if not bar:
        assert "cloob: step 1/4, epoch 1, loss 0.2500, 100 images/s, 0:00:00 left\n" in told
        assert "step 2/4, epoch 1, loss skipped, 100 images/s" in told


@pytest.mark.parametrize(
    ("data", "device", "said"),
    [
        (0.5, 0.1, "50% of the time waiting for data ("),
        (0.2, 0.0, ""),
        (0.4, 0.6, "60% of the time waiting for the device"),
    ],
)
def test_it_says_what_is_waited_for(data: float, device: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(every_seconds=1000)
    display.on_start(SimpleNamespace(rank=0, total_steps=4, start_step=0))  # type: ignore[arg-type]
    for epoch, waits in enumerate(({"data_wait": data, "device_wait": device}, {"data_wait": 0.0}), 1):
        for _ in range(2):
            display.on_step(metrics(2 * epoch, **waits))
        display.on_epoch_end(metrics(2 * epoch))
    told = [line for line in capsys.readouterr().err.splitlines() if "done" in line]
    assert ("of the time waiting" in told[0]) == bool(said) and said in told[0]
    assert "waiting" not in told[1]  # each epoch by itself
