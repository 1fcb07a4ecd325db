"""Processes that are killed, told to end, or lose a rank, a disk, a mount or memory:
real ones, with real signals.
"""

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_helpers import (
    At,
    Poison,
    assert_close_runs,
    command_until,
    exact,
    last_line,
    on_two_ranks,
    result_of,
)

from cloob.data.open import open_source
from cloob.distributed import process_group
from cloob.errors import InputError
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.objective import make_objective
from cloob.training.checkpoint import find_checkpoint
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.pairs import make_loader
from cloob.training.step import TowersWithLoss
from support import fork, raises, read_lines


def test_sigterm_to_the_whole_process_group(trained, tmp_path):
    """What a scheduler sends reaches the data workers as well: checkpoint, exit code 0,
    and the numbers go on.
    """
    config = trained.config.override(out=tmp_path / "run", save_every=100, workers=1)

    def slowly():
        os.setsid()
        slow = At(None, lambda: time.sleep(0.25))
        result = result_of(train, config, callbacks=[slow])
        print(f"stopped={result.stopped} steps={result.steps}")

    ranks = fork(tmp_path, 1, slowly)
    log = config.out / "metrics.jsonl"
    ranks.until(lambda: log.is_file() and log.read_text().count("\n") >= 3)
    os.killpg(ranks.pids[0], signal.SIGTERM)
    assert ranks.wait(60) == [0], ranks.told()
    (saved,) = list_checkpoints(config.out)
    assert f"stopped=SIGTERM steps={int(saved.name[5:])}" in ranks.told()
    assert "Traceback" not in ranks.told()
    train(config.override(resume="auto"))
    assert exact(config.out) == exact(trained.run)


def test_two_ranks(trained, tmp_path):
    """The numbers of one process; one rank that is told to end; bad numbers on one
    rank.
    """
    same = trained.config.override(
        learnable_inv_tau=True, scale="unit", model="nano-vit", resume="auto"
    )
    # 4 steps an epoch
    same = same.override(batch_size=10, epochs=2, save_every=0, keep=0)
    names = ("plain", "poisoned", "stopped", "alone")
    plain, poisoned, stopped, alone = (tmp_path / name for name in names)

    def stop():
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    def all_runs():
        with process_group(torch.device("cpu")):
            train(same.override(out=plain))
            train(same.override(out=poisoned), callbacks=[Poison(5, 6)])
            told = same.override(out=stopped)
            result = result_of(train, told, callbacks=[At(5, stop)])
            print(f"stopped={result.stopped} steps={result.steps}")
            train(told)

    ranks = on_two_ranks(tmp_path / "ranks", all_runs)
    assert ranks.told().count("stopped=SIGTERM steps=5") == 2
    assert exact(stopped) == exact(plain)
    # each bad sample is named, whichever rank read it
    epochs = read_lines(plain / "epochs.jsonl")
    assert epochs[0]["skipped"] == {"corrupt image": 1, "empty caption": 1}
    readers = [line["rank"] for line in read_lines(plain / "skipped.jsonl")]
    expected = sum(sum(line["skipped"].values()) for line in epochs)
    assert len(readers) == expected
    assert set(readers) == {0, 1}

    # Two ranks with half a batch each are one process with the whole batch, gradients
    # and τ⁻¹ included.
    train(same.override(out=alone))
    assert_close_runs(plain, alone, 2e-3, ("loss", "grad_norm", "inv_tau"))
    first, *_, last = exact(plain)
    assert first["loss"] == pytest.approx(exact(alone)[0]["loss"], rel=1e-5)
    assert last["inv_tau"] != pytest.approx(30, rel=1e-4)

    # NaN in the last rank's weights: every rank skips step 6, the keys of both are
    # written, and training goes on.
    assert exact(poisoned)[:5] == exact(plain)[:5]
    found = read_lines(poisoned / "metrics.jsonl")
    assert [line["step"] for line in found if line.get("skipped")] == [6]
    log = read_lines(poisoned / "skipped.jsonl")
    keys = [line["key"] for line in log if line["reason"] == "not finite"]
    seen = [line["samples_seen"] for line in exact(plain)]
    assert len(set(keys)) == len(keys) == seen[5] - seen[4]
    assert exact(poisoned)[-1]["loss"] is not None


