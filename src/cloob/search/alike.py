"""Groups of rows that are near to each other."""

from __future__ import annotations

import numpy as np

from cloob.search.matrix import Vectors

DUPLICATE = 0.97  # cosine from which two pictures look alike
_BLOCK = 256  # rows that are compared at once


def partition(
    rows: Vectors, threshold: float = DUPLICATE
) -> list[list[tuple[int, float]]]:
    """Groups of unit rows without a pair below the threshold, greedily: places, and
    cosines with the first.
    """
    rows = np.nan_to_num(rows)  # without a vector: near to none
    least = threshold - 1e-5  # a cosine of equal rows may be a rounding below 1
    free, groups = np.ones(len(rows), bool), []
    for start in range(0, len(rows), _BLOCK):
        scores = rows[start : start + _BLOCK] @ rows[start:].T
        for first, row in enumerate(scores, start):
            if not free[first]:
                continue
            free[first], group = False, [(first, 1.0)]
            near = np.flatnonzero((row >= least) & free[start:])
            near = near[np.argsort(-row[near], kind="stable")]
            while len(near):
                place = start + int(near[0])
                group.append((place, float(row[near[0]])))
                free[place] = False
                near = near[1:][rows[start + near[1:]] @ rows[place] >= least]
            groups.append(sorted(group))
    return groups
