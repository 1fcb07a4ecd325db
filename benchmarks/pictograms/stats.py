"""The few statistics of the tables, by formula and without random numbers, so that they come out the same anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


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


def picture_interval(groups: Sequence[np.ndarray], level: float = 0.95) -> tuple[float, float]:
    """Normal interval of the mean of the groups' means: what other test pictures would give.

    Args:
        groups: For each test set, each picture's difference between two methods, averaged over the seeds.
        level: Coverage.
    """
    from scipy.stats import norm

    mean = float(np.mean([g.mean() for g in groups]))
    variance = sum(float(g.var(ddof=1)) / len(g) for g in groups) / len(groups) ** 2
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    return mean - half, mean + half


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the sign test; ties are left out by the caller."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1))
    return min(1.0, 2.0 * tail / 2.0**n)


def above_chance(accuracy: float, n: int, n_classes: int) -> bool:
    """Whether an accuracy is more than three binomial standard errors above 1/C."""
    chance = 1 / n_classes
    return accuracy > chance + 3 * math.sqrt(chance * (1 - chance) / n)
