"""The study of `auto`: two matrices of a package, judged by pairs no run has seen.

    python benchmarks/auto.py make --sets DIR [--data DIR]
    python benchmarks/auto.py run --sets DIR [--out FILE]
    python benchmarks/auto.py table [--out FILE]

`benchmarks/results/auto/study.md` was written before the first run and has tasks,
methods and bars. A record is a line of a file: a task with right or with 40 % wrong
pairs and a seed, so the study may be stopped at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
N_TRAIN, N_TEST, SEEDS, WRONG = 1000, 600, (0, 1, 2), (0.0, 0.4)
SHIPPED = ("auto", "infoloob", "clip", "cloob", "cca", "kcca")
SCALINGS = ("one", "column")
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
WIDTHS = (4, 8, 16, 32, 64, 128, 256)
Rows = tuple[np.ndarray, np.ndarray]


class Parts(NamedTuple):
    """Rows of a and b: those to train on, those that choose, those that judge."""

    train: Rows
    held_out: Rows
    test: Rows

    def scaled(self, scaling: str) -> Parts:
        """Without the mean of the training rows, divided by one number or each column
        by its deviation.
        """
        sides = []
        for place in (0, 1):
            mean, std = self.train[place].mean(0), self.train[place].std(0)
            one = np.sqrt(np.square(std).mean())
            scale = np.where(std > 1e-6 * one, std, one) if scaling == "column" else one
            sides.append([(part[place] - mean) / scale for part in self])
        return Parts(*zip(*sides, strict=True))


Tried = Iterator[tuple[Rows, Rows]]
"""Rows in one space, of the pairs that choose and of those that judge."""


def recalls(x: Any, y: Any) -> list[float]:
    """Recall@1 and @10, the mean of both directions."""
    import torch

    from cloob.functional.ranking import ranks

    rows = [
        torch.nn.functional.normalize(torch.as_tensor(side).float(), dim=1)
        for side in (x, y)
    ]
    places = torch.arange(len(rows[0]))
    both = [ranks(one, other, places) for one, other in (rows, rows[::-1])]
    return [
        statistics.mean(float((found < k).double().mean()) for found in both)
        for k in (1, 10)
    ]


def best(tried: Tried) -> list[float]:
    """The recalls of what finds most of the pairs that choose."""
    return recalls(*max(tried, key=lambda rows: sum(recalls(*rows[0])))[1])


def ridge(parts: Parts) -> Tried:
    """Ridge regression of each side into the other."""
    for scaling, place in itertools.product(SCALINGS, (0, 1)):
        train, held_out, test = parts.scaled(scaling)
        u, s, vt = np.linalg.svd(train[place], full_matrices=False)
        coefficients = u.T @ train[1 - place]
        for strength in STRENGTHS:
            shrunk = s / (s**2 + strength * len(u))
            matrix = vt.T @ (shrunk[:, None] * coefficients)
            yield (
                (held_out[place] @ matrix, held_out[1 - place]),
                (test[place] @ matrix, test[1 - place]),
            )


def turned(parts: Parts, scaling: str, widths: tuple[int, ...]) -> Tried:
    """Both sides by the singular vectors of their cross-covariance."""
    train, held_out, test = parts.scaled(scaling)
    u, _, vt = np.linalg.svd(train[0].T @ train[1], full_matrices=False)
    for width in widths:
        a, b = u[:, :width], vt[:width].T
        if width <= u.shape[1] or len(widths) == 1:
            yield (held_out[0] @ a, held_out[1] @ b), (test[0] @ a, test[1] @ b)


def procrustes(parts: Parts) -> Tried:
    """All directions of rows scaled as one."""
    return turned(parts, "one", (max(WIDTHS) * 8,))


def pls(parts: Parts) -> Tried:
    """The strongest directions."""
    for scaling in SCALINGS:
        yield from turned(parts, scaling, WIDTHS)


def zoo(parts: Parts) -> Tried:
    """CCA and RidgeCCA of cca-zoo; up to 64 directions."""
    from cca_zoo.linear import CCA, RidgeCCA

    size = min(64, *(side.shape[1] for side in parts.train))
    for scaling in SCALINGS:
        train, held_out, test = parts.scaled(scaling)
        models = [RidgeCCA(size, shrinkage=share) for share in (0.1, 0.5, 0.9)]
        if scaling == "one" and len(train[0]) > max(len(side.T) for side in train):
            models.append(CCA(size))
        for model in models:
            model.fit([*train])
            yield model.transform([*held_out]), model.transform([*test])


def loop(parts: Parts, seed: int) -> Tried:
    """What one writes in an hour: two MLPs, InfoNCE with a learned temperature, early
    stopping.
    """
    import torch

    def cross_entropy(heads: Any, scale: Any, rows: Any) -> Any:
        x, y = embedded(heads, rows)
        logits, right = scale.exp() * x @ y.T, torch.arange(len(x))
        both = [torch.nn.functional.cross_entropy(z, right) for z in (logits, logits.T)]
        return sum(both)

    def embedded(heads: Any, rows: Any) -> list[Any]:
        return [
            torch.nn.functional.normalize(head(side), dim=1)
            for head, side in zip(heads, rows, strict=True)
        ]

    for scaling in SCALINGS:
        torch.manual_seed(seed)
        train, held_out, test = (
            [torch.from_numpy(side).float() for side in part]
            for part in parts.scaled(scaling)
        )
        heads = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(side.shape[1], 512),
                torch.nn.GELU(),
                torch.nn.Linear(512, 256),
            )
            for side in train
        )
        scale = torch.nn.Parameter(torch.tensor(2.659))
        weights = [*heads.parameters(), scale]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1)
        best_recall, best_epoch, tried = -1.0, 0, None
        for epoch in range(60):
            for rows in torch.randperm(len(train[0])).split(128):
                optimizer.zero_grad()
                cross_entropy(heads, scale, [side[rows] for side in train]).backward()
                optimizer.step()
            with torch.no_grad():
                chooses = embedded(heads, held_out)
                recall = sum(recalls(*chooses))
                if recall > best_recall:
                    best_recall, best_epoch = recall, epoch
                    tried = chooses, embedded(heads, test)
            if epoch - best_epoch >= 8:
                break
        assert tried is not None
        yield tried


def seconds() -> float:
    """CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def judged(views: Rows, wrong: float, seed: int) -> dict[str, Any]:
    """The recalls and CPU seconds of all methods."""
    import cloob
    from cloob.data.vectors import open_vector_pairs

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(views[0]))
    n = min(N_TRAIN, len(order) * 2 // 3)
    train, test = order[:n], order[n : n + N_TEST]
    partners = train.copy()
    partners[: round(wrong * n)] = np.roll(train[: round(wrong * n)], 1)
    mixed = rng.permutation(n)
    tests = views[0][test], views[1][test]
    recall: dict[str, list[float]] = {}
    cpu: dict[str, float] = {}
    joined = None

    def record(name: str, run: Callable[[], list[float]]) -> None:
        began = seconds()
        recall[name] = run()
        cpu[name] = round(seconds() - began, 2)

    with tempfile.TemporaryDirectory(prefix="cloob-") as place:
        np.save(f"{place}/a.npy", views[0][train[mixed]])
        np.save(f"{place}/b.npy", views[1][partners[mixed]])
        files = {"a": f"{place}/a.npy", "b": f"{place}/b.npy"}
        for objective in SHIPPED:
            config = cloob.get_recipe("vectors", objective=objective).override(
                **files, device="cpu", out=f"{place}/{objective}"
            )
            if not objective.endswith("cca"):
                config = config.override(seed=seed)
            began = seconds()
            run = cloob.train_heads(config).run
            cpu[objective] = round(seconds() - began, 2)
            heads = cloob.load_model(run).eval()
            recall[objective] = recalls(
                heads.encode_a(tests[0]), heads.encode_b(tests[1])
            )
            if objective == "auto":
                decisions = json.loads((run / "decisions.json").read_text())
                joined = decisions.get("joined")
        split = open_vector_pairs(**files).split(0.1)
        known = [part.batch(np.arange(len(part)))[:2] for part in split]
        rows = [tuple(side.double().numpy() for side in part) for part in known]
        parts = Parts(*rows, tuple(side.astype(float) for side in tests))
        for name, tried in {
            "ridge": ridge,
            "procrustes": procrustes,
            "pls": pls,
            "zoo": zoo,
        }.items():
            record(name, lambda tried=tried: best(tried(parts)))
        record("loop", lambda: best(loop(parts, seed)))
    return {
        "train": n,
        "test": len(test),
        "joined": joined,
        "recall": recall,
        "cpu_seconds": cpu,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Recall@1 in %, means of the seeds; the last columns are `auto` less the best
    other one, and its CPU time over InfoLOOB's.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        name = record["task"] + (", 40 % wrong" if record["wrong"] else "")
        tasks.setdefault(name, []).append(record)
    methods = list(records[0]["recall"])
    last = ["auto less the best other", "CPU: auto / InfoLOOB", "seeds"]
    lines = [["", *methods, *last], ["---"] * (len(methods) + 4)]
    for name, seeds in tasks.items():
        means = {
            method: 100 * statistics.mean(each["recall"][method][0] for each in seeds)
            for method in methods
        }
        gap = means["auto"] - max(means[method] for method in methods[1:])
        times = [each["cpu_seconds"] for each in seeds]
        ratio = statistics.median(each["auto"] / each["infoloob"] for each in times)
        cells = [f"{means[method]:.1f}" for method in methods]
        lines.append([name, *cells, f"{gap:+.1f}", f"{ratio:.1f}", str(len(seeds))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "run", "table"))
    parser.add_argument("--data", type=Path, help="the studies' folder, for pictograms")
    parser.add_argument("--sets", type=Path, help="where matrices are kept")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "auto" / "study.jsonl"
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    text = options.out.read_text(encoding="utf-8") if options.out.is_file() else ""
    records = [json.loads(line) for line in text.splitlines()]
    if options.command == "table":
        print(table(records))
    elif options.command == "make":
        make(options.sets, options.data)
    else:
        run(options.sets, options.out, records)


def make(folder: Path, data: Path | None) -> None:
    """Writes the sets that are not there."""
    from benchmarks.tasks import NEW, SETS, distinct

    folder.mkdir(parents=True, exist_ok=True)
    for name, views_of in SETS.items():
        file = folder / f"{name}.npz"
        if not file.is_file():
            views = views_of(data)
            a, b = distinct(views) if name in NEW else views
            np.savez(file, a=a, b=b)


def run(folder: Path, out: Path, records: list[dict[str, Any]]) -> None:
    """Adds the records that are not there."""
    from benchmarks.tasks import SETS

    os.nice(5)
    done = {(record["task"], record["wrong"], record["seed"]) for record in records}
    rng = np.random.default_rng(0)
    first = rng.normal(size=(60, 4))
    judged((first, first + rng.normal(size=(60, 4))), 0.0, 0)  # what is imported
    for task, wrong, seed in itertools.product(SETS, WRONG, SEEDS):
        if (task, wrong, seed) in done:
            continue
        with np.load(folder / f"{task}.npz") as views:
            record = judged((views["a"], views["b"]), wrong, seed)
        with out.open("a", encoding="utf-8") as file:
            cell = {"task": task, "wrong": wrong, "seed": seed}
            file.write(json.dumps(cell | record) + "\n")
        first_recall = {k: round(100 * v[0], 1) for k, v in record["recall"].items()}
        print(task, wrong, seed, first_recall, record["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
