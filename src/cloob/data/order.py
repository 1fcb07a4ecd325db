"""The order in which an epoch visits its pairs, on any rank: a pure function of (seed,
epoch, sizes) and a position.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cloob.data.batch import even_bounds
from cloob.data.source import ShardSizes as ShardSizes
from cloob.data.source import starts_of

DEFAULT_BUFFER = 10_000  # pairs of every lane in which streamed sources are shuffled
_U64 = 2**64 - 1
_STREAM = 0x5354524D  # sets the draws of shards apart from those of pairs
_CAPTIONS = 0x43415054  # sets the draws of captions apart from those of crops

RowsAt = Callable[[np.ndarray], np.ndarray]  # gives the rows at some places


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator for one sample in one epoch (4 µs; numpy's cost 8 to 11)."""
    digest = hashlib.blake2b(
        struct.pack("<QQQ", seed & _U64, epoch, index), digest_size=8
    ).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def seed_all(seed: int, epoch: int, index: int) -> None:
    """Makes what Python, numpy and torch draw next depend on these three."""
    number = sample_generator(seed, epoch, index).initial_seed() % 2**32
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.default_generator.manual_seed(number)


class Rows:
    """Rows of which each is a picture of its own."""

    def parts(self, parts_of_rows: Sequence[ShardSizes]) -> tuple[ShardSizes, ...]:
        """The parts of an order of pictures."""
        return tuple(parts_of_rows)

    def first_rows(self, pictures: np.ndarray) -> np.ndarray:
        return pictures

    def row(self, picture: int, seed: int | None, epoch: int) -> int:
        """The row whose caption a picture has in an epoch."""
        return picture


class Pictures(Rows):
    """Pictures in the order of their first rows, and their rows, by
    ``Source.first_rows``.
    """

    def __init__(self, first_rows: np.ndarray) -> None:
        self.firsts, n_rows = np.unique(first_rows, return_counts=True)
        self._rows = np.argsort(first_rows, kind="stable")
        self._bounds = np.cumsum([0, *n_rows])

    def parts(self, parts_of_rows: Sequence[ShardSizes]) -> tuple[ShardSizes, ...]:
        """A part with fewer pictures than rows is one file."""
        n_rows = [sum(part.shard_sizes) for part in parts_of_rows]
        ends = np.searchsorted(self.firsts, np.cumsum(n_rows))
        n_pictures = np.diff(ends, prepend=0).tolist()
        return tuple(
            part if rows == pictures else ShardSizes((pictures,))
            for part, rows, pictures in zip(
                parts_of_rows, n_rows, n_pictures, strict=True
            )
        )

    def first_rows(self, pictures: np.ndarray) -> np.ndarray:
        return self.firsts.take(pictures)

    def row(self, picture: int, seed: int | None, epoch: int) -> int:
        """Drawn from these; without a seed the first."""
        rows = self._rows[self._bounds[picture] : self._bounds[picture + 1]]
        if len(rows) == 1 or seed is None:
            return int(rows[0])
        generator = sample_generator(seed ^ _CAPTIONS, epoch, picture)
        return int(rows[int(torch.randint(len(rows), (), generator=generator))])


