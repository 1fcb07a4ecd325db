"""The study of `auto`: two matrices of a package, judged by pairs no run has seen.

    python -m benchmarks.auto make --sets DIR [--data DIR]
    python -m benchmarks.auto run --sets DIR [--out FILE]
    python -m benchmarks.auto again --sets DIR [--out FILE]

`benchmarks/results/auto/study.md` was written before the first run and has tasks,
methods and bars. A record is a line of a file: a task with right or with 40 % wrong
pairs and a seed, so the study may be stopped at any time. `again` judges `auto` anew,
and InfoLOOB, by whose time its own is measured; records that have it are left alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

RECORDS = Path(__file__).parent / "results" / "auto" / "study.jsonl"
N_TRAIN = 1000
N_TEST = 600
SEEDS = (0, 1, 2)
WRONG = (0.0, 0.4)
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
        for train, *parts in zip(*self, strict=True):
            mean = train.mean(0)
            scale = train.std(0)
            one = np.sqrt(np.square(scale).mean())
            scale[scale <= 1e-6 * one] = one
            divisor = one if scaling == "one" else scale
            sides.append([(part - mean) / divisor for part in (train, *parts)])
        return Parts(*zip(*sides, strict=True))


Tried = Iterator[tuple[Rows, Rows]]
"""Rows in one space, of the pairs that choose and of those that judge."""


def recalls(a: Any, b: Any) -> list[float]:
    """Recall@1 and @10, the mean of both directions."""
    from cloob.functional.ranking import ranks

    x, y = (F.normalize(torch.as_tensor(side).float(), dim=1) for side in (a, b))
    places = torch.arange(len(x))
    both = torch.stack([ranks(x, y, places), ranks(y, x, places)])
    return [float((both < k).double().mean()) for k in (1, 10)]


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
            chooses = held_out[place] @ matrix, held_out[1 - place]
            yield chooses, (test[place] @ matrix, test[1 - place])


def turned(parts: Parts, scaling: str, widths: tuple[int, ...]) -> Tried:
    """Both sides by the singular vectors of their cross-covariance."""
    train, held_out, test = parts.scaled(scaling)
    u, s, vt = np.linalg.svd(train[0].T @ train[1], full_matrices=False)
    for width in widths:
        if width <= len(s):
            a = u[:, :width]
            b = vt[:width].T
            yield (held_out[0] @ a, held_out[1] @ b), (test[0] @ a, test[1] @ b)


def procrustes(parts: Parts) -> Tried:
    """All directions of rows scaled as one."""
    return turned(parts, "one", (min(side.shape[1] for side in parts.train),))


def pls(parts: Parts) -> Tried:
    """The strongest directions."""
    for scaling in SCALINGS:
        yield from turned(parts, scaling, WIDTHS)


def zoo(parts: Parts) -> Tried:
    """CCA and RidgeCCA of cca-zoo; up to 64 directions."""
    from cca_zoo.linear import CCA, RidgeCCA

    widths = [side.shape[1] for side in parts.train]
    size = min(64, *widths)
    for scaling in SCALINGS:
        train, held_out, test = parts.scaled(scaling)
        models = [RidgeCCA(size, shrinkage=share) for share in (0.1, 0.5, 0.9)]
        if scaling == "one" and len(train[0]) > max(widths):
            models.append(CCA(size))
        for model in models:
            model.fit([*train])
            yield model.transform([*held_out]), model.transform([*test])


class TwoTowers(torch.nn.Module):
    """Two MLPs and a temperature."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        layers = torch.nn.Linear, torch.nn.GELU
        self.heads = torch.nn.ModuleList(
            torch.nn.Sequential(layers[0](n, 512), layers[1](), layers[0](512, 256))
            for n in widths
        )
        self.scale = torch.nn.Parameter(torch.tensor(2.659))

    def forward(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        sides = zip(self.heads, rows, strict=True)
        return [F.normalize(head(side), dim=1) for head, side in sides]

    def loss(self, rows: list[torch.Tensor]) -> torch.Tensor:
        x, y = self(rows)
        logits = self.scale.exp() * x @ y.T
        right = torch.arange(len(x))
        return F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)


def loop(parts: Parts, seed: int) -> Tried:
    """What one writes in an hour: two MLPs, InfoNCE, AdamW, early stopping."""
    for scaling in SCALINGS:
        torch.manual_seed(seed)
        train, held_out, test = (
            [torch.from_numpy(side).float() for side in part]
            for part in parts.scaled(scaling)
        )
        model = TwoTowers([side.shape[1] for side in train])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        tried: list[Any] = []
        while len(tried) < 60 and not no_better(tried, 8):
            for rows in torch.randperm(len(train[0])).split(128):
                optimizer.zero_grad()
                model.loss([side[rows] for side in train]).backward()
                optimizer.step()
            with torch.no_grad():
                tried.append((model(held_out), model(test)))
        yield max(tried, key=lambda rows: sum(recalls(*rows[0])))


def no_better(tried: list[Any], patience: int) -> bool:
    """Whether the last epochs found nothing better than the one before them."""
    found = [sum(recalls(*chooses)) for chooses, _ in tried]
    return len(found) > patience and max(found[-patience:]) <= max(found[:-patience])


