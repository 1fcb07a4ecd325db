"""Processes that are killed, told to end, or lose a rank: real ones, with real signals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import At, Poison, Trained, exact, lines

from cloob.distributed import process_group
from cloob.errors import InputError
from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.resume import find_checkpoint
from make import write_tar
from support import fork


def test_sigterm_to_the_whole_process_group(trained: Trained, tmp_path: Path) -> None:
    """What a scheduler sends reaches the data workers as well: checkpoint, exit code 0, and the numbers go on."""
    config = trained.config.override(out=tmp_path / "run", save_every=100, workers=1)

    def slowly() -> None:
        os.setsid()
        result = train(config, callbacks=[At(None, lambda: time.sleep(0.25))])
        print(f"stopped={result.stopped} steps={result.steps}")

    ranks = fork(tmp_path, 1, slowly)
    log = config.save.out / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert not ranks.poll() and time.monotonic() < end, ranks.told()
        time.sleep(0.01)
    os.killpg(ranks.pids[0], signal.SIGTERM)
    assert ranks.wait(60) == [0], ranks.told()
    (saved,) = list_checkpoints(config.save.out)
    assert f"stopped=SIGTERM steps={int(saved.name[5:])}" in ranks.told() and "Traceback" not in ranks.told()
    train(config.override(resume="auto"))
    assert exact(config.save.out) == exact(trained.run)


def learned(trained: Trained) -> TrainConfig:
    """12 steps of two ranks with a learned τ⁻¹."""
    return trained.config.override(batch_size=10, epochs=3, keep=0, learnable_inv_tau=True, scale="unit", resume="auto")


def test_two_ranks(trained: Trained, tmp_path: Path) -> None:
    """The numbers of one process; one rank that is told to end; bad numbers on one rank."""
    same = learned(trained).override(model="nano-vit", epochs=2, save_every=0)  # 4 steps an epoch
    plain, poisoned, stopped = (tmp_path / name for name in ("plain", "poisoned", "stopped"))

    def stop() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    def all_runs() -> None:
        with process_group(torch.device("cpu")):
            for out, trouble in ((plain, []), (poisoned, [Poison(5, 6)]), (stopped, [At(5, stop)]), (stopped, [])):
                result = train(same.override(out=out), callbacks=trouble)
                print(f"stopped={result.stopped} steps={result.steps}")

    ranks = fork(tmp_path / "ranks", 2, all_runs)
    assert ranks.wait(200) == [0, 0], ranks.told()
    assert lines(plain / "epochs.jsonl")[0]["skipped"] == {"corrupt image": 1, "empty caption": 1}
    told = sum(sum(line["skipped"].values()) for line in lines(plain / "epochs.jsonl"))
    readers = [line["rank"] for line in lines(plain / "skipped.jsonl")]
    assert len(readers) == told and set(readers) == {0, 1}  # each is named, whichever rank read it
    assert ranks.told().count("stopped=SIGTERM steps=5") == 2 and exact(stopped) == exact(plain)

    # Two ranks with half a batch each are one process with the whole batch, gradients and τ⁻¹ included.
    alone = train(same.override(out=tmp_path / "alone"))
    for here, there in zip(exact(plain), exact(alone.run), strict=True):
        for key in ("loss", "grad_norm", "inv_tau"):
            assert here[key] == pytest.approx(there[key], rel=2e-3), (here["step"], key)
        assert here["samples_seen"] == there["samples_seen"]
    assert exact(plain)[0]["loss"] == pytest.approx(exact(alone.run)[0]["loss"], rel=1e-5)
    assert exact(plain)[-1]["inv_tau"] != pytest.approx(30, rel=1e-4)

    # NaN in the last rank's weights: every rank skips step 6, the keys of both are written, and training goes on.
    assert exact(poisoned)[:5] == exact(plain)[:5]
    assert [line["step"] for line in lines(poisoned / "metrics.jsonl") if line.get("skipped")] == [6]
    keys = json.loads((poisoned / "nonfinite-step-6.json").read_text())["keys"]
    assert len(set(keys)) == len(keys) == exact(plain)[5]["samples_seen"] - exact(plain)[4]["samples_seen"]
    assert exact(poisoned)[-1]["loss"] is not None


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_bad_pairs_of_shards_are_left_out_and_named(
    trained: Trained, pairs_folder: Path, tmp_path: Path, workers: int
) -> None:
    """In each epoch once; the second shard is cut in its middle."""
    good = {f"{c}{t}": (pairs_folder / f"{c}{t}.png").read_bytes() for c in (0, 2, 3) for t in range(7)}
    files = {f"{stem}.{end}": data for stem, image in good.items() for end, data in (("png", image), ("txt", b"word"))}
    bad = {"90.png": good["00"][:500], "90.txt": b"cut", "91.png": good["00"], "92.txt": b"no picture"}
    bad |= {"93.png": good["00"], "93.txt": b" \n "}
    names = sorted(files)
    write_tar(tmp_path / "shards" / "00000.tar", {**{name: files[name] for name in names[:28]}, **bad})
    shard = write_tar(tmp_path / "shards" / "00001.tar", {name: files[name] for name in names[28:]})
    os.truncate(shard, shard.stat().st_size // 2)
    expected = {"00000.tar/90": "corrupt image", "00000.tar/91": "missing caption", "00000.tar/92": "missing image"}
    expected |= {"00000.tar/93": "empty caption", "00001.tar": "truncated shard"}
    config = trained.config.override(
        data=[str(tmp_path / "shards")], max_bad_fraction=0.5, epochs=2, batch_size=3, save_every=0
    )
    result = train(config.override(out=tmp_path / "run", workers=workers))
    for epoch in (1, 2):
        named = [x for x in lines(result.run / "skipped.jsonl") if x["epoch"] == epoch]
        found = {x["key"]: x["reason"] for x in named}
        # One may be in the incomplete last batch, which never reaches the loss.
        assert len(found) == len(named) >= len(expected) - 1 and found.items() <= expected.items()
        (told,) = (line["skipped"] for line in lines(result.run / "epochs.jsonl") if line["epoch"] == epoch)
        assert told == dict.fromkeys(found.values(), 1)
        assert all(set(x) == {"step", "epoch", "rank", "key", "reason", "detail"} for x in named)
    with pytest.raises(InputError, match=r"shards: \d of \d+ samples cannot be used.*00001\.tar") as error:
        train(config.override(out=tmp_path / "strict", max_bad_fraction=0.05))
    assert "\n" not in str(error.value)


def test_ranks_that_find_other_pairs_are_refused(trained: Trained, pairs_folder: Path, tmp_path: Path) -> None:
    """A table that is still on its way to one of two hosts: one that lacks a row, and one of as many others."""
    rows = [f"{pairs_folder}/{n:02}.png,caption {n}\n" for n in range(24)]
    for name, own in (("whole", rows), ("fewer", rows[:-1]), ("others", [*rows[1:], rows[0]])):
        (tmp_path / f"{name}.csv").write_text("filepath,title\n" + "".join(own))

    def run() -> None:
        os.environ["LOCAL_RANK"] = "0"  # a host each
        for there in ("fewer", "others"):
            here = tmp_path / f"{there if os.environ['RANK'] == '1' else 'whole'}.csv"
            with pytest.raises(InputError) as error:
                train(trained.config.override(data=[str(here)], out=tmp_path / "run"))
            print(str(error.value).partition(": ")[2])

    ranks = fork(tmp_path / "ranks", 2, run)
    assert ranks.wait() == [0, 0], ranks.told()
    for output in ranks.outputs:
        found = [
            line for line in output.read_text().splitlines() if line.startswith("rank 1 finds other data than rank 0")
        ]
        assert "(23 pairs, not 24" in found[0] and len(found) == 2
    assert not (tmp_path / "run").exists()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the worker in Linux' /proc")
def test_a_data_worker_that_dies(trained: Trained, tmp_path: Path) -> None:
    """kill -9 to the data worker of one of two ranks: both end at once, in one line that names it, with exit code 1."""
    from cloob.cli import main

    run = tmp_path / "run"
    config = trained.config.override(out=run, epochs=100_000, keep=2, workers=1, batch_size=10)
    (tmp_path / "config.json").write_text(config.to_json())
    ranks = fork(tmp_path, 2, lambda: main(["train", "--config", str(tmp_path / "config.json")]))
    end = time.monotonic() + 120
    while not ((run / "checkpoints").is_dir() and len(list_checkpoints(run)) >= 2):
        assert not ranks.poll() and time.monotonic() < end, ranks.told()
        time.sleep(0.01)
    (worker,) = children(ranks.pids[1])
    os.kill(worker, signal.SIGKILL)
    assert ranks.wait(60) == [1, 1], ranks.told()
    for output in ranks.outputs:
        (said,) = [
            line for line in output.read_text().splitlines() if line.startswith("cloob: ") and "data worker" in line
        ]
        assert f"rank 1: data worker {worker} died" in said and "the last checkpoint is" in said
        assert "go on with --resume auto" in said and "Traceback" not in output.read_text()
    found = find_checkpoint(run, "auto")
    assert found is not None and str(found.path) in said


def test_another_rank_s_defect_ends_all_with_its_name(trained: Trained, tmp_path: Path) -> None:
    """An error in one rank's loader (a defect, so with its traceback there) reaches the others as one line."""
    from cloob.data.loader import PairLoader

    def broken() -> None:
        epoch = PairLoader.epoch

        def failing(self: PairLoader, *arguments: Any, **more: Any) -> Any:
            for n, batch in enumerate(epoch(self, *arguments, **more)):
                if n == 3 and os.environ["RANK"] == "1":
                    raise ValueError("the transform gave (3, 31, 31)")
                yield batch

        PairLoader.epoch = failing  # type: ignore[method-assign] # in a process of its own
        train(trained.config.override(out=tmp_path / "run"))

    ranks = fork(tmp_path, 2, broken)
    assert ranks.wait() == [1, 1], ranks.told()
    first, second = (path.read_text() for path in ranks.outputs)
    assert "TrainingFailed: rank 1: ValueError: the transform gave (3, 31, 31); the last checkpoint is " in first
    assert "Traceback" in second and "in failing" in second