def test_two_ranks_judge_one_model(trained, pairs_folder, tmp_path):
    """Running statistics are each rank's own in training; held-out pairs are judged by
    those that are exported.
    """
    config = trained.config.override(
        model="nano-resnet", epochs=2, batch_size=12, micro_batch_size=3, save_every=0
    )
    config = config.override(val_data=[str(pairs_folder)], out=tmp_path / "run")
    on_two_ranks(tmp_path / "ranks", lambda: train(config))
    pairs = open_source(str(pairs_folder))
    objective = make_objective("cloob")
    epochs = read_lines(config.out / "epochs.jsonl")
    saved = list_checkpoints(config.out)
    for line, checkpoint in zip(epochs, saved, strict=True):
        model = load_model(checkpoint)
        loader = make_loader(pairs, model, config, torch.device("cpu"), train=False)
        with torch.no_grad():
            losses = [
                len(batch) * objective(*model(batch.images, batch.tokens))
                for batch in loader.epoch(0)
            ]
        # 2 of the 40 pairs are bad
        expected = float(sum(losses)) / 38
        assert line["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_ranks_that_find_other_pairs_are_refused(trained, pairs_folder, tmp_path):
    """A table that is still on its way to one of two hosts: one that lacks a row, and
    one of as many others.
    """
    rows = [f"{pairs_folder}/{n:02}.png,caption {n}\n" for n in range(24)]
    tables = {"whole": rows, "fewer": rows[:-1], "others": [*rows[1:], rows[0]]}
    for name, own in tables.items():
        (tmp_path / f"{name}.csv").write_text("filepath,title\n" + "".join(own))

    def run():
        os.environ["LOCAL_RANK"] = "0"  # a host each
        for there in ("fewer", "others"):
            name = there if os.environ["RANK"] == "1" else "whole"
            data = [str(tmp_path / f"{name}.csv")]
            config = trained.config.override(data=data, out=tmp_path / "run")
            print(raises(InputError, "rank 1 finds other data", train, config))

    ranks = on_two_ranks(tmp_path / "ranks", run)
    for output in ranks.outputs:
        said = output.read_text()
        assert said.count("rank 1 finds other data than rank 0") == 2
        assert "(23 pairs, not 24" in said
    assert not (tmp_path / "run").exists()


def children(pid):
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, file.read_text().split()))


@pytest.mark.nightly
@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds the worker in Linux' /proc"
)
def test_a_data_worker_that_dies(trained, tmp_path):
    """kill -9 to the data worker of one of two ranks: both end at once, in one line
    that names it, with exit code 1.
    """

    run = tmp_path / "run"
    config = trained.config.override(out=run, epochs=100_000, keep=2, workers=1)
    ranks = command_until(tmp_path, config.override(batch_size=10), processes=2)
    ranks.until(
        lambda: (run / "checkpoints").is_dir() and len(list_checkpoints(run)) >= 2
    )
    (worker,) = children(ranks.pids[1])
    os.kill(worker, signal.SIGKILL)
    assert ranks.wait(60) == [1, 1], ranks.told()
    found = find_checkpoint(TrainConfig(out=run, resume="auto"))
    for output in ranks.outputs:
        told = output.read_text()
        assert "Traceback" not in told
        (said,) = [line for line in told.splitlines() if "data worker" in line]
        assert said.startswith("cloob: ")
        assert f"rank 1: data worker {worker} died" in said
        assert f"the last checkpoint is {found.path}" in said
        assert "go on with --resume auto" in said


def test_another_rank_s_defect_ends_all_with_its_name(trained, tmp_path):
    """An error in one rank's loader (a defect, so with its traceback there) reaches the
    others as one line.
    """
    from cloob.data.loader import Loader

    def broken():
        epoch = Loader.epoch

        def failing(self, *arguments, **more):
            for n, batch in enumerate(epoch(self, *arguments, **more)):
                if n == 3 and os.environ["RANK"] == "1":
                    raise ValueError("the transform gave (3, 31, 31)")
                yield batch

        Loader.epoch = failing  # type: ignore[method-assign] # in a process of its own
        train(trained.config.override(out=tmp_path / "run"))

    ranks = fork(tmp_path, 2, broken)
    assert ranks.wait() == [1, 1], ranks.told()
    first, second = (path.read_text() for path in ranks.outputs)
    defect = "rank 1: ValueError: the transform gave (3, 31, 31)"
    assert f"TrainingFailed: {defect}; the last checkpoint is " in first
    assert "Traceback" in second
    assert "in failing" in second


