"""Pairs that do not seem to belong together are left out of the training."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from cloob.data.vectors import VectorPairs
from cloob.heads.suspects import suspicion

logger = logging.getLogger(__name__)


class LeftOut(NamedTuple):
    """A pair that is left out."""

    pair: str
    score: float
    probability: float  # of being wrong
    row: int  # among the training pairs


def suspicious_pairs(pairs: VectorPairs) -> list[LeftOut]:
    """The training pairs to leave out, the most suspicious first: those that are more
    probably wrong than right, and none where that is uncertain.
    """
    batch = pairs.batch()
    a, b = batch.parts
    found = suspicion(a, b, batch.ids)
    low, high = found.wrong.interval
    logger.info(
        f"wrong training pairs, by their scores: {found.wrong.share:.1%} (95 %:"
        f" {low:.1%} to {high:.1%})"
    )
    keys = pairs.keys()
    listed = []
    for row in found.scores.argsort(stable=True)[: found.count()].tolist():
        score = float(f"{found.scores[row]:.6g}")
        probability = round(float(found.wrong.probability[row]), 4)
        listed.append(LeftOut(keys[row], score, probability, row))
    return listed


def without(pairs: VectorPairs, left_out: list[LeftOut]) -> VectorPairs:
    """The pairs without those that are left out."""
    n, n_left_out = f"{len(pairs):,}", f"{len(left_out):,}"
    logger.info("%s of %s training pairs are left out (clean)", n_left_out, n)
    rows = [pair.row for pair in left_out]
    return pairs.only(np.delete(np.arange(len(pairs)), rows))