@dataclass(frozen=True)
class EpochOrder:
    """The order of the pairs in every epoch; rows are numbered over all parts, one part
    after the other.

    Without a buffer the epoch is one permutation. With a buffer shards are read one
    after the other:

    - the shards of every part are shuffled, and the parts are spread evenly through
      each other, so that any stretch holds every source in its proportion (a part that
      is neither streamed nor in several files is shuffled in itself);
    - this sequence is cut into ``lanes`` pieces of equal length, so that neighbours
      share at most one shard of a part;
    - a lane is shuffled in blocks of ``buffer`` pairs;
    - position p of the epoch belongs to lane p mod lanes. With as many lanes as ranks a
      rank reads the shards of one lane only. Another number of ranks gives the same
      batches, with more shards shared.

    """

    parts: Sequence[ShardSizes]
    seed: int
    shuffle: bool = True
    buffer: int = 0

    def __len__(self) -> int:
        return sum(sum(part.shard_sizes) for part in self.parts)

    def state(self, *, at_start: bool) -> object:
        """None: the order is a function of seed and epoch."""
        return None

    def load(self, state: object) -> None:
        """Does nothing."""

    def epoch(self, epoch: int, lanes: int = 1) -> RowsAt:
        """The rows at the positions of an epoch, from 0; global batch b has those from
        b·batch_size on.
        """
        n, seed = len(self), self.seed & _U64
        if not self.shuffle or n == 0:
            return lambda positions: positions
        if not self.buffer:
            return _permutation(n, [seed, epoch])
        streams = self._streams(epoch)
        bounds = even_bounds(n, lanes)

        @functools.lru_cache(maxsize=2 * lanes)
        def shuffled(lane: int, block: int) -> np.ndarray:
            start = bounds[lane] + block * self.buffer
            stop = min(start + self.buffer, bounds[lane + 1])
            draws = np.random.PCG64([seed, _STREAM, epoch, 0, lane, block])
            rows = _interleaved(n, streams, start, stop)
            return np.random.Generator(draws).permutation(rows)

        def rows(positions: np.ndarray) -> np.ndarray:
            rows_there = np.empty(len(positions), np.int64)
            place_in_lane, lane_of = np.divmod(positions, lanes)
            block_of, place_in_block = np.divmod(place_in_lane, self.buffer)
            for lane, block in np.unique(np.stack([lane_of, block_of]), axis=1).T:
                is_here = (lane_of == lane) & (block_of == block)
                block_rows = shuffled(int(lane), int(block))
                rows_there[is_here] = block_rows[place_in_block[is_here]]
            return rows_there

        return rows

    def _streams(self, epoch: int) -> list[tuple[int, RowsAt]]:
        """How many rows every part gives in an epoch, and the rows."""
        streams = []
        first = 0
        for number, part in enumerate(self.parts, 1):
            key = [self.seed & _U64, _STREAM, epoch, number]
            size = sum(part.shard_sizes)
            if size:
                streams.append(_stream(part, key, first))
            first += size
        return streams


def _stream(part: ShardSizes, key: list[int], first: int) -> tuple[int, RowsAt]:
    """How many rows a part gives, and the rows: shard after shard, or shuffled."""
    sizes, streamed = part
    n = sum(sizes)
    generator = np.random.Generator(np.random.PCG64(key))
    if not streamed and len(sizes) == 1:
        shuffle = _permutation(n, generator.integers(2**32, size=4))
        return n, lambda places: first + shuffle(places)
    ends = np.cumsum(sizes)
    shards = generator.permutation(np.stack([ends - sizes, ends], axis=1))
    first_rows = first + shards[:, 0]  # of the shards in their new order
    starts = starts_of(shards[:, 1] - shards[:, 0])  # and their places there

    def rows_of_shards(places: np.ndarray) -> np.ndarray:
        shard = np.searchsorted(starts, places, side="right") - 1
        return np.asarray(first_rows[shard] + places - starts[shard])

    return n, rows_of_shards


def _interleaved(
    n: int, streams: Sequence[tuple[int, RowsAt]], start: int, stop: int
) -> np.ndarray:
    """The rows at ``start:stop`` of streams with n rows in all: row j of m stands at (j
    + ½)/m of the epoch.
    """
    slack = len(streams)
    rows, shares = [], []
    n_before = 0  # rows of all streams that stand before those that are looked at
    for m, rows_at in streams:
        first = _places_before(start - slack, n, m)
        last = _places_before(stop + slack, n, m)
        places = np.arange(first, last)
        rows.append(rows_at(places))
        shares.append((places + 0.5) / m)
        n_before += first
    order = np.argsort(np.concatenate(shares), kind="stable")
    together = np.concatenate(rows)[order]
    return together[start - n_before : stop - n_before]


def _places_before(position: int, n: int, m: int) -> int:
    """How many of m evenly spread rows stand before a position of n."""
    return min(m, max(0, math.ceil(position / n * m - 0.5)))


def _permutation(n: int, key: Sequence[int] | np.ndarray) -> RowsAt:
    key = [int(number) for number in key]
    numbers = np.random.Generator(np.random.PCG64(key)).permutation(n)
    return lambda places: np.asarray(numbers[places])