def test_a_run_whose_files_may_not_grow(trained, tmp_path):
    """From step 5 on the kernel refuses what is beyond half a checkpoint's file.

    One line and exit code 2; each checkpoint that is there is whole; with room it goes
    on as the run that had some.
    """
    weights = list_checkpoints(trained.run)[0] / "model" / "open_clip_model.safetensors"
    half = weights.stat().st_size // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))

    run = tmp_path / "run"
    config = trained.config.override(out=run)
    said = last_line(command_until(tmp_path / "first", config, 5, limit))
    kept = list_checkpoints(run)
    assert said.startswith(f"cloob: {run}/")
    assert "step-00000006" in said
    assert "File too large" in said
    assert said.endswith(f"the last complete checkpoint is {kept[-1]}")
    assert not list((run / "checkpoints").glob(".tmp-*"))
    train(config.override(resume="auto"))
    assert exact(run) == exact(trained.run)


@pytest.fixture
def mount(pairs_folder, tmp_path):
    """The good pairs, in a folder of their own."""
    folder = tmp_path / "mount"
    bad = shutil.ignore_patterns("13.*", "27.*")
    return shutil.copytree(pairs_folder, folder, ignore=bad)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_mount_that_dies_ends_the_run(base, mount, tmp_path, processes):
    """The pictures are gone after step 3: batches without one usable pair count, and
    the limit ends the run.
    """
    run = tmp_path / "run"
    config = base.override(data=[str(mount)], out=run, epochs=30)
    dies = lambda: shutil.rmtree(mount, ignore_errors=True)  # noqa: E731
    said = last_line(command_until(tmp_path / "a", config, 3, dies, processes))
    assert said.startswith(
        f"cloob: {mount}: 8 of 32 samples cannot be used, more than max_bad_fraction ="
        " 0.2 allows: "
    )
    assert "missing image (e.g. " in said
    skipped = [line.get("skipped") for line in read_lines(run / "metrics.jsonl")]
    assert skipped == [None] * 3 + ["too few usable samples"]
    assert len(read_lines(run / "skipped.jsonl")) == 8
    # What was trained before is kept.
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]


def test_held_out_pairs_that_are_gone_end_the_run_whatever_the_limit(
    base, mount, tmp_path
):
    run = tmp_path / "run"
    config = base.override(val_data=[str(mount)], out=run, epochs=30, batch_size=19)
    config = config.override(max_bad_fraction=1, save_every=0)
    gone = command_until(tmp_path / "first", config, 2, lambda: shutil.rmtree(mount))
    assert last_line(gone).startswith(
        f"cloob: {mount}: 38 of 38 held-out pairs cannot be used, which leaves none: 38"
        " missing im"
    )
    assert not read_lines(run / "epochs.jsonl")
    assert len(list_checkpoints(run)) == 1  # the epoch's work is kept


def test_memory_that_runs_out_at_a_step_is_one_line(base, tmp_path):
    """torch's "DefaultCPUAllocator: can't allocate memory": the checkpoint before
    stays.
    """
    run = tmp_path / "run"

    # in the process of the run; what earlier steps have freed could suffice for another
    # one
    def run_out():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 120_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        TowersWithLoss.forward = lambda *_, **__: torch.empty(10**10)  # type: ignore[assignment, method-assign]

    config = base.override(out=run)
    said = last_line(command_until(tmp_path / "first", config, 2, run_out))
    few = "8 pairs at a time do not fit in memory; give --micro-batch-size 4 or less"
    assert said.startswith(f"cloob: {few}"), said
    assert len(read_lines(run / "metrics.jsonl")) == 2
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]


def test_several_ctrl_c_are_one(base, tmp_path):
    """As an impatient person types them, to the very end of the process: exit code 130,
    one line, no traceback.
    """
    config = base.override(out=tmp_path / "run", steps=10**6)
    config = config.override(model="tiny-vit", image_size=None)
    (tmp_path / "config.json").write_text(config.to_json())
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    words = ["cloob", "train", "--config", str(tmp_path / "config.json")]
    program = f"{start} import sys; sys.argv = {words}; import cloob.cli; "
    command = [sys.executable, "-c", f"{program} sys.exit(cloob.cli.main())"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = config.out / "metrics.jsonl"
    end = time.monotonic() + 120
    while not log.is_file() or log.read_text().count("\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, said = process.communicate()
    # One that arrives as Python takes its handlers away is the shell's 130, too.
    assert process.returncode in (130, -signal.SIGINT), said
    assert "Traceback" not in said, said
    assert said.count("cloob: interrupted; the last complete checkpoint") == 1
