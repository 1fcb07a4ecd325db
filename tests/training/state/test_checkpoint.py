"""Checkpoints of whole runs: their layout, writes that break off, damage, and what is refused on resumption."""

import errno
import logging
import os
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from train_helpers import At, command_until, exact

from cloob.cli import main
from cloob.errors import InputError, TrainingFailed
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.training import run_folder
from cloob.training.loop import train
from cloob.training.run_folder import LOCK
from make import Code, write_tar
from support import raises


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run with its checkpoints of steps 8 and 10 alone, to be resumed."""
    out = tmp_path / "run"
    shutil.copytree(trained.run, out)
    for path in list_checkpoints(out):
        if path.name not in ("step-00000008", "step-00000010"):
            shutil.rmtree(path)
    return trained.config.override(out=out, resume="auto")


def names(out):
    assert not list((out / "checkpoints").glob(".*"))
    return [path.name for path in list_checkpoints(out)]


def test_layout_and_keep(trained, run):
    result = train(run.override(keep=2))
    assert names(result.run) == ["step-00000014", "step-00000015"] and result.checkpoint is not None
    assert {path.name for path in result.checkpoint.iterdir()} == {"model", "trainer.pt"}
    modes = {file.stat().st_mode for file in (result.checkpoint / "model").iterdir()}
    assert len(modes) == 1  # who may read one reads all
    state = torch.load(result.checkpoint / "trainer.pt", weights_only=True)
    assert state["progress"]["step"] == 15 and len(state["rng"]) == 1 and state["batch_size"] == 8


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the file of a descriptor is looked up in /proc")
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    """What a power cut asks for: each file and its folder flushed, then the name, then the folder of names flushed."""
    done = []
    rename = Path.rename

    def flushed(descriptor):
        done.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_size))

    def named(path, target):
        done.append(("rename", path, 0))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", named)
    last = train(run.override(keep=2)).checkpoint
    assert last is not None
    temporary = next(path for what, path, _ in done[::-1] if what == "rename" and last.name in path.name)
    at = done.index(("rename", temporary, 0))
    before = {path.relative_to(temporary): size for _, path, size in done[:at] if path.is_relative_to(temporary)}
    files = {file.relative_to(last): file.stat().st_size for file in last.rglob("*") if file.is_file()}
    assert files.items() <= before.items() and Path() in before and Path("model") in before
    assert last.parent in [path for what, path, _ in done[at:] if what == "fsync"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ZeroDivisionError("a bug")])
def test_an_interrupted_write_leaves_the_one_before(run, monkeypatch, fault):
    def fail(*_, **__):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(InputError if isinstance(fault, OSError) else type(fault)):
            train(run.override(keep=1))
    assert names(run.save.out) == ["step-00000008", "step-00000010"]
    assert load_model(run.save.out).name == "nano-dropout"


@pytest.mark.parametrize(
    ("damaged", "cut"),
    [("trainer.pt", True), ("model/open_clip_model.safetensors", True), ("model/open_clip_model.safetensors", False)],
)
def test_auto_passes_over_a_damaged_checkpoint(trained, run, tmp_path, damaged, cut, caplog):
    first, last = list_checkpoints(run.save.out)
    file = last / damaged
    half = file.stat().st_size // 2
    if cut:
        os.truncate(file, half)
    else:
        with file.open("r+b") as weights:
            weights.seek(half)
            weights.write(bytes(64))
    raises(InputError, file.name, train, run.override(resume=str(last)))
    with caplog.at_level(logging.WARNING):
        assert train(run.override(resume=str(first / ".." / ".."), keep=1)).steps == 15  # a run is as auto
    assert file.name in caplog.text and "trying the checkpoint before it" in caplog.text
    assert exact(run.save.out) == exact(trained.run)
    assert (last.parent / f"unreadable-{last.name}").is_dir()
    (kept,) = list_checkpoints(run.save.out)
    torch.save(Code(tmp_path / "ran"), kept / damaged)
    raises(InputError, f"has no complete checkpoint .the newest: .*{kept.name}.*--out", train, run)
    assert not (tmp_path / "ran").exists()


def test_where_to_resume_from(trained, run, tmp_path):
    start, _ = list_checkpoints(run.save.out)
    result = train(run.override(out=tmp_path / "new", resume=str(start), epochs=2))
    assert exact(result.run)[0]["step"] == 9
    for resume, out, said in (
        (str(start), run.save.out, f"holds a checkpoint newer than {start.name}"),
        (str(start), result.run, "already holds a run"),
        (f"{tmp_path}/nowhere", result.run, "has no complete checkpoint; expected: none, auto, a checkpoint or a run"),
        (str(tmp_path), result.run, "has no complete checkpoint"),
    ):
        raises(InputError, said, train, run.override(out=out, resume=resume))


@pytest.mark.parametrize("part", ["progress", "optimizer", "objective", "moments"])
def test_a_state_that_no_run_writes_is_one_line(run, part):
    file = list_checkpoints(run.save.out)[-1] / "trainer.pt"
    state = torch.load(file, weights_only=True)
    if part == "moments":  # which torch does not look at
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 3)
    torch.save(state if part == "moments" else state | {part: {"x": torch.ones(2)}}, file)
    raises(InputError, f"^{file.parent}", train, run.override(resume=str(file.parent)))


def test_the_options_of_the_optimiser_are_those_of_the_configuration(run):
    result = train(run.override(weight_decay=0.7, beta2=0.5, eps=1e-3, epochs=3, keep=1))
    assert result.checkpoint is not None
    groups = torch.load(result.checkpoint / "trainer.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert all((tuple(group["betas"]), group["eps"]) == ((0.9, 0.5), 1e-3) for group in groups)


def test_edited_pairs_are_refused_on_resumption(base, pairs_as, tmp_path, capfd):
    """The first shard again, with a longer caption."""
    data, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(pairs_as["shards"], data)
    config = base.override(data=[str(data)], out=run, epochs=1, save_every=0)
    assert train(config, callbacks=[At(3, lambda: signal.raise_signal(signal.SIGTERM))]).steps == 3
    with tarfile.open(data / "00000.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    write_tar(data / "00000.tar", files | {"00.txt": b"a very red disc"})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["train", "--config", str(run / "config.json"), "--resume", "auto"]
    capfd.readouterr()
    assert main(command) == 2
    *_, said = capfd.readouterr().err.splitlines()
    newest = run / "checkpoints" / "step-00000003"
    others = "the training pairs are not those of this checkpoint's run (other members)"
    assert said == f"cloob: {newest}: {others}; start from its weights with --init {newest}"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# A run folder is written by one process at a time: real processes, killed and alive


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_second_run_is_refused_and_a_killed_one_s_lock_taken_over(trained, tmp_path, processes):
    """The first one's half-written checkpoint stays; after kill -9 the run goes on to the numbers of one left alone."""
    run, config = tmp_path / "run", trained.config.override(out=tmp_path / "run", resume="auto")

    def hold():
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


def test_a_dead_process_of_another_host_is_waited_for_and_a_living_one_is_not(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.1)
    run, marker = tmp_path / "run", tmp_path / "run" / LOCK
    run.mkdir()
    marker.write_text(f"filelock/2\npid={os.getpid()}\nhost=elsewhere\nmode=lease\ntoken=t\nduration=1.0\n")
    ended = threading.Event()

    def live():
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


def test_a_run_that_was_taken_over_writes_no_more_checkpoints(trained, tmp_path):
    marker = tmp_path / "run" / LOCK

    def take_over():
        lines = [line for line in marker.read_text().splitlines() if not line.startswith(("pid", "host", "token"))]
        marker.write_text("\n".join([*lines, "pid=7", "host=elsewhere", "token=other"]) + "\n")

    with pytest.raises(TrainingFailed, match="process 7 on elsewhere took the run over"):
        train(trained.config.override(out=tmp_path / "run"), callbacks=[At(3, take_over)])
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
