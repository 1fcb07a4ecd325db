"""Two views of a hidden cause, for tests of heads."""

import numpy as np

from cloob.data.rows import Side
from cloob.data.vectors import usable_pairs


def views(n, widths=(12, 8), seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=(n, 5))
    sides = []
    for width in widths:
        said = cause @ rng.normal(size=(5, width))
        sides.append(said + noise * rng.normal(size=(n, width)))
    return sides


def pairs_of(a, b, labels=None):
    return usable_pairs(Side("a", a), Side("b", b), labels)
