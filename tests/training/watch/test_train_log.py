from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloob.training.watch.log import JsonLines, ProgressDisplay, finite


def test_a_resumed_log_keeps_the_steps_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.1 * step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # kill -9 in the middle of a line
    log = JsonLines(path, keep_to_step=2)
    log.write({"step": 3, "loss": 9.0})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 9.0},
    ]
    JsonLines(path, keep_to_step=9).close()
    assert len(path.read_text().splitlines()) == 3
    JsonLines(path).close()
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("odd", [b"[" * 100_000, b"[1]", b'{"step": []}', b"{}", b"\xff"])
def test_a_resumed_log_ends_before_a_line_that_is_none(tmp_path: Path, odd: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + odd + b"\n")
    JsonLines(path, keep_to_step=2).close()
    assert path.read_text() == '{"step": 1}\n'


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.write({"step": 1})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    with pytest.raises(ValueError, match="JSON"):
        log.write({"loss": math.nan})  # not a number is not JSON
    log.close()


def test_finite() -> None:
    assert [finite(v) for v in (1.5, math.nan, math.inf, -math.inf)] == [1.5, None, None, None]


def metrics(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "loss": 0.25, "images_per_second": 100.0, "skipped": {}} | more


@pytest.mark.parametrize(("mode", "rank"), [("lines", 0), ("bar", 0), ("lines", 1), ("none", 0), ("auto", 0)])
def test_progress(mode: str, rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(mode, title="cloob", every_seconds=0.0)
    display.on_start(SimpleNamespace(rank=rank, total_steps=4, start_step=0))  # type: ignore[arg-type]
    display.on_step(metrics(1))
    display.on_step(metrics(2, loss=None))
    display.on_epoch_end(metrics(2, val_loss=0.5, skipped={"corrupt image": 3}))
    display.on_end(None)
    told = capsys.readouterr().err
    if rank == 1 or mode == "none":
        assert told == ""
        return
    assert "cloob: epoch 1 done, mean loss 0.2500, validation loss 0.5000; skipped samples (named in " in told
    assert "in skipped.jsonl): 3 corrupt image\n" in told
    if mode != "bar":  # "auto" takes lines, since the tests have no terminal
        assert "cloob: step 1/4, epoch 1, loss 0.2500, 100 images/s, 0:00 left\n" in told
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
    display = ProgressDisplay("lines", every_seconds=1000)
    display.on_start(SimpleNamespace(rank=0, total_steps=4, start_step=0))  # type: ignore[arg-type]
    for epoch, waits in enumerate(({"data_wait": data, "device_wait": device}, {"data_wait": 0.0}), 1):
        for _ in range(2):
            display.on_step(metrics(2 * epoch, **waits))
        display.on_epoch_end(metrics(2 * epoch))
    told = [line for line in capsys.readouterr().err.splitlines() if "done" in line]
    assert ("of the time waiting" in told[0]) == bool(said) and said in told[0]
    assert "waiting" not in told[1]  # each epoch by itself


def test_lines_are_not_printed_at_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay("lines", every_seconds=1000)
    display.on_start(SimpleNamespace(rank=0, total_steps=9, start_step=0))  # type: ignore[arg-type]
    for step in range(1, 6):
        display.on_step(metrics(step))
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="unknown progress mode"):
        ProgressDisplay("dots")
