"""Pairs that do not seem to belong together are left out of the training."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch

from cloob.data.vectors import VectorPairs
from cloob.errors import InputError, counted
from cloob.heads.suspects import suspicion

logger = logging.getLogger(__name__)

LEAST_IDS = 100  # distinct ones, for cleaning


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
    a, b, ids = pairs.batch()
    n_ids = len(torch.unique(ids))
    if n_ids < LEAST_IDS:
        few = counted(n_ids, "distinct ids")
        raise InputError(
            f"{pairs.name}: {few}; clean needs {LEAST_IDS} of them or more"
        )
    found = suspicion(a, b, ids)
    low, high = found.wrong.interval
    logger.info(
        "wrong training pairs, by their scores: %s (95 %%: %s to %s)",
        f"{found.wrong.share:.1%}",
        f"{low:.1%}",
        f"{high:.1%}",
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
