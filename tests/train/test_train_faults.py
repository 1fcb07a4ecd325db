"""Processes that are killed, told to end, or lose a rank: real ones, with real signals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_helpers import Trained, exact, lines

from cloob.models.store import list_checkpoints
from cloob.train.config import TrainConfig
from cloob.train.loop import train

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--master-port={port}")


def wait_for_step(process: Any, run: Path, step: int, limit: float = 120) -> None:
    """Returns as soon as the log of ``run`` has this step."""
    end = time.monotonic() + limit
    while time.monotonic() < end and process.poll() is None:
        log = run / "metrics.jsonl"
        if log.is_file() and log.read_text().count("\n") >= step:
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"step {step} was not reached: {process.communicate()[0]}")


def test_kill_9_and_resume_gives_the_same_numbers(trained: Trained, launch: Callable[..., Any], tmp_path: Path) -> None:
    config = trained.config.override(out=tmp_path / "run", keep=2)
    chance = random.Random()
    step, delay = chance.randint(2, 11), chance.uniform(0, 0.1)
    print(f"killed after step {step} and {delay:.3f} s more")  # shown when the test fails
    process = launch({"config": config.to_dict(), "slow": 0.05})
    wait_for_step(process, config.save.out, step)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    done = len((config.save.out / "metrics.jsonl").read_text().splitlines())
    assert step <= done < 15
    train(config.override(resume="auto"))
    assert exact(config.save.out) == exact(trained.run)
    assert not list((config.save.out / "checkpoints").glob(".tmp-*"))


def test_sigterm_to_the_whole_process_group(trained: Trained, launch: Callable[..., Any], tmp_path: Path) -> None:
    """What a scheduler sends reaches the data workers as well: checkpoint, exit code 0, and the numbers go on."""
    config = trained.config.override(out=tmp_path / "run", save_every=100, workers=1)
    process = launch({"config": config.to_dict(), "slow": 0.05}, new_group=True)
    wait_for_step(process, config.save.out, 3)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    (saved,) = list_checkpoints(config.save.out)
    assert f"stopped=SIGTERM steps={int(saved.name[5:])}" in output and "Traceback" not in output
    train(config.override(resume="auto"))
    assert exact(config.save.out) == exact(trained.run)


def test_two_ranks(trained: Trained, launch: Callable[..., Any], tmp_path: Path) -> None:
    """Under torchrun: one rank killed and the run restarted; the numbers of one process; bad numbers on one rank."""
    common = trained.config.override(batch_size=10, epochs=3, keep=0, learnable_inv_tau=True)  # 4 steps an epoch
    names = ("whole", "killed", "stopped", "plain", "poisoned")
    whole, killed, stopped, plain, poisoned = (tmp_path / name for name in names)
    same = common.override(out=plain, model="nano-vit")

    def job(config: TrainConfig, **more: Any) -> dict[str, Any]:
        return {"config": config.override(resume="auto").to_dict(), **more}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = [part.format(port=free.getsockname()[1]) for part in TORCHRUN]
    kill_at = random.Random().randint(3, 11)
    print(f"rank 1 killed after step {kill_at}")
    process = launch(
        job(common.override(out=whole)),
        job(same),
        job(same.override(out=poisoned), poison=[5, 6]),
        job(common.override(out=stopped), stop_at=5),
        job(common.override(out=stopped)),
        job(common.override(out=killed), kill_at=kill_at),
        launcher=launcher,
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        pytest.fail(f"the ranks hang: {process.communicate(timeout=60)[0]}")
    assert process.returncode == 0, output

    # Killed, restarted by torchrun, resumed from the newest checkpoint: bit for bit the run that was left alone.
    assert [line["step"] for line in exact(whole)] == list(range(1, 13))
    assert exact(killed) == exact(whole)
    assert lines(whole / "epochs.jsonl")[0]["skipped"] == {"corrupt image": 1, "empty caption": 1}

    # One rank was told to end: both did after that step, with a checkpoint, and the next start went on from it.
    assert output.count("stopped=SIGTERM steps=5") == 2
    assert (stopped / "checkpoints" / "step-00000005").is_dir() and exact(stopped) == exact(whole)

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

    # Another number of processes goes on at the same samples.
    shutil.rmtree(plain / "checkpoints" / "step-00000012")
    train(same.override(resume="auto"))
    assert [line["samples_seen"] for line in exact(plain)] == [line["samples_seen"] for line in exact(alone.run)]
