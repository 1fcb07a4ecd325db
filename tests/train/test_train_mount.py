"""Data that go away while a run reads them: a mount that dies, and batches without one usable pair."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import lines

from cloob.data.batch import Batch, Skip
from cloob.errors import InputError
from cloob.models.runs import list_checkpoints
from cloob.train.bad import BadSamples
from cloob.train.config import TrainConfig
from cloob.train.ranks import Tally
from cloob.train.state.checkpoint import Progress
from cloob.train.watch.log import ProgressDisplay, RunLog
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


@pytest.mark.parametrize("processes", [1, 2])
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


def test_held_out_pairs_that_are_gone_end_the_run(
    base: TrainConfig, mount: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    config = base.override(data=[str(pairs_folder)], val_data=[str(mount)], out=tmp_path / "run", epochs=30)
    ranks = trained_until(tmp_path / "first", config, 3, lambda: shutil.rmtree(mount))
    assert ranks.codes == {0: 2}, ranks.told()
    said = ranks.told().splitlines()[-1]
    assert said.startswith(f"cloob: {mount}: 38 of 38 held-out pairs cannot be used, more than max_bad_fraction = 0.2")
    named = [line for line in lines(tmp_path / "run" / "skipped.jsonl") if line.get("held_out")]
    assert len(named) == 38 and {line["reason"] for line in named} == {"missing image"}
    assert not (tmp_path / "run" / "epochs.jsonl").read_text()


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


def counted(folder: Path, pairs: int, *batches: tuple[int, int]) -> BadSamples:
    """The counts of an epoch with a limit of a tenth, after batches of so many good and bad samples."""
    bad = BadSamples(Progress(), "pairs", 0.1, pairs, RunLog(folder, None, writes=False))
    for samples, lost in batches:
        skips = tuple(Skip(str(n), "missing caption", "") for n in range(lost))
        batch = Batch(torch.empty(0), torch.empty(0), torch.empty(0), ("",) * samples, skips)
        bad.count(batch, Tally(samples, samples, lost, stop=False))
    return bad


def test_one_bad_file_of_many_stops_no_run_whose_epoch_is_within_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """24 of 400 samples lack a caption, and all of them come early."""
    counted(tmp_path, 400, (0, 16), (8, 8), *[(16, 0)] * 23).check(ended=True)
    (record,) = caplog.records
    assert record.message == (
        "pairs: 24 of 32 samples so far cannot be used; the run ends when more than 40 of an epoch cannot"
    )
    with pytest.raises(InputError, match=r"41 of 73 samples cannot be used, more than max_bad_fraction = 0\.1 "):
        counted(tmp_path, 400, (0, 16), (16, 24), (16, 1), (16, 0))
    with pytest.raises(InputError, match="24 of 112 samples cannot be used"):  # the epoch had no more
        counted(tmp_path, 112, (0, 16), (88, 8)).check(ended=True)


def test_a_thousand_bad_samples_in_a_row_count_by_the_epoch_so_far(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1024 of 9024 samples cannot be used"):
        counted(tmp_path, 10**6, (8000, 0), (0, 512), (0, 512))
    counted(tmp_path, 10**6, (8000, 0), (0, 512), (1, 511), (0, 512))  # not in a row
    counted(tmp_path, 10**6, (10**5, 0), (0, 512), (0, 512))  # a hundredth
