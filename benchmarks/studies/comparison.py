"""The statistics of the tables, and one method − another on the test sets, paired by
seed and by picture.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.studies.records import unpack_bits


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean: what other seeds would give.

    NaN for fewer than two values.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(n)
    half = float(t.ppf((1 + level) / 2, n - 1)) * error
    return mean - half, mean + half


def picture_interval(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], level: float = 0.95
) -> tuple[float, float]:
    """Student's interval of the mean of the groups' means: what other classes and
    pictures would give.

    The pictures of a class share one embedding of its name, so it is the classes that
    are independent: the variance of a mean of n pictures in C classes is C / (C − 1) ·
    Σ_c (Σ_{i in c} (d_i − d̄))² / n², with C − 1 degrees of freedom; those of a sum of
    such variances are Satterthwaite's, (Σ v)² / Σ v² / (C − 1).

    Args:
        groups: For each test set, each picture's difference between two methods,
            averaged over the seeds; its class.
        level: Coverage.
    """
    from scipy.stats import t

    mean = float(np.mean([d.mean() for d, _ in groups]))
    variances = []
    freedoms = []
    for d, labels in groups:
        _, classes = np.unique(labels, return_inverse=True)
        sums = np.bincount(classes, d - d.mean())
        freedoms.append(len(sums) - 1)
        variances.append(
            len(sums)
            / (len(sums) - 1)
            * float((sums**2).sum())
            / len(d) ** 2
            / len(groups) ** 2
        )
    variance = sum(variances)
    if variance == 0:
        return mean, mean
    freedom = variance**2 / sum(
        v**2 / f for v, f in zip(variances, freedoms, strict=True)
    )
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return mean - half, mean + half


def sign_test(wins: int, losses: int) -> float:
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1))
    return min(1.0, 2.0 * tail / 2.0**n)


ZEROSHOT = (
    "noto-emoji",
    "fluent3d-emoji",
    "twemoji-activities",
    "road-signs",
    "flags",
    "tuxpaint-photos",
    "animal-silhouettes",
    "digits",
)
LEVEL = 0.01
"""Of the test whether a method is above chance."""
_TIE = 1e-9
"""Below it a difference is zero: a mean over seeds or towers need not cancel to the
last bit.
"""
Record = Mapping[str, Any]
Sets = Mapping[str, tuple[np.ndarray, int]]
"""Test set -> its labels and the number of its classes."""


@dataclass(frozen=True)
class Difference:
    """Of the top-1 on a set, or of its mean over several.

    Attributes:
        seeds: The difference with each seed.
        pictures: For each set the difference of each picture's hits, averaged over the
            seeds; and the labels beside it.
        told: Whether one of the two methods is above chance.
    """

    seeds: list[float]
    pictures: list[tuple[np.ndarray, np.ndarray]]
    told: bool = True

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def over_seeds(self) -> tuple[float, float]:
        return t_interval(self.seeds)

    @property
    def over_classes(self) -> tuple[float, float]:
        return picture_interval(self.pictures)


def compared(
    ours: Mapping[int, Record], theirs: Mapping[int, Record], sets: Sets
) -> dict[str, Difference]:
    """The difference on each set, over the seeds that both have; nothing without any.

    Args:
        ours: Seed -> the record of a method, one tower.
        theirs: Those of the other method.
        sets: The test sets' labels.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return {}
    pairs = [[side[seed] for seed in seeds] for side in (ours, theirs)]
    return {name: _on_set(name, pairs, sets) for name in ZEROSHOT}


def _on_set(name: str, pairs: Sequence[Sequence[Record]], sets: Sets) -> Difference:
    labels, _ = sets[name]
    ours, theirs = (
        [unpack_bits(record["zeroshot"][name]["hits"], len(labels)) for record in side]
        for side in pairs
    )
    rows = [a.astype(float) - b for a, b in zip(ours, theirs, strict=True)]
    # The p-value of the last seed is over all of these seeds.
    told = any(side[-1]["zeroshot"][name]["p"] <= LEVEL for side in pairs)
    by_seed = [float(row.mean()) for row in rows]
    return Difference(by_seed, [(np.mean(rows, axis=0), labels)], told)


def mean_of_sets(
    differences: Iterable[Difference], everything: bool = False
) -> Difference | None:
    """The mean of those that are told from chance (or of ``everything``), if there are
    any.
    """
    counted_sets = [d for d in differences if d.told or everything]
    if not counted_sets:
        return None
    seeds = np.mean([d.seeds for d in counted_sets], axis=0)
    pictures = [of_set for d in counted_sets for of_set in d.pictures]
    return Difference(list(seeds), pictures)


def counted(differences: Sequence[float]) -> str:
    """How many are above zero, with the p-value of a sign test."""
    n = len(differences)
    wins = sum(d > _TIE for d in differences)
    losses = sum(d < -_TIE for d in differences)
    level = f", {n - wins - losses} level" if wins + losses < n else ""
    return (
        f"{wins} of {n} ({100 * wins / n:.0f} %{level}, p ="
        f" {sign_test(wins, losses):.3g})"
    )


def zeroshot_mean(record: Record) -> float:
    return float(np.mean([found["acc1"] for found in record["zeroshot"].values()]))
