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


def suspicious_pairs(pairs: VectorPairs, share: str) -> list[LeftOut]:
    """The pairs to leave out, the most suspicious first.

    Args:
        pairs: Training pairs.
        share: ``"auto"``: those that are more probably wrong than right, and none where
            that is uncertain; a number: this share of the pairs.
    """
    a, b, ids, keys = pairs.take(np.arange(len(pairs)))
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
    count = found.count() if share == "auto" else round(float(share) * len(pairs))
    listed = []
    for row in found.scores.argsort(stable=True)[:count].tolist():
        score = float(f"{found.scores[row]:.6g}")
        probability = round(float(found.wrong.probability[row]), 4)
        listed.append(LeftOut(keys[row], score, probability, row))
    return listed


def without(pairs: VectorPairs, left_out: list[LeftOut], share: str) -> VectorPairs:
    """The pairs without those that are left out."""
    logger.info(
        "%s of %s training pairs are left out (clean = %s)",
        f"{len(left_out):,}",
        f"{len(pairs):,}",
        share,
    )
    rows = [pair.row for pair in left_out]
    return pairs.only(np.delete(np.arange(len(pairs)), rows))
