"""``--clean``: training pairs that do not seem to belong together are left out; held-out pairs never are."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from cloob.distributed import on_rank_zero, rank
from cloob.functional.suspects import suspicion
from cloob.training.config.checks import wrong

SUSPECTS_FILE = "suspects.csv"
_LEAST = 100
LeftOut = list[tuple[str, float]]
"""The keys and scores of pairs, lowest first."""
logger = logging.getLogger(__name__)


class Pairs(Protocol):
    """Pairs of rows in memory or in mapped files."""

    def __len__(self) -> int: ...

    def take(self, places: np.ndarray) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
        """Rows of both sides, ids and keys of some pairs."""
        ...

    def only(self, places: np.ndarray) -> Self:
        """Some of the pairs."""
        ...


P = TypeVar("P", bound=Pairs)


def cleaned(pairs: P, how: str, name: str) -> tuple[P, LeftOut]:
    """The pairs without the suspicious ones, ``"auto"`` or a share of all, and those; every rank calls this."""

    def judge() -> tuple[np.ndarray, LeftOut]:
        a, b, ids, keys = pairs.take(np.arange(len(pairs)))
        distinct = len(torch.unique(ids))
        if distinct < _LEAST:
            wrong(f"{name}: {distinct} distinct ids; --clean needs {_LEAST} or more")
        found = suspicion(a, b, ids)
        order = found.scores.argsort().numpy()
        count = found.count() if how == "auto" else round(float(how) * len(order))
        return np.sort(order[count:]), [(keys[place], float(found.scores[place])) for place in order[:count]]

    kept, left_out = on_rank_zero(judge, slow=True)
    if rank() == 0:
        told = "%s of %s training pairs are left out (--clean %s); %s lists them"
        logger.info(told, f"{len(left_out):,}", f"{len(pairs):,}", how, SUSPECTS_FILE)
    return pairs.only(kept), left_out


def write_left_out(run: Path, left_out: LeftOut) -> None:
    """Lists the pairs that a run leaves out."""
    with (run / SUSPECTS_FILE).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("pair", "score"), *left_out])
