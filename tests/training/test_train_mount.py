"""Data that go away while a run reads them: a mount that dies, and batches without one usable pair."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from train_helpers import lines

from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.watch.log import ProgressDisplay
from support import Ranks, fork


@pytest.fixture
def mount(pairs_folder: Path, tmp_path: Path) -> Path:
    """The good pairs, in a folder of their own."""
    folder = tmp_path / "mount"
    shutil.copytree(pairs_folder, folder)
    for stem in ("13", "27"):
        (folder / f"{stem}.png").unlink()
        (folder / f"{stem}.txt").unlink()
    return folder


def trained_until(
    folder: Path, config: TrainConfig, step: int, then: Callable[[], object], processes: int = 1
) -> Ranks:
    """``cloob train``, in which something happens after a step."""
    from cloob.cli import main

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())

    def action() -> int:
        on_step = ProgressDisplay.on_step

        def with_event(self: ProgressDisplay, metrics: Mapping[str, Any]) -> None:
            on_step(self, metrics)
            if metrics["step"] == step:
                then()

        ProgressDisplay.on_step = with_event  # type: ignore[method-assign] # in a process of its own
        return main(["train", "--config", str(folder / "config.json")])

    ranks = fork(folder, processes, action)
    ranks.wait()
    return ranks


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_mount_that_dies_ends_the_run(base: TrainConfig, mount: Path, tmp_path: Path, processes: int) -> None:
    """The pictures are gone after step 3: batches without one usable pair count, and the limit ends the run."""
    config = base.override(data=[str(mount)], out=tmp_path / "run", epochs=30)
    ranks = trained_until(tmp_path / "first", config, 3, lambda: shutil.rmtree(mount, ignore_errors=True), processes)
    assert set(ranks.codes.values()) == {2}, ranks.told()
    said = ranks.outputs[0].read_text().splitlines()[-1]
    assert said.startswith(f"cloob: {mount}: 8 of 32 samples cannot be used, more than max_bad_fraction = 0.2 allows: ")
    assert "missing image (e.g. " in said
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("skipped") for line in found] == [None] * 3 + ["too few usable samples"]
    assert len(lines(tmp_path / "run" / "skipped.jsonl")) == 8
    # What was trained before is kept.
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


@pytest.mark.parametrize("held_out", [False, True])
def test_an_epoch_without_one_usable_pair_ends_the_run_whatever_the_limit(
    base: TrainConfig, mount: Path, pairs_folder: Path, tmp_path: Path, held_out: bool
) -> None:
    """With --max-bad-fraction 1: the second epoch's pictures, or all that are held out, are gone."""
    sources = {"data": [str(pairs_folder)], "val_data": [str(mount)]} if held_out else {"data": [str(mount)]}
    run = tmp_path / "run"
    config = base.override(**sources, out=run, epochs=30, batch_size=19, max_bad_fraction=1, save_every=0)
    ranks = trained_until(tmp_path / "first", config, 2, lambda: shutil.rmtree(mount))
    assert ranks.codes == {0: 2}, ranks.told()
    said = ranks.told().splitlines()[-1]
    kind = "held-out pairs" if held_out else "samples"
    assert said.startswith(
        f"cloob: {mount}: 38 of 38 {kind} cannot be used, which leaves none: 38 missing image (e.g. "
    )
    assert len(lines(run / "epochs.jsonl")) == (0 if held_out else 1)
    assert len(list_checkpoints(run)) == 1  # the first epoch's work is kept, whatever came after it
