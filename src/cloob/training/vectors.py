"""Heads for two files of vectors: the parts of a run of ``cloob train vectors`` that differ from ``align``'s."""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor

from cloob.data.source import spread
from cloob.data.vectors import VectorPairs, open_pairs
from cloob.errors import counted
from cloob.models.aligned.heads import Standardise
from cloob.models.aligned.vectors import VectorEncoder
from cloob.training.align import new_heads
from cloob.training.bad_samples import check_fraction
from cloob.training.config import TrainConfig
from cloob.training.config.checks import wrong

_FITTED, _FITTED_NUMBERS = 32_768, 1 << 24  # rows, and numbers of a side
_FEW = 20  # held-out ids: one more or less found is 5 points of recall
logger = logging.getLogger(__name__)


def open_vectors(config: TrainConfig) -> tuple[VectorPairs, VectorPairs | None]:
    files, share = config.vectors, config.pairs.val_split
    assert files.a is not None and files.b is not None
    pairs = open_pairs(files.a, files.b, files.ids, files.a_ids, files.b_ids)
    held_out = None
    if files.val_a is not None and files.val_b is not None:
        held_out = open_pairs(files.val_a, files.val_b, files.val_ids)
        for side in ("a", "b"):
            width, other = (getattr(each, side).shape[1] for each in (pairs, held_out))
            if width != other:
                wrong(f"val_{side} has {other:,} columns, {side} has {width:,}")
    for each in (pairs, held_out):
        if each is not None:
            total = len(each) + len(each.skipped)
            check_fraction(each.name, "pairs", each.skipped, total, config.pairs.max_bad_fraction)
    return with_held_out(pairs, held_out, share)


def with_held_out(
    pairs: VectorPairs, held_out: VectorPairs | None, share: float
) -> tuple[VectorPairs, VectorPairs | None]:
    """The training pairs and the held-out ones: those that are given, or a ``share`` of the ids."""
    if share:
        ids = len(np.unique(pairs.ids))
        if ids < 4:
            wrong(f"{pairs.name}: {counted(ids, 'ids')}; 2 to train on and 2 to hold out are needed")
        pairs, held_out = pairs.split(share)
    if held_out is not None and (ids := len(np.unique(held_out.ids))) < _FEW:
        logger.warning("%s held out: their recall means little", counted(ids, "ids"))
    return pairs, held_out


def make_vector_encoder(config: TrainConfig, pairs: VectorPairs) -> VectorEncoder:
    """Fresh heads, standardised by the training pairs: by all, or by 32,768 evenly spread ones (fewer wide ones)."""
    most = max(2, min(_FITTED, _FITTED_NUMBERS // max(pairs.a.shape[1], pairs.b.shape[1])))
    a, b, *_ = pairs.take(np.array(spread(len(pairs), most)))
    for side, rows in (("a", a), ("b", b)):
        if bool((rows == rows[0]).all()):
            logger.warning("all rows of %s are equal: nothing can be learned from them", side)
    asked = config.align.standardise or "auto"
    ways = [_way(side) if asked == "auto" else asked for side in (a, b)]
    if asked == "auto" and "column" in ways:
        sides = " and ".join(f"--{side}" for side, way in zip("ab", ways, strict=True) if way == "column")
        said = "columns of %s vary unlike: each is divided by its own spread (--standardise one: all alike)"
        logger.info(said, sides)
    of_a, of_b = new_heads(config, (a.shape[1], b.shape[1]), ways)
    encoder = VectorEncoder(of_a, of_b)
    encoder.fit(a, b)
    return encoder


def _way(rows: Tensor) -> Standardise:
    """By column where one scale would all but hide half of the columns; features of an encoder keep one scale."""
    variance = rows[:: -(-len(rows) // 4096)].double().var(0, unbiased=False)
    return "column" if variance.median() < 0.01 * variance.mean() else "one"
