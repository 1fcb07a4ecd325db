"""Checkpoints of whole runs: layout, writes that break off, damage, what is refused on
resumption, and the best one.
"""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from train_helpers import At, command_until, exact, last_line

from cloob import lock
from cloob.errors import InputError, TrainingFailed
from cloob.lock import LOCK
from cloob.models.runs import chosen_checkpoint, list_checkpoints
from cloob.models.source import find_model_folder
from cloob.training.loop import train
from make import Code, write_table
from support import raises, read_json, read_lines, refused, run_cloob


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


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(),
    reason="the file of a descriptor is looked up in /proc",
)
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    """What a power cut asks for: each file and its folder flushed, then the name, then
    the folder of names flushed.
    """
    done = []
    rename = Path.rename

    def flushed(descriptor):
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(("fsync", file, os.fstat(descriptor).st_size))

    def named(path, target):
        done.append(("rename", path, 0))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", named)
    last = train(run.override(keep=2)).checkpoint
    temporary = last.with_name(f".tmp-{last.name}")
    at = done.index(("rename", temporary, 0))
    before = {path: size for _, path, size in done[:at]}
    for file in last.rglob("*"):
        if file.is_file():
            place = temporary / file.relative_to(last)
            assert before[place] == file.stat().st_size
    assert {temporary, temporary / "model"} <= before.keys()
    assert last.parent in [path for what, path, _ in done[at:] if what == "fsync"]


@pytest.mark.parametrize(
    ("damaged", "cut"),
    [
        ("trainer.pt", True),
        ("model/open_clip_model.safetensors", True),
        ("model/open_clip_model.safetensors", False),
    ],
)
def test_auto_passes_over_a_damaged_checkpoint(
    trained, run, tmp_path, damaged, cut, caplog
):
    _, last = list_checkpoints(run.out)
    file = last / damaged
    half = file.stat().st_size // 2
    if cut:
        os.truncate(file, half)
    else:
        with file.open("r+b") as weights:
            weights.seek(half)
            weights.write(bytes(64))
    assert train(run.override(keep=1)).steps == 15
    assert file.name in caplog.text
    assert "trying the checkpoint before it" in caplog.text
    assert exact(run.out) == exact(trained.run)
    assert (last.parent / f"unreadable-{last.name}").is_dir()
    (kept,) = list_checkpoints(run.out)
    torch.save(Code(tmp_path / "ran"), kept / damaged)
    match = f"has no complete checkpoint .the newest: .*{kept.name}.*--out"
    raises(InputError, match, train, run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["optimizer", "objective", "moments"])
def test_a_state_that_no_run_writes_is_one_line(run, part):
    file = list_checkpoints(run.out)[-1] / "trainer.pt"
    state = torch.load(file, weights_only=True)
    if part == "moments":  # which torch does not look at
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 3)
    else:
        state[part] = {"x": torch.ones(2)}
    torch.save(state, file)
    raises(InputError, f"^{file.parent}", train, run)


