"""What all pairs have in common, whatever they are pairs of: pictures and captions, a
caller's items, rows of two matrices.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cloob.data.batch import Batch
from cloob.data.source import Fingerprint, ShardSizes


class Pairs(Protocol):
    """Pairs by number, of which a loader or a fit makes batches.

    Picklable, cheap to copy into a worker, and safe to read from several processes.
    """

    name: str
    """What messages call them."""
    by_id: bool = True
    """Whether pairs of one id are one answer; else every pair is its own."""
    streamed: bool = False
    """Whether reading in random order is costly: the loader then reads file by file."""

    def __len__(self) -> int: ...

    @property
    def parts(self) -> tuple[ShardSizes, ...]:
        """The files of every part, through which an epoch spreads them."""
        return (ShardSizes((len(self),)),)

    def fingerprint(self) -> Fingerprint:
        """A few digests and counts of the content: equal for equal data, wherever they
        lie.
        """

    def groups(self) -> np.ndarray:
        """(N,) int64 numbers, equal for pairs that are held out together."""

    def batch(self, rows: np.ndarray, epoch: int = 0) -> Batch:
        """Some pairs, with what is drawn for them at random in an epoch; those that
        cannot be used are in its ``skipped``.
        """

    def prefetch(self, rows: np.ndarray, /) -> None:
        """Has the files of rows that will be read soon prepared."""
        return
