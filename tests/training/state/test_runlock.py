"""A run folder is written by one process at a time: real processes, killed and alive."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from train_helpers import Trained, exact

from cloob.cli import main
from cloob.errors import InputError, TrainingFailed
from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.state import runlock
from cloob.training.state.runlock import NAME
from cloob.training.watch.log import ProgressDisplay
from support import Ranks, fork


@dataclass
class Command:
    """``cloob train`` on a configuration, from a folder of its own."""

    folder: Path
    config: TrainConfig

    def start(self, name: str, processes: int = 1, holds_at: int | None = None, **leaves: Any) -> Ranks:
        """Starts it; it waits after step ``holds_at`` until it is killed."""
        place = self.folder / name
        place.mkdir()
        (place / "config.json").write_text(self.config.override(**leaves).to_json())

        def action() -> int:
            on_step = ProgressDisplay.on_step

            def then_hold(self: ProgressDisplay, metrics: Mapping[str, Any]) -> None:
                on_step(self, metrics)
                if metrics["step"] == holds_at:
                    (place / f"holds-{os.environ.get('RANK', 0)}").touch()
                    signal.pause()

            ProgressDisplay.on_step = then_hold  # type: ignore[method-assign] # in a process of its own
            return main(["train", "--config", str(place / "config.json")])

        ranks = fork(place, processes, action)
        end = time.monotonic() + 120
        while holds_at is not None and len(list(place.glob("holds-*"))) < processes:
            assert not ranks.poll() and time.monotonic() < end, ranks.told()
            time.sleep(0.01)
        return ranks


def kill(ranks: Ranks) -> None:
    for pid in ranks.pids:
        os.kill(pid, signal.SIGKILL)
    ranks.wait()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_is_refused_and_a_killed_one_s_lock_taken_over(
    trained: Trained, tmp_path: Path, processes: int
) -> None:
    """The first one's half-written checkpoint stays; after kill -9 the run goes on to the numbers of one left alone."""
    run = tmp_path / "run"
    command = Command(tmp_path, trained.config.override(out=run, resume="auto"))
    first = command.start("first", processes, holds_at=5)
    half = run / "checkpoints" / ".tmp-step-00000006-1"
    half.mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != NAME}
    for name, leaves in (("second", {}), ("third", {"resume": "none", "overwrite": True})):
        other = command.start(name, processes, **leaves)
        assert set(other.wait()) == {2}, other.told()
        said = [line for line in other.told().splitlines() if line.startswith("cloob: ") and "opening" not in line]
        holder = f"process {first.pids[0]} on {os.uname().nodename} is writing this run"
        assert said == [f"cloob: {run}: {holder}; wait for it, stop it, or give another --out"] * processes
        assert "Traceback" not in other.told()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != NAME} == before
    assert not first.poll()
    kill(first)
    assert (run / NAME).is_file() and half.is_dir()

    after = command.start("after", processes)
    assert set(after.wait()) == {0}, after.told()
    assert not (run / NAME).exists() and not half.exists()
    assert [path.name for path in list_checkpoints(run)][-1] == "step-00000015"
    if processes == 1:
        assert exact(run) == exact(trained.run)


def test_a_dead_process_of_another_host_is_waited_for_and_a_living_one_is_not(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlock, "_LEASE_SECONDS", 1.0)
    monkeypatch.setattr(runlock, "_HEARTBEAT_SECONDS", 0.1)
    run, marker = tmp_path / "run", tmp_path / "run" / NAME
    run.mkdir()
    marker.write_text(f"filelock/2\npid={os.getpid()}\nhost=elsewhere\nmode=lease\ntoken=t\nduration=1.0\n")
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.1):
            os.utime(marker)

    other = threading.Thread(target=live)
    other.start()
    with pytest.raises(InputError, match=rf"{run}: process {os.getpid()} on elsewhere is writing this run; wait"):
        train(trained.config.override(out=run))
    ended.set()
    other.join()
    assert [path.name for path in run.iterdir()] == [NAME]
    assert train(trained.config.override(out=run, epochs=1)).steps == 5
    assert not marker.exists()


def test_a_run_that_was_taken_over_writes_no_more_checkpoints(trained: Trained, tmp_path: Path) -> None:
    from test_train_loop import At

    marker = tmp_path / "run" / NAME

    def take_over() -> None:
        lines = [line for line in marker.read_text().splitlines() if not line.startswith(("pid", "host", "token"))]
        marker.write_text("\n".join([*lines, "pid=7", "host=elsewhere", "token=other"]) + "\n")

    with pytest.raises(TrainingFailed, match="process 7 on elsewhere took the run over"):
        train(trained.config.override(out=tmp_path / "run"), callbacks=[At(3, take_over)])
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_run_that_could_not_begin_leaves_no_folder(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        train(trained.config.override(data=["nowhere.csv"], out=tmp_path / "run"))
    assert not any(tmp_path.iterdir())