def test_the_options_of_the_optimiser_are_those_of_the_configuration(run):
    result = train(run.override(weight_decay=0.7, beta2=0.5, eps=1e-3, keep=1))
    state = torch.load(result.checkpoint / "trainer.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    for group in groups:
        assert tuple(group["betas"]) == (0.9, 0.5)
        assert group["eps"] == 1e-3


# A run folder is written by one process at a time: real processes, killed and alive


def test_a_second_run_is_refused_and_a_killed_one_s_lock_taken_over(trained, tmp_path):
    """The first one's half-written checkpoint stays; after kill -9 the run goes on to
    the numbers of one left alone.
    """
    run = tmp_path / "run"
    holds = tmp_path / "holds"
    config = trained.config.override(out=run, resume="auto")

    def hold():
        holds.touch()
        signal.pause()

    first = command_until(tmp_path / "first", config, 5, hold)
    first.until(holds.exists, 240)
    half = run / "checkpoints" / ".tmp-step-00000006-1"
    half.mkdir()
    replaces = config.override(resume="none", overwrite=True)
    said = last_line(command_until(tmp_path / "second", replaces))
    holder = f"process {first.pids[0]} on {os.uname().nodename} is writing this run"
    advice = "wait for it, stop it, or give another --out"
    assert said == f"cloob: {run}: {holder}; {advice}"
    assert not first.poll()
    os.kill(first.pids[0], signal.SIGKILL)
    first.wait()
    assert (run / LOCK).is_file()
    assert half.is_dir()
    assert len(list_checkpoints(run)) == 2

    after = command_until(tmp_path / "after", config)
    assert after.wait() == [0], after.told()
    assert not (run / LOCK).exists()
    assert not half.exists()
    assert exact(run) == exact(trained.run)


def test_a_dead_process_of_another_host_is_waited_for_and_a_living_one_is_not(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    run = tmp_path / "run"
    marker = tmp_path / "run" / LOCK
    config = trained.config.override(out=run, epochs=1, save_every=0)
    run.mkdir()
    said = ["filelock/2", f"pid={os.getpid()}", "host=elsewhere", "mode=lease"]
    marker.write_text("\n".join([*said, "token=t", "duration=1.0", ""]))
    ended = threading.Event()

    def live():
        while not ended.wait(0.1):
            os.utime(marker)

    other = threading.Thread(target=live)
    other.start()
    match = rf"{run}: process {os.getpid()} on elsewhere is writing this run; wait"
    raises(InputError, match, train, config)
    ended.set()
    other.join()
    assert [path.name for path in run.iterdir()] == [LOCK]
    assert train(config).steps == 5
    assert not marker.exists()


def test_a_run_that_was_taken_over_writes_no_more_checkpoints(trained, tmp_path):
    config = trained.config.override(out=tmp_path / "run")
    marker = config.out / LOCK
    told = {"pid": "7", "host": "elsewhere", "token": "other"}

    def take_over():
        names = (line.partition("=") for line in marker.read_text().splitlines())
        lines = [f"{name}{sign}{told.get(name, value)}" for name, sign, value in names]
        marker.write_text("\n".join([*lines, ""]))

    match = "process 7 on elsewhere took the run over"
    raises(TrainingFailed, match, train, config, callbacks=[At(3, take_over)])
    assert names(config.out) == ["step-00000002"]


# Which checkpoint is the best, that it outlives the others, and how it is loaded


@pytest.fixture(scope="module")
def judged(trained, pairs_folder, tmp_path_factory):
    """A run that gets better, then learns too fast and gets worse; beside the best only
    the newest checkpoint stays.
    """
    out = tmp_path_factory.mktemp("judged") / "run"
    config = trained.config.override(save_every=100, keep=1, out=out)
    config = config.override(val_data=[str(pairs_folder)])
    train(config.override(epochs=3))
    train(config.override(epochs=5, lr=0.5, schedule="constant", resume="auto"))
    return config


def test_the_best_outlives_the_others(judged):
    epochs = read_lines(judged.out / "epochs.jsonl")
    best = min(epochs, key=lambda line: line["val_loss"])
    assert best["epoch"] < 5, epochs  # else this shows nothing
    expected = [f"step-{best['step']:08d}", "step-00000025"]
    assert names(judged.out) == expected
    chosen = chosen_checkpoint(judged.out, "best")
    assert chosen == list_checkpoints(judged.out)[0]
    told = read_json(chosen / "validation.json")
    assert told.pop("batch_size") == judged.batch_size
    assert told.pop("held_out")
    assert told.pop("step") == best["step"]
    assert told.pop("metric") == "val_loss"
    assert told == {name: best[name] for name in ("val_loss", "val_recall")}


def test_held_out_pairs_that_cannot_be_used_are_named_and_counted(
    trained, pairs_folder, tmp_path
):
    """Two of the folder's forty are bad: one in five is allowed, one in three is
    not.
    """
    run = tmp_path / "run"
    config = trained.config.override(out=run, epochs=2, ema=0.9)
    train(config.override(val_data=[str(pairs_folder)]))
    log = read_lines(run / "skipped.jsonl")
    named = {Path(x["key"]).stem: x["reason"] for x in log if x.get("held_out")}
    assert sum("held_out" in line for line in log) == 2  # once, not in each epoch
    assert named.keys() == {"13", "27"}
    for line in read_lines(run / "epochs.jsonl"):
        assert line["val_skipped"] == dict.fromkeys(named.values(), 1)
        assert line["val_recall"] is not None
    names = ("00.png", "01.png", "gone.png")
    rows = [{"filepath": pairs_folder / name, "title": "x"} for name in names]
    table = write_table(tmp_path / "val.csv", rows)
    match = r"val\.csv: 1 of 3 held-out pairs cannot be used, .*1 missing image \(e\.g"
    config = config.override(out=tmp_path / "other", val_data=[str(table)])
    raises(InputError, match, train, config)
    # the validation that a resumed run begins with names it again: once in all
    raises(InputError, match, train, config.override(resume="auto"))
    log = read_lines(config.out / "skipped.jsonl")
    found = [Path(x["key"]).stem for x in log if x.get("held_out")]
    assert found == ["gone"]


def test_held_out_pairs_judge(trained, pairs_folder, tmp_path, capsys):
    """`cloob eval RUN --held-out` has the recall that the training saw."""
    texts = sorted(pairs_folder.glob("*.txt"))
    rows = [
        {"filepath": path.with_suffix(".png"), "title": path.read_text()}
        for path in texts
        if path.stem not in ("13", "27")
    ]
    table = write_table(tmp_path / "pairs.csv", rows)
    run = tmp_path / "run"
    config = trained.config.override(data=[str(table)], val_split=0.3, out=run)
    train(config.override(epochs=1, keep=1))
    words = f"eval {run} --device cpu --out {tmp_path}/out"
    run_cloob(f"{words} --held-out")
    row = read_json(tmp_path / "out" / "results.json")["rows"][0]
    held_out = row["retrieval"]["pairs.csv (held out)"]
    assert held_out["n"] == 11
    ways = ("image_to_text", "text_to_image")
    recalls = [held_out[f"{way}@{k}"] for way in ways for k in (1, 5, 10)]
    seen = read_lines(run / "epochs.jsonl")[-1]["val_recall"]
    # a tie may fall either way
    assert sum(recalls) / 6 == pytest.approx(seen, abs=1.01 / 11 / 6)
    # Changed pairs are split otherwise.
    write_table(table, rows[3:])
    capsys.readouterr()
    changed = "its pairs have changed since the training, so nobody knows which were"
    assert changed in refused(capsys, f"{words} --held-out")


def test_held_out_pairs_of_their_own_judge(
    judged, trained, pairs_folder, tmp_path, capsys
):
    run = str(judged.out)
    out = tmp_path / "out"
    words = f"--device cpu --out {out} --held-out"
    run_cloob(f"eval {run} {run}:last {words}")
    rows = read_json(out / "results.json")["rows"]
    name = f"{pairs_folder.name} (held out)"
    found = [list(row["retrieval"]) for row in rows]
    assert found == [[name], [name]]
    capsys.readouterr()

    strange = shutil.copytree(judged.out, tmp_path / "strange")
    config = judged.override(val_data=["https://host.invalid/{0..9}.tar"])
    (strange / "config.json").write_text(config.to_json())
    model = shutil.copytree(find_model_folder(run), tmp_path / "model")
    for source, error in (
        (trained.run, "held no pairs out of its training"),
        (strange, "its held-out pairs are streamed"),
        (model, "no model here is a run of `cloob train`"),
    ):
        assert error in refused(capsys, f"eval {source} {words}")
