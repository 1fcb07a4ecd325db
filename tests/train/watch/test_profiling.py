"""``--profile``: parts and their own times, the windows of table and trace, and a run with and without it."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from train_helpers import exact, lines

from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.watch import profiling, spans
from cloob.train.watch.profiling import Profile, table
from cloob.train.watch.spans import DATA, READING, PartTime, Spans

CPU = torch.device("cpu")


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(spans.time, "perf_counter", clock.perf_counter)
    return clock


def test_a_parts_time_is_without_the_parts_inside_it(clock: Clock) -> None:
    mark = Spans(CPU)
    with mark("before"):  # nothing is recorded yet
        clock.now += 100
    mark.recording = True
    for _ in range(2):
        with mark("outer"):
            clock.now += 1
            with mark("inner"):
                clock.now += 2
            with mark("inner"):
                clock.now += 3
            clock.now += 4
        with mark("whole", undivided=True), mark("inner"):
            clock.now += 5
    assert mark.take() == {"outer": PartTime(10, None), "inner": PartTime(10, None), "whole": PartTime(10, None)}
    assert mark.take() == {}
    with contextlib.suppress(ValueError), mark("left by an error"):
        clock.now += 1
        raise ValueError
    with mark("after"):
        clock.now += 1
    assert mark.take() == {"left by an error": PartTime(1, None), "after": PartTime(1, None)}


def test_the_table_adds_up_and_says_what_is_waited_for() -> None:
    times = {DATA: PartTime(6.0, None), "forward": PartTime(3.0, None)}
    told = table(times, seconds=10.0, steps=4)
    assert told.splitlines()[0].startswith("2500.00 ms a step, mean of 4 steps")
    rows = {line[:24].strip(): line[24:].split() for line in told.splitlines()[2:-1]}
    assert rows == {
        "waiting for data": ["1500.00", "60.0%"],
        "forward": ["750.00", "30.0%"],
        "all else": ["250.00", "10.0%"],
    }
    assert "waited for: data (data 60% of the time)" in told
    assert "waited for: the step (data 10%" in table({DATA: PartTime(1.0, None)}, 10.0, 1)
    on_device = {DATA: PartTime(1.0, 0.0), READING: PartTime(7.0, 0.0), "forward": PartTime(0.5, 4.0)}
    told = table(on_device, 10.0, 2)
    assert "waited for: the device (data 10% of the time, the device 70%)" in told
    assert told.splitlines()[4].split() == ["forward", "250.00", "5.0%", "2000.00", "40.0%"]


@pytest.mark.parametrize(("steps", "timed"), [(1, 0), (2, 1), (4, 2), (18, 10), (1000, 10)])
def test_the_windows_fit_into_the_run(
    steps: int, timed: int, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[float, int]] = []
    monkeypatch.setattr(profiling, "table", lambda times, seconds, n: written.append((seconds, n)) or "a table\n")
    mark = Spans(CPU)
    profile = Profile(tmp_path, mark, steps)
    for _ in range(min(steps, 30)):
        profile.step()
        clock.now += 1
    profile.close()
    profile.close()
    assert written == ([(timed, timed)] if timed else []) and not mark.recording
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    assert "traceEvents" in trace
    assert (tmp_path / "profile" / "table.txt").read_text().startswith("a table" if timed else "\n")


def test_a_run_that_ends_early_has_its_table(tmp_path: Path) -> None:
    mark = Spans(CPU)
    profile = Profile(tmp_path, mark, 1000)
    for _ in range(8):
        profile.step()
        with mark("forward"):
            time.sleep(0)
    profile.close()
    told = (tmp_path / "profile" / "table.txt").read_text()
    assert "mean of 3 steps" in told and "forward" in told
    assert not (tmp_path / "profile" / "trace.json.gz").exists()


@pytest.mark.parametrize("leaves", [{}, {"micro_batch_size": 4, "ema": 0.9}], ids=["plain", "micro-batches"])
def test_a_profiled_run_is_the_run(leaves: dict[str, object], base: TrainConfig, tmp_path: Path) -> None:
    settings = base.override(save_every=0, **leaves)
    train(settings.override(out=tmp_path / "plain"))
    train(settings.override(out=tmp_path / "profiled", profile=True))
    assert exact(tmp_path / "plain") == exact(tmp_path / "profiled")
    assert not (tmp_path / "plain" / "profile").exists()
    told = (tmp_path / "profiled" / "profile" / "table.txt").read_text()
    parts = ["waiting for data", "copy to the device", "forward", "optimiser", "end of an epoch"]
    parts += ["objective and backward", "average of the weights"] if leaves else ["objective", "backward"]
    for part in (*parts, "all else", "operations of the traced steps", "aten::"):
        assert part in told, part
    events = json.loads(gzip.decompress((tmp_path / "profiled" / "profile" / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in events["traceEvents"]}
    assert {"cloob: forward", "cloob: optimiser"} <= names
    assert len(lines(tmp_path / "profiled" / "metrics.jsonl")) == 15
