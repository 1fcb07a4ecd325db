"""Pairs that do not seem to belong together are left out of the training."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch

from cloob.data.vectors import VectorPairs
from cloob.errors import InputError
from cloob.heads.suspects import clean

logger = logging.getLogger(__name__)

LEAST_IDS = 100  # distinct ones, for cleaning


class LeftOut(NamedTuple):
    """A pair that is left out."""

    pair: str
    score: float
    probability: float  # of being wrong
    row: int  # among the training pairs


def cleaned(pairs: VectorPairs, share: str) -> tuple[VectorPairs, list[LeftOut]]:
    """The pairs without suspicious ones, and these, the most suspicious first."""
    a, b, ids, keys = pairs.take(np.arange(len(pairs)))
    n_ids = len(torch.unique(ids))
    if n_ids < LEAST_IDS:
        raise InputError(
            f"{pairs.name}: {n_ids} distinct ids; --clean needs {LEAST_IDS} or more"
        )
    result = clean(a, b, ids, share)
    low, high = result.interval
    logger.info(
        "wrong training pairs, by their scores: %s (95 %%: %s to %s)",
        f"{result.share:.1%}",
        f"{low:.1%}",
        f"{high:.1%}",
    )
    listed = []
    for row in result.left_out().tolist():
        score = float(f"{result.scores[row]:.6g}")
        probability = round(float(result.probability[row]), 4)
        listed.append(LeftOut(keys[row], score, probability, row))
    return without(pairs, listed, share), listed


def without(pairs: VectorPairs, listed: list[LeftOut], share: str) -> VectorPairs:
    """The pairs without those that are listed."""
    logger.info(
        "%s of %s training pairs are left out (--clean %s)",
        f"{len(listed):,}",
        f"{len(pairs):,}",
        share,
    )
    rows = [one.row for one in listed]
    return pairs.only(np.delete(np.arange(len(pairs)), rows))
