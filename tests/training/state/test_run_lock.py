"""A run folder is written by one process at a time: real processes, killed and alive."""

import os
import signal
import threading
from pathlib import Path

import pytest
from train_helpers import At, Trained, command_until, exact

from cloob.errors import InputError, TrainingFailed
from cloob.models.runs import list_checkpoints
from cloob.training import run_folder
from cloob.training.loop import train
from cloob.training.run_folder import LOCK


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_second_run_is_refused_and_a_killed_one_s_lock_taken_over(
    trained: Trained, tmp_path: Path, processes: int
) -> None:
    """The first one's half-written checkpoint stays; after kill -9 the run goes on to the numbers of one left alone."""
    run, config = tmp_path / "run", trained.config.override(out=tmp_path / "run", resume="auto")

    def hold() -> None:
        (tmp_path / f"holds-{os.environ.get('RANK', 0)}").touch()
        signal.pause()

    first = command_until(tmp_path / "first", config, 5, hold, processes)
    first.until(lambda: len(list(tmp_path.glob("holds-*"))) == processes, 240)
    half = run / "checkpoints" / ".tmp-step-00000006-1"
    half.mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK}
    replaces = config.override(resume="none", overwrite=True)
    other = command_until(tmp_path / "second", replaces, processes=processes)
    assert set(other.wait()) == {2}, other.told()
    said = [line for line in other.told().splitlines() if line.startswith("cloob: ") and "opening" not in line]
    holder = f"process {first.pids[0]} on {os.uname().nodename} is writing this run"
    assert said == [f"cloob: {run}: {holder}; wait for it, stop it, or give another --out"] * processes
    assert "Traceback" not in other.told()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK} == before
    assert not first.poll()
    for pid in first.pids:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    assert (run / LOCK).is_file() and half.is_dir()

    after = command_until(tmp_path / "after", config, processes=processes)
    assert set(after.wait()) == {0}, after.told()
    assert not (run / LOCK).exists() and not half.exists()
    assert [path.name for path in list_checkpoints(run)][-1] == "step-00000015"
    if processes == 1:
        assert exact(run) == exact(trained.run)


def test_a_dead_process_of_another_host_is_waited_for_and_a_living_one_is_not(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.1)
    run, marker = tmp_path / "run", tmp_path / "run" / LOCK
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
    assert [path.name for path in run.iterdir()] == [LOCK]
    assert train(trained.config.override(out=run, epochs=1, save_every=0)).steps == 5
    assert not marker.exists()


def test_a_run_that_was_taken_over_writes_no_more_checkpoints(trained: Trained, tmp_path: Path) -> None:
    marker = tmp_path / "run" / LOCK

    def take_over() -> None:
        lines = [line for line in marker.read_text().splitlines() if not line.startswith(("pid", "host", "token"))]
        marker.write_text("\n".join([*lines, "pid=7", "host=elsewhere", "token=other"]) + "\n")

    with pytest.raises(TrainingFailed, match="process 7 on elsewhere took the run over"):
        train(trained.config.override(out=tmp_path / "run"), callbacks=[At(3, take_over)])
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
