"""`ContrastiveHeads` against a plain PyTorch loop, and the memory of `cloob train
vectors` from mapped files.

    python benchmarks/vectors.py [--pairs N] [--epochs N] [--threads N] [--rows N]
    [--out FOLDER]

Each measurement is a process of its own. The plain loop has the same heads, objective,
batches, optimiser and schedule; neither holds pairs out, and each has done a small run
before, which imports what it needs. The two are timed in turn, so that a busy machine
slows both: read the ratios, first those of CPU seconds. Memory is the most that a run
holds that is no page of a file (RssAnon), with two lengths of file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

WIDTH = 512
BATCH = 256
REPEATS = 3


def views(pairs: int) -> list[np.ndarray]:
    """Two noisy views of a hidden cause of 32 numbers."""
    rng = np.random.default_rng(0)
    cause = rng.standard_normal((pairs, 32), np.float32)
    noise = (rng.standard_normal((pairs, WIDTH), np.float32) for _ in "ab")
    return [
        cause @ rng.standard_normal((32, WIDTH), np.float32) + some for some in noise
    ]


def estimator(a: np.ndarray, b: np.ndarray, epochs: int) -> None:
    from cloob import ContrastiveHeads

    heads = ContrastiveHeads(
        "infoloob",
        epochs=epochs,
        batch_size=BATCH,
        validation_fraction=0.0,
        device="cpu",
    )
    heads.set_params(random_state=0).fit(a, b)


def plain(of_a: np.ndarray, of_b: np.ndarray, epochs: int) -> None:
    import torch
    from torch.nn import functional as F

    from cloob import Head, make_objective

    a = torch.from_numpy(of_a)
    b = torch.from_numpy(of_b)
    head_a = Head(WIDTH, 256, "mlp", 0.1)
    head_b = Head(WIDTH, 256, "mlp", 0.1)
    head_a.fit(a)
    head_b.fit(b)
    objective = make_objective("infoloob", inv_tau=10.0)
    optimizer = torch.optim.AdamW(
        [*head_a.parameters(), *head_b.parameters()], lr=1e-3, weight_decay=0.1
    )
    steps = len(a) // BATCH
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(a)).split(BATCH)[:steps]:
            loss = objective(
                F.normalize(head_a(a[rows]), dim=1), F.normalize(head_b(b[rows]), dim=1)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()


def mapped(rows: int, folder: Path) -> None:
    """Forty steps from two sparse files of float16."""
    import cloob

    files = {name: str(folder / f"{name}.npy") for name in "ab"}
    for file in map(Path, files.values()):
        with file.open("wb") as whole:
            np.lib.format.write_array_header_1_0(
                whole, {"descr": "<f2", "fortran_order": False, "shape": (rows, WIDTH)}
            )
            whole.truncate(whole.tell() + 2 * rows * WIDTH)
    config = cloob.get_recipe("vectors", objective="infoloob").override(
        **files, batch_size=BATCH, epochs=1
    )
    config = config.override(val_split=0.0, patience=0)
    cloob.train_heads(config.override(device="cpu", out=folder / "run"))


def alone(*words: object) -> dict[str, float]:
    """One measurement in a process of its own, whose memory is looked at meanwhile."""
    command = [sys.executable, __file__, "--only", *map(str, words)]
    most = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            status = (
                Path(f"/proc/{process.pid}/status")
                .read_text(encoding="utf-8")
                .splitlines()
            )
            most = max(
                [
                    most,
                    *(
                        int(line.split()[1]) / 1024
                        for line in status
                        if line.startswith("RssAnon")
                    ),
                ]
            )
            time.sleep(0.05)
        assert process.stdout is not None
        assert process.returncode == 0
        found = dict(json.loads(process.stdout.read().splitlines()[-1])) | {
            "anonymous_mib": round(most)
        }
    print(*words, found, flush=True)
    return found


def measured(what: str, size: int, epochs: int, threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    arguments: Any = (size,) if what == "mapped" else (*views(size), epochs)
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
        ways = {
            "plain": plain,
            "estimator": estimator,
            "mapped": lambda rows: mapped(rows, Path(folder)),
        }
        if what != "mapped":
            ways[what](*views(2 * BATCH), 1)
        began = time.perf_counter()
        worked = time.process_time()
        ways[what](*arguments)
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - worked,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("pairs", 43_276),
        ("epochs", 10),
        ("threads", 2),
        ("rows", 10_000_000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "vectors"
    )
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(options.only[0], *map(int, options.only[1:]))))
        return
    what = (options.pairs, options.epochs, options.threads)
    ways = ("plain", "estimator")
    runs = [{way: alone(way, *what) for way in ways} for _ in range(REPEATS)]
    keys = ("seconds", "cpu_seconds")
    ratios = {
        key: statistics.median(
            run["estimator"][key] / run["plain"][key] for run in runs
        )
        for key in keys
    }
    print("estimator / plain, medians:", ratios)
    held = {
        rows: alone("mapped", rows, 0, options.threads)
        for rows in (options.rows // 10, options.rows)
        if rows
    }
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine("numpy"),
        **dict(zip(("pairs", "epochs", "threads"), what, strict=True)),
    }
    text = json.dumps(
        {**record, "runs": runs, "ratios": ratios, "mapped": held}, indent=1
    )
    (options.out / "results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
