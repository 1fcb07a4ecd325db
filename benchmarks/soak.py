"""Memory of a long training, hour after hour: does anything grow?

``python benchmarks/soak.py [--minutes 120] [--data FOLDER]`` starts ``cloob train`` with what a run has (two workers,
augmentation, validation and a checkpoint each epoch, the log), lets it go on for that long, and ends it by SIGTERM as a
scheduler would. The training set is two shards, so that epochs, at whose ends most things are made and thrown away, are
many. Every ten seconds the whole family of processes is looked at: memory that is theirs (anonymous and shared, each
page counted once: what files are mapped does not count), open descriptors, threads.

Prints the medians of the tenths of the time, and by how much memory grows in a thousand steps from the second tenth on
(the first has the warm-up in it): the slope between all pairs of samples, median (Theil and Sen), which some peaks do
not bend. Writes results.json to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine

SECONDS = 10.0
PARTS = 10
DATA = Path(__file__).parents[2] / "shared" / "data" / "pictograms"


def command(data: Path, model: str, out: Path) -> list[str]:
    options = {
        "data": data / "train" / "{00000..00001}.tar",
        "val-data": data / "val",
        "model": model,
        "objective": "cloob",
        "batch-size": 128,
        "workers": 2,
        "epochs": 100_000,
        "device": "cpu",
        "out": out,
    }
    return [
        sys.executable,
        "-m",
        "cloob",
        "train",
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
    ]


def own_memory(process: psutil.Process) -> int:
    """Bytes of anonymous and shared memory, a shared page divided by those who share it."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return sum(int(found[key].split()[0]) * 1024 for key in ("Pss_Anon", "Pss_Shmem"))


def sample(parent: psutil.Process) -> dict[str, int]:
    """Of the process and all that it has started; one that ends meanwhile is left out."""
    total = {"memory": 0, "descriptors": 0, "threads": 0, "processes": 0}
    for process in (parent, *parent.children(recursive=True)):
        try:
            one = own_memory(process), process.num_fds(), process.num_threads()
        except (psutil.Error, OSError):
            continue
        for key, value in zip(total, (*one, 1), strict=True):
            total[key] += value
    return total


def steps_taken(out: Path) -> tuple[int, int]:
    """Steps and epochs by the last whole line of the log."""
    file = out / "metrics.jsonl"
    if not file.is_file():
        return 0, 0
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - 4096))
        lines = log.read().split(b"\n")[:-1]
    last = json.loads(lines[-1]) if lines else {}
    return last.get("step", 0), last.get("epoch", 0)


def watch(arguments: argparse.Namespace, out: Path) -> tuple[list[dict[str, float]], int]:
    """The samples, and the code with which the training ended."""
    with (out.parent / "log.txt").open("wb") as log:
        training = subprocess.Popen(
            command(arguments.data, arguments.model, out),
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        parent, began, samples = psutil.Process(training.pid), time.monotonic(), []
        while training.poll() is None and time.monotonic() - began < arguments.minutes * 60:
            time.sleep(SECONDS)
            steps, epoch = steps_taken(out)
            samples.append(
                {"seconds": round(time.monotonic() - began), "steps": steps, "epoch": epoch} | sample(parent)
            )
        if training.poll() is None:
            training.send_signal(signal.SIGTERM)
        return samples, training.wait()


def growth(samples: list[dict[str, float]]) -> float:
    """MB a thousand steps: the median slope of all pairs of samples."""
    slopes = [
        (b["memory"] - a["memory"]) / (b["steps"] - a["steps"])
        for a, b in combinations(samples, 2)
        if b["steps"] > a["steps"]
    ]
    return statistics.median(slopes) / 1e6 * 1000


def tenths(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    rows = []
    for part in range(PARTS):
        some = samples[part * len(samples) // PARTS : (part + 1) * len(samples) // PARTS]
        row = {key: statistics.median(one[key] for one in some) for key in ("memory", "descriptors", "threads")}
        rows.append(
            {"minutes": some[-1]["seconds"] / 60, "steps": some[-1]["steps"], "epoch": some[-1]["epoch"], **row}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with train/*.tar and val/")
    parser.add_argument("--model", default="tiny-resnet")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        raise SystemExit(f"{arguments.data}: no such folder; --data names the pictograms")
    with tempfile.TemporaryDirectory() as folder:
        samples, code = watch(arguments, Path(folder) / "run")
        told = (Path(folder) / "log.txt").read_text(encoding="utf-8", errors="replace")
    if code or len(samples) < 2 * PARTS:
        raise SystemExit(f"the training ended with {code} after {len(samples)} samples:\n{told[-3000:]}")
    rows, slope = tenths(samples), growth(samples[len(samples) // PARTS :])
    print("| minutes | steps | epochs | memory, MB | descriptors | threads |\n|---|---|---|---|---|---|")
    for row in rows:
        numbers = row["minutes"], row["steps"], row["epoch"], row["memory"] / 1e6, row["descriptors"], row["threads"]
        print("| " + " | ".join(f"{number:,.0f}" for number in numbers) + " |")
    print(f"\n{slope:+.3f} MB a thousand steps, after the first tenth")
    about: dict[str, Any] = machine() | {"model": arguments.model, "minutes": arguments.minutes}
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "growth_mb_a_thousand_steps": round(slope, 4), "tenths": rows, "samples": samples}
    (arguments.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