def seconds() -> float:
    """CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Cell:
    """One task with some wrong pairs, dealt by one seed."""

    def __init__(self, views: Rows, wrong: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(views[0]))
        n = min(N_TRAIN, len(order) * 2 // 3)
        train = order[:n]
        test = order[n : n + N_TEST]
        partners = train.copy()
        partners[: round(wrong * n)] = np.roll(train[: round(wrong * n)], 1)
        mixed = rng.permutation(n)
        self.seed = seed
        self.train = views[0][train[mixed]], views[1][partners[mixed]]
        self.test = views[0][test], views[1][test]
        self.record: dict[str, Any] = {"train": n, "test": len(test)}
        self.record |= {"recall": {}, "cpu_seconds": {}}

    def judged(self) -> dict[str, Any]:
        """The recalls and CPU seconds of all methods."""
        return self.judge(SHIPPED, others=True)

    def judge(self, shipped: Sequence[str], *, others: bool = False) -> dict[str, Any]:
        """The record, with what some methods find."""
        with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
            for name, side in zip("ab", self.train, strict=True):
                np.save(f"{folder}/{name}.npy", side)
            for objective in shipped:
                self.judge_shipped(objective, Path(folder))
            if others:
                self.judge_others(Path(folder))
        return self.record

    def add(self, name: str, began: float, recall: list[float]) -> None:
        self.record["recall"][name] = recall
        self.record["cpu_seconds"][name] = round(seconds() - began, 2)

    def judge_shipped(self, objective: str, folder: Path) -> None:
        import cloob

        config = cloob.get_recipe("vectors", objective=objective).override(
            a=f"{folder}/a.npy",
            b=f"{folder}/b.npy",
            device="cpu",
            out=f"{folder}/{objective}",
        )
        if not objective.endswith("cca"):
            config = config.override(seed=self.seed)
        began = seconds()
        run = cloob.train_heads(config).run
        took = seconds() - began
        heads = cloob.load_model(run).eval()
        rows = heads.encode_a(self.test[0]), heads.encode_b(self.test[1])
        self.add(objective, seconds() - took, recalls(*rows))
        if objective == "auto":
            decisions = json.loads((run / "decisions.json").read_text())
            self.record["joined"] = decisions.get("joined")

    def judge_others(self, folder: Path) -> None:
        from cloob.data.vectors import open_vector_pairs

        pairs = open_vector_pairs(a=f"{folder}/a.npy", b=f"{folder}/b.npy")
        rows = []
        for part in pairs.split(0.1):
            sides = part.batch(np.arange(len(part)))[:2]
            rows.append(tuple(side.double().numpy() for side in sides))
        test = tuple(side.astype(float) for side in self.test)
        parts = Parts(rows[0], rows[1], test)
        for method in (ridge, procrustes, pls, zoo):
            began = seconds()
            self.add(method.__name__, began, best(method(parts)))
        began = seconds()
        self.add("loop", began, best(loop(parts, self.seed)))


def make(folder: Path, data: Path | None) -> None:
    """Writes the sets that are not there."""
    from benchmarks.tasks import NEW, SETS, distinct

    folder.mkdir(parents=True, exist_ok=True)
    for name, views_of in SETS.items():
        file = folder / f"{name}.npz"
        if not file.is_file():
            a, b = views_of(data)
            if name in NEW:
                a, b = distinct(a, b)
            np.savez(file, a=a, b=b)


def run(folder: Path, out: Path) -> None:
    """Adds the records that are not there."""
    from benchmarks.tasks import SETS

    os.nice(5)
    lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    records = [json.loads(line) for line in lines]
    done = {(record["task"], record["wrong"], record["seed"]) for record in records}
    rows = np.random.default_rng(0).normal(size=(60, 4))
    Cell((rows, rows**3), 0.0, 0).judged()  # everything is imported
    for task, wrong, seed in itertools.product(SETS, WRONG, SEEDS):
        if (task, wrong, seed) in done:
            continue
        with np.load(folder / f"{task}.npz") as views:
            cell = Cell((views["a"], views["b"]), wrong, seed)
        record = {"task": task, "wrong": wrong, "seed": seed, **cell.judged()}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(task, wrong, seed, record["recall"], flush=True)


def again(folder: Path, out: Path) -> None:
    """Replaces what `auto` and InfoLOOB found in the records."""
    os.nice(5)
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    rows = np.random.default_rng(0).normal(size=(60, 4))
    Cell((rows, rows**3), 0.0, 0).judged()  # everything is imported
    for record in records:
        if record.get("again"):
            continue
        with np.load(folder / f"{record['task']}.npz") as views:
            cell = Cell((views["a"], views["b"]), record["wrong"], record["seed"])
        before = record["recall"]["infoloob"]
        cell.judge(("infoloob", "auto"))
        for key in ("recall", "cpu_seconds"):
            record[key] |= cell.record[key]
        record |= {"joined": cell.record["joined"], "again": True}
        lines = [json.dumps(one) + "\n" for one in records]
        out.write_text("".join(lines), encoding="utf-8")
        print(record["task"], record["wrong"], record["seed"], flush=True)
        if not np.allclose(record["recall"]["infoloob"], before):
            print(f"InfoLOOB was {before}, is {record['recall']['infoloob']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "run", "again"))
    parser.add_argument("--data", type=Path, help="the studies' folder, for pictograms")
    parser.add_argument("--sets", type=Path, help="where matrices are kept")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.command == "make":
        make(options.sets, options.data)
    elif options.command == "run":
        run(options.sets, options.out)
    else:
        again(options.sets, options.out)


if __name__ == "__main__":
    main()
