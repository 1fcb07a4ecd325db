"""The few statistics of the tables, by formula and without random numbers, so that they come out the same anywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

_DEALS = 2000


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for one value)."""
    array = np.asarray(values, float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean: what other seeds would give. NaN for fewer than two values."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean, sd = mean_sd(values)
    half = float(t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half


def picture_interval(groups: Sequence[tuple[np.ndarray, np.ndarray]], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of the groups' means: what other classes and pictures would give.

    The pictures of a class share one embedding of its name, so it is the classes that are independent: the variance of
    a mean of n pictures in C classes is C / (C − 1) · Σ_c (Σ_{i in c} (d_i − d̄))² / n², with C − 1 degrees of freedom;
    those of a sum of such variances are Satterthwaite's, (Σ v)² / Σ v² / (C − 1).

    Args:
        groups: For each test set, each picture's difference between two methods, averaged over the seeds; its class.
        level: Coverage.
    """
    from scipy.stats import t

    mean = float(np.mean([d.mean() for d, _ in groups]))
    variances, freedoms = [], []
    for d, labels in groups:
        _, classes = np.unique(labels, return_inverse=True)
        sums = np.bincount(classes, d - d.mean())
        freedoms.append(len(sums) - 1)
        variances.append(len(sums) / (len(sums) - 1) * float((sums**2).sum()) / len(d) ** 2 / len(groups) ** 2)
    variance = sum(variances)
    if variance == 0:
        return mean, mean
    freedom = variance**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return mean - half, mean + half


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the sign test; ties are left out by the caller."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1))
    return min(1.0, 2.0 * tail / 2.0**n)


def chance(predictions: Sequence[np.ndarray], labels: np.ndarray, n_classes: int) -> float:
    """The p-value of an accuracy, if pictures and names did not belong together.

    The names of the classes are dealt anew 2,000 times: an answer that is always the same, or classes told apart but
    called by each other's names, are no better than that.

    Args:
        predictions: For each seed, (n,) the class that each picture is taken for.
        labels: (n,) classes in [0, C).
        n_classes: C.
    """
    asked, taken = np.tile(labels, len(predictions)), np.concatenate(list(predictions))
    counts = np.bincount(taken * n_classes + asked, minlength=n_classes**2)
    as_good = int((counts.take(_dealt(n_classes)).sum(1) >= counts[:: n_classes + 1].sum()).sum())
    return (1 + as_good) / (1 + _DEALS)


@functools.cache
def _dealt(n_classes: int) -> np.ndarray:
    """(2,000, C): in each row, the name that each class is given, as its place in a flat (C, C)."""
    generator = np.random.default_rng(0)
    return np.stack([generator.permutation(n_classes) for _ in range(_DEALS)]) + n_classes * np.arange(n_classes)
