"""The order of a caller's sampler, the same on every rank and after a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cloob.data.order import RowsAt, seed_all
from cloob.distributed import on_rank_zero
from cloob.errors import InputError

_SAMPLER = 0x53414D50  # sets a sampler's draws apart from those of items
_NO_ROW = -1


class SamplerOrder:
    """Every epoch is what iterating a torch ``Sampler`` gives on rank 0.

    What it draws at random depends on (seed, epoch). Its ``set_epoch(epoch)`` is called
    first where it has one; one with a ``state_dict()`` gets the state that it had at
    the beginning of the epoch back at a resume, by ``load_state_dict``.

    A batch sampler gives lists of rows; with a ``batch_size`` every list has as many
    places of the epoch, and those beyond its length have no row.
    """

    def __init__(
        self, sampler: Any, rows: int, seed: int, batch_size: int | None = None
    ) -> None:
        self._sampler, self._rows, self._seed = sampler, rows, seed
        self._batch_size = batch_size
        self._name = type(sampler).__name__
        self._state_at_start: object = None
        if not hasattr(sampler, "__len__"):
            raise InputError(f"{self._name}: has no length; a sampler needs __len__")

    def __len__(self) -> int:
        return len(self._sampler) * (self._batch_size or 1)

    def epoch(self, epoch: int, lanes: int = 1) -> RowsAt:
        """The rows at positions of an epoch."""
        self._state_at_start = self.state()
        rows = on_rank_zero(lambda: self._drawn(epoch))

        def rows_at(positions: np.ndarray) -> np.ndarray:
            drawn = rows[positions]
            return np.asarray(drawn[drawn != _NO_ROW])

        return rows_at

    def state(self, *, at_start: bool = False) -> object:
        """The sampler's state now, or at the start of the epoch that was asked for
        last; None of one that keeps none.
        """
        if at_start:
            return self._state_at_start
        return getattr(self._sampler, "state_dict", lambda: None)()

    def load(self, state: object) -> None:
        if state is not None:
            self._sampler.load_state_dict(state)

    def _drawn(self, epoch: int) -> np.ndarray:
        """The rows of an epoch as the caller's sampler draws them, checked."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        with _seeded(self._seed ^ _SAMPLER, epoch):
            drawn = list(self._sampler)
        if len(drawn) != len(self._sampler):
            raise InputError(
                f"{self._name}: gave {len(drawn):,} in an epoch, its length is"
                f" {len(self._sampler):,}"
            )
        if self._batch_size is None:
            rows = np.asarray(drawn, np.int64).reshape(-1)
        else:
            rows = self._placed(drawn, self._batch_size)
        outside = rows[(rows >= self._rows) | (rows < _NO_ROW)]
        if len(outside):
            raise InputError(
                f"{self._name}: gave row {outside[0]:,} of {self._rows:,} pairs"
            )
        return rows

    def _placed(self, batches: list[list[int]], size: int) -> np.ndarray:
        """The rows of whole batches, each filled up to ``size`` with a row that is
        none.
        """
        rows = np.full((len(batches), size), _NO_ROW, np.int64)
        for place, batch in enumerate(batches):
            if len(batch) > size:
                raise InputError(
                    f"{self._name}: gave a batch of {len(batch)} pairs; batch_size,"
                    f" which is {size}, is the size of the largest"
                )
            rows[place, : len(batch)] = batch
        return rows.reshape(-1)


@contextmanager
def _seeded(seed: int, epoch: int) -> Iterator[None]:
    """Inside, all three generators depend on (seed, epoch); they are put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed_all(seed, epoch, 0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
