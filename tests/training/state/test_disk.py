"""Whole runs whose disk fills up: what is said, what stays, and that they go on once there is room."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from train_helpers import exact

from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.state.resume import find_checkpoint, read_checkpoint
from cloob.training.watch.log import ProgressDisplay
from support import Ranks, fork

DISK = 128 << 20


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The run that always has room."""
    config = base.override(out=tmp_path_factory.mktemp("room") / "run", keep=0)
    train(config)
    return config


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    """A real file system of 128 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; the limit on a file's size is tested instead")
    if subprocess.run([mount, "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the limit on a file's size is tested instead")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def command(folder: Path, config: TrainConfig, before: Callable[[], object] = lambda: None) -> Ranks:
    """``cloob train --config …`` in a process of its own."""
    from cloob.cli import main

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())

    def action() -> int:
        before()
        return main(["train", "--config", str(folder / "config.json")])

    ranks = fork(folder, 1, action)
    ranks.wait()
    return ranks


def check_and_go_on(ranks: Ranks, config: TrainConfig, whole: TrainConfig, file: str, free: Callable[[], None]) -> None:
    """One line and exit code 2; every checkpoint that is there is whole; with room, the run that always had it."""
    run = config.save.out
    assert ranks.codes[0] == 2, ranks.told()
    *progress, said = ranks.told().splitlines()
    usual = ("cloob: opening data", "cloob: step", "cloob: epoch", f"{run}/tensorboard: ", f"{config.pairs.data[0]}: ")
    assert all(line.startswith(usual) for line in progress) and said.startswith(f"cloob: {run}/")
    kept = list_checkpoints(run)
    assert kept and not list((run / "checkpoints").glob(".tmp-*"))
    assert file in said and ("No space left" in said or "File too large" in said)
    if file.startswith("step-"):
        assert said.endswith(f"the last whole checkpoint is {kept[-1]}")
    for path in kept:
        assert read_checkpoint(path).progress.step == int(path.name[5:])
    assert load_model(str(run)).name == "nano-dropout"
    found = find_checkpoint(run, "auto")
    assert found is not None and found.path == kept[-1] and found.progress.step < 15

    free()
    again = command(ranks.outputs[0].parent / "again", config.override(resume="auto"))
    assert again.codes[0] == 0, again.told()
    assert exact(run) == exact(whole.save.out)
    assert [path.name for path in list_checkpoints(run)] == [path.name for path in list_checkpoints(whole.save.out)]


@pytest.mark.nightly
def test_a_run_whose_disk_fills_up(whole: TrainConfig, disk: Path, tmp_path: Path) -> None:
    """Something else takes the room that the fourth checkpoint needs; TensorBoard's events lie on that disk too."""
    size = sum(path.stat().st_size for path in list_checkpoints(whole.save.out)[0].rglob("*"))
    config = whole.override(out=disk / "run", tensorboard=True)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(DISK - int(3.5 * size)))
    ranks = command(tmp_path / "first", config)
    check_and_go_on(ranks, config, whole, "step-00000008", ballast.unlink)


@pytest.mark.parametrize(
    ("file", "tensorboard"),
    [("step-00000006", False), pytest.param("metrics.jsonl", True, marks=pytest.mark.nightly)],
)
def test_a_run_whose_files_may_not_grow(whole: TrainConfig, tmp_path: Path, file: str, tensorboard: bool) -> None:
    """From step 5 on the kernel refuses what is beyond half a checkpoint's file, or beyond a few lines of a log."""
    weights = list_checkpoints(whole.save.out)[0] / "model" / "open_clip_model.safetensors"
    half = weights.stat().st_size // 2 if file.startswith("step-") else None

    def limited() -> None:
        on_step = ProgressDisplay.on_step

        def then_limit(self: ProgressDisplay, metrics: Mapping[str, Any]) -> None:
            on_step(self, metrics)
            if metrics["step"] == 5:
                limit = half or os.fstat(2).st_size + 700  # what the run says is a file too
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        ProgressDisplay.on_step = then_limit  # type: ignore[method-assign] # in a process of its own

    config = whole.override(out=tmp_path / "run", tensorboard=tensorboard)
    ranks = command(tmp_path / "first", config, limited)
    check_and_go_on(ranks, config, whole, file, lambda: None)
