"""`ContrastiveHeads` against a plain PyTorch loop, and the memory of `cloob train vectors` from mapped files.

    python benchmarks/vectors.py [--pairs N] [--epochs N] [--threads N] [--rows N] [--out FOLDER]

Each measurement is a process of its own. The plain loop has the same heads, objective, batches, optimiser and schedule;
neither holds pairs out. The two are timed in turn, so that a busy machine slows both: read the ratios.
Memory is what a run holds that is no page of a file (RssAnon), with two lengths of file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

WIDTH, BATCH, LR, WEIGHT_DECAY = 512, 256, 1e-3, 0.1
REPEATS = 3


def views(pairs: int) -> list[np.ndarray]:
    """Two noisy views of a hidden cause of 32 numbers."""
    rng = np.random.default_rng(0)
    cause = rng.standard_normal((pairs, 32), np.float32)
    noise = (rng.standard_normal((pairs, WIDTH), np.float32) for _ in "ab")
    return [cause @ rng.standard_normal((32, WIDTH), np.float32) + some for some in noise]


def estimator(pairs: int, epochs: int) -> dict[str, float]:
    from cloob import ContrastiveHeads

    a, b = views(pairs)
    heads = ContrastiveHeads(epochs=epochs, batch_size=BATCH, validation_fraction=0.0, device="cpu", random_state=0)
    began, worked = time.perf_counter(), time.process_time()
    heads.fit(a, b)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}


def plain(pairs: int, epochs: int) -> dict[str, float]:
    import torch
    from torch.nn import functional as F

    from cloob import Head, make_objective

    a, b = map(torch.from_numpy, views(pairs))
    began, worked = time.perf_counter(), time.process_time()
    of_a, of_b = Head(WIDTH, 256, "mlp", 0.1), Head(WIDTH, 256, "mlp", 0.1)
    of_a.fit(a)
    of_b.fit(b)
    objective = make_objective("infoloob", inv_tau=10.0)
    optimizer = torch.optim.AdamW([*of_a.parameters(), *of_b.parameters()], lr=LR, weight_decay=WEIGHT_DECAY)
    steps = pairs // BATCH
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    for _ in range(epochs):
        for rows in torch.randperm(pairs).split(BATCH)[:steps]:
            loss = objective(F.normalize(of_a(a[rows]), dim=1), F.normalize(of_b(b[rows]), dim=1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}


def memory(rows: int, folder: Path) -> dict[str, Any]:
    """The most of RssAnon in a run of 40 steps from two sparse files of float16, and the seconds to its first step."""
    import cloob
    from cloob.training.callbacks import Callback

    files = {}
    for name in "ab":
        files[name] = str(folder / f"{name}.npy")
        with Path(files[name]).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (rows, WIDTH)})
            file.truncate(file.tell() + 2 * rows * WIDTH)
    before, most, over = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            most[0] = max(most[0], _anonymous())

    class First(Callback):
        seconds = 0.0

        def on_step(self, metrics: Any) -> None:
            self.seconds = self.seconds or time.perf_counter() - began

    first, watcher = First(), threading.Thread(target=watch)
    watcher.start()
    config = cloob.get_recipe("vectors").override(**files, batch_size=BATCH, steps=40, val_split=0.0, patience=0)
    began = time.perf_counter()
    cloob.train(config.override(device="cpu", tensorboard=False, out=folder / "run"), callbacks=[first])
    over.set()
    watcher.join()
    return {"rows": rows, "before_mib": before, "most_mib": most[0], "first_step_seconds": first.seconds}


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def alone(*words: object) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--only", *map(str, words)], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=43_276)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vectors")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        what, size, epochs, threads = options.only[0], *map(int, options.only[1:])
        import torch

        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
            ways = {"plain": plain, "estimator": estimator}
            print(json.dumps(memory(size, Path(folder)) if what == "memory" else ways[what](size, epochs)))
        return
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "estimator": []}
    for _ in range(REPEATS):
        for name, found in runs.items():
            found.append(alone(name, options.pairs, options.epochs, options.threads))
            print(f"{name:10} {found[-1]['seconds']:7.1f} s, {found[-1]['cpu_seconds']:7.1f} s of a core", flush=True)
    ratios = {
        key: statistics.median(e[key] / p[key] for p, e in zip(runs["plain"], runs["estimator"], strict=True))
        for key in ("seconds", "cpu_seconds")
    }
    print("estimator / plain, median: " + ", ".join(f"{key} {ratio:.3f}" for key, ratio in ratios.items()))
    held = (
        [alone("memory", rows, 0, options.threads) for rows in (options.rows // 10, options.rows)]
        if options.rows
        else []
    )
    for each in held:
        print(", ".join(f"{key} {value:,.1f}" for key, value in each.items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    what = {"pairs": options.pairs, "epochs": options.epochs, "batch": BATCH, "threads": options.threads}
    record = {"machine": machine("numpy"), **what, "runs": runs, "ratios": ratios, "memory": held}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
