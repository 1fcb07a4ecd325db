"""A run folder is written by one process at a time: real processes, killed and alive."""

from __future__ import annotations

import json
import os
import signal
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
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.state import runlock
from cloob.train.state.runlock import NAME, RunLock
from cloob.train.watch.log import ProgressDisplay
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


def test_a_dead_process_that_nobody_has_collected_holds_nothing(tmp_path: Path) -> None:
    """A zombie has a number and a start; a killed rank of torchrun is one for a while."""

    def hold() -> None:
        RunLock(tmp_path / "run").__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    ranks = fork(tmp_path / "first", 1, hold)
    end = time.monotonic() + 60
    while Path(f"/proc/{ranks.pids[0]}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)
    with RunLock(tmp_path / "run") as lock:
        lock.check()
    ranks.wait()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A lock that a process of another machine holds, under a number that lives here too."""
    path = tmp_path / "run" / NAME
    path.parent.mkdir()
    owner = {"host": "elsewhere", "pid": os.getpid(), "started": "1", "machine": "another boot", "token": "t"}
    path.write_text(json.dumps(owner))
    return path


def test_a_lock_of_another_machine_counts_while_it_is_renewed(elsewhere: Path) -> None:
    with pytest.raises(InputError, match=rf"process {os.getpid()} on elsewhere is writing this run"):
        RunLock(elsewhere.parent).__enter__()
    assert [path.name for path in elsewhere.parent.iterdir()] == [NAME]
    then = time.time() - runlock._DEAD_AFTER - 1
    os.utime(elsewhere, (then, then))
    with RunLock(elsewhere.parent) as lock:
        lock.check()
    assert not elsewhere.exists()


def test_a_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlock, "_RENEWED_EVERY", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        end = time.monotonic() + 60
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_run_that_was_taken_over_writes_no_more_checkpoints(trained: Trained, tmp_path: Path) -> None:
    from test_train_loop import At

    def take_over() -> None:
        owner = json.loads((tmp_path / "run" / NAME).read_text())
        (tmp_path / "run" / NAME).write_text(json.dumps(owner | {"host": "elsewhere", "pid": 7, "token": "other"}))

    with pytest.raises(TrainingFailed, match="process 7 on elsewhere took the run over"):
        train(trained.config.override(out=tmp_path / "run"), callbacks=[At(3, take_over)])
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert json.loads((tmp_path / "run" / NAME).read_text())["token"] == "other"


def test_a_stale_lock_that_was_replaced_in_between_is_put_back(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the same dead lock: the slower one must not take the quicker one's away."""
    owner = runlock._owner
    seen = []

    def slow(path: Path) -> Any:
        seen.append(owner(path))
        if len(seen) == 1:
            path.write_text(json.dumps({**vars(seen[0]), "token": "quicker"}))
        return seen[-1]

    monkeypatch.setattr(runlock, "_owner", slow)
    runlock._remove_stale(elsewhere)
    assert json.loads(elsewhere.read_text())["token"] == "quicker"


def test_a_lock_that_names_nobody_may_be_one_that_is_being_written(tmp_path: Path) -> None:
    """It is left to who made it; one that stays like that is of a process that was killed as it wrote."""
    (tmp_path / NAME).touch()
    runlock._remove_stale(tmp_path / NAME)
    assert (tmp_path / NAME).exists()
    then = time.time() - runlock._DEAD_AFTER - 1
    os.utime(tmp_path / NAME, (then, then))
    with RunLock(tmp_path) as lock:
        lock.check()


def test_a_run_that_could_not_begin_leaves_no_folder(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        train(trained.config.override(data=["nowhere.csv"], out=tmp_path / "a" / "b"))
    assert not any(tmp_path.iterdir())
