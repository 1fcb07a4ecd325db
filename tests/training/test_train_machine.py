"""What a machine does to a run: a disk that fills up, a mount that dies, memory that runs out. Real processes."""

from __future__ import annotations

import gc
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from train_helpers import Trained, command_until, exact, lines

from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.step import TowersWithLoss


@pytest.mark.parametrize(
    ("file", "tensorboard"),
    [("step-00000006", False), pytest.param("metrics.jsonl", True, marks=pytest.mark.nightly)],
)
def test_a_run_whose_files_may_not_grow(trained: Trained, tmp_path: Path, file: str, tensorboard: bool) -> None:
    """From step 5 on the kernel refuses what is beyond half a checkpoint's file, or beyond a few lines of a log.

    One line and exit code 2; each checkpoint that is there is whole; with room it goes on as the run that had some.
    """
    weights = list_checkpoints(trained.run)[0] / "model" / "open_clip_model.safetensors"
    half = weights.stat().st_size // 2 if file.startswith("step-") else None

    def limit() -> None:
        most = half or os.fstat(2).st_size + 700  # what the run says is a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    run = tmp_path / "run"
    config = trained.config.override(out=run, tensorboard=tensorboard)
    ranks = command_until(tmp_path / "first", config, 5, limit)
    assert ranks.wait() == [2], ranks.told()
    said = ranks.told().splitlines()[-1]
    kept = list_checkpoints(run)
    assert said.startswith(f"cloob: {run}/") and file in said and "File too large" in said
    assert "Traceback" not in ranks.told() and not list((run / "checkpoints").glob(".tmp-*"))
    if file.startswith("step-"):
        assert said.endswith(f"the last whole checkpoint is {kept[-1]}")
    assert kept and load_model(str(run)).name == "nano-dropout"
    train(config.override(resume="auto"))
    assert exact(run) == exact(trained.run)
    assert [path.name for path in list_checkpoints(run)] == [path.name for path in list_checkpoints(trained.run)]


@pytest.fixture
def mount(pairs_folder: Path, tmp_path: Path) -> Path:
    """The good pairs, in a folder of their own."""
    folder = tmp_path / "mount"
    shutil.copytree(pairs_folder, folder)
    for stem in ("13", "27"):
        (folder / f"{stem}.png").unlink()
        (folder / f"{stem}.txt").unlink()
    return folder


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_mount_that_dies_ends_the_run(base: TrainConfig, mount: Path, tmp_path: Path, processes: int) -> None:
    """The pictures are gone after step 3: batches without one usable pair count, and the limit ends the run."""
    config = base.override(data=[str(mount)], out=tmp_path / "run", epochs=30)
    ranks = command_until(tmp_path / "a", config, 3, lambda: shutil.rmtree(mount, ignore_errors=True), processes)
    assert set(ranks.wait()) == {2}, ranks.told()
    said = ranks.outputs[0].read_text().splitlines()[-1]
    assert said.startswith(f"cloob: {mount}: 8 of 32 samples cannot be used, more than max_bad_fraction = 0.2 allows: ")
    assert "missing image (e.g. " in said
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("skipped") for line in found] == [None] * 3 + ["too few usable samples"]
    assert len(lines(tmp_path / "run" / "skipped.jsonl")) == 8
    # What was trained before is kept.
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_held_out_pairs_that_are_gone_end_the_run_whatever_the_limit(
    base: TrainConfig, mount: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    sources = {"data": [str(pairs_folder)], "val_data": [str(mount)], "out": tmp_path / "run"}
    config = base.override(**sources, epochs=30, batch_size=19, max_bad_fraction=1, save_every=0)
    ranks = command_until(tmp_path / "first", config, 2, lambda: shutil.rmtree(mount))
    assert ranks.wait() == [2], ranks.told()
    said = ranks.told().splitlines()[-1]
    assert said.startswith(f"cloob: {mount}: 38 of 38 held-out pairs cannot be used, which leaves none: 38 missing im")
    assert not lines(tmp_path / "run" / "epochs.jsonl")
    assert len(list_checkpoints(tmp_path / "run")) == 1  # the epoch's work is kept


def leave(size: int) -> None:
    """Lets this process have no more than so many bytes beside those that it has."""
    gc.collect()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, resource.RLIM_INFINITY))


def test_memory_that_runs_out_at_a_step_is_one_line(base: TrainConfig, tmp_path: Path) -> None:
    """torch's "DefaultCPUAllocator: can't allocate memory": the checkpoint before stays."""
    run = tmp_path / "run"

    def run_out() -> None:  # in the process of the run; what earlier steps have freed could suffice for another one
        leave(120_000_000)
        TowersWithLoss.forward = lambda *_, **__: torch.empty(10**10)  # type: ignore[assignment, method-assign]

    ranks = command_until(tmp_path / "first", base.override(out=run), 2, run_out)
    assert ranks.wait() == [2], ranks.told()
    said = ranks.told().splitlines()[-1]
    assert said.startswith("cloob: 8 pairs at a time do not fit in memory; give --micro-batch-size 4 or less"), said
    assert "Traceback" not in ranks.told()
    assert len(lines(run / "metrics.jsonl")) == 2
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]
