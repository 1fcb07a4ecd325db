"""Which pairs an epoch visits, in which order, and which of them a rank takes: pure functions of numbers and seeds."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cloob.data.longorder import KeyedPermutation, Order, Shuffled, Straight, Streamed, Track

DEFAULT_BUFFER = 10_000
"""Window of the shuffle of streamed sources, in pairs on each lane."""

LONG = 2**22
"""From so many pairs on an order is computed as it is needed. Below, holding it costs each rank less than a second and
150 MB at its start, and it is drawn as it always was, so that runs and records reproduce."""

_U64 = 2**64 - 1
_STREAM = 0x5354524D  # sets the draws below apart from those of ``epoch_order``


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order in which an epoch visits n pairs: ``(n,)`` int64, a permutation drawn from (seed, epoch)."""
    if not shuffle:
        return np.arange(n)
    return np.random.Generator(np.random.PCG64([seed & _U64, epoch])).permutation(n)


def local_part(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of a global batch that a rank takes; sizes differ by at most one."""
    n = len(indices)
    return indices[n * rank // world_size : n * (rank + 1) // world_size]


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator of its own for one sample in one epoch (4 µs; numpy's cost 8 to 11)."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed & _U64, epoch, index), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Part:
    """One source among those of a run.

    Attributes:
        shard_sizes: Rows of each file.
        weight: Passes over the source in an epoch.
        streamed: Costly to read in random order.
    """

    shard_sizes: tuple[int, ...]
    weight: float = 1.0
    streamed: bool = False

    @property
    def rows(self) -> int:
        """Pairs stored."""
        return sum(self.shard_sizes)

    @property
    def passes(self) -> tuple[int, int]:
        """Whole passes of an epoch, and how many rows of one more: (k, m) with k·rows + m = round(weight·rows)."""
        return divmod(round(self.weight * self.rows), self.rows) if self.rows else (0, 0)


class EpochOrder:
    """The order of the pairs in each epoch, a pure function of the arguments and the epoch's number.

    Rows are numbered over all parts, one part after the other; copy c of row i is ``i + c·N``, N being the rows of all
    parts. In an epoch each row of a part with weight w occurs floor(w) or floor(w)+1 times: the rows of the fraction
    are the next ``m`` of a fixed random order of the part, going around, so that over the epochs all rows come equally
    often.

    Without a buffer the whole epoch is one permutation. With a buffer shards are read one after the other:

    - the shards of each part are shuffled, and their rows, in order, spread evenly through those of the other parts, so
      that each stretch holds every source in its proportion (a part that is neither streamed nor in several files is
      shuffled in itself);
    - this sequence is cut into ``lanes`` pieces, in proportion to what each lane gives to a batch, so that neighbours
      share at most one shard of each part;
    - within its lane a pair moves by less than ``buffer`` places;
    - global batch b is the b-th part of lane 0, then of lane 1, and so on. With as many lanes as ranks, rank r's part
      of a batch (``local_part``) is lane r's: it reads the shards of its lane only. Any other number of ranks gives the
      same batches, with more shards shared.

    With ``long_from`` rows or more nothing is held: the same rules with other draws, of which any stretch can be
    computed (``longorder``).

    Args:
        parts: The sources.
        seed: Of all draws.
        batch_size: Pairs per global batch.
        shuffle: False: rows in order, without weights.
        buffer: Window of the shuffle in pairs; 0: one permutation of everything.
        long_from: Rows, stored or in an epoch, from which on the order is computed as it is needed.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int,
        batch_size: int,
        shuffle: bool = True,
        buffer: int = 0,
        long_from: int = LONG,
    ) -> None:
        self._parts = tuple(parts) if shuffle else tuple(Part(p.shard_sizes, 1.0, p.streamed) for p in parts)
        self._seed = seed & _U64
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._buffer = buffer
        self._rows = sum(part.rows for part in self._parts)
        self._plain = all(part.passes == (1, 0) for part in self._parts)
        self._long = max(self._rows, len(self)) >= long_from and len(self) > 0

    def __len__(self) -> int:
        """Pairs an epoch visits, the same for each epoch."""
        return sum(copies * part.rows + rest for part in self._parts for copies, rest in [part.passes])

    def epoch(self, epoch: int, lanes: int = 1, batch_size: int | None = None) -> Order:
        """The pairs of an epoch; global batch b is ``[b·batch_size : (b+1)·batch_size]``.

        Args:
            epoch: Number of the epoch, from 0.
            lanes: Sequences of shards that make up a batch; without a buffer of no effect.
            batch_size: Another than the order's own; without a buffer of no effect.

        Returns:
            ``(len,)`` int64, or what computes a slice of it.
        """
        if self._long:
            return self._computed(epoch, lanes, batch_size or self._batch_size)
        if self._shuffle and self._buffer:
            return self._streamed(epoch, lanes, batch_size or self._batch_size)
        order = epoch_order(len(self), self._seed, epoch, self._shuffle)
        if self._plain:
            return order
        pieces = [piece for part in self._pieces(epoch, by_shard=False) for piece in part]
        return np.concatenate(pieces)[order] if pieces else order

    def _pieces(self, epoch: int, by_shard: bool) -> list[list[np.ndarray]]:
        """For each part its rows of an epoch, in pieces that may be shuffled against each other."""
        by_part: list[list[np.ndarray]] = []
        start = 0
        for i, part in enumerate(self._parts):
            pieces: list[np.ndarray] = []
            shards = by_shard and (part.streamed or len(part.shard_sizes) > 1)
            copies, rest = part.passes
            for copy in range(copies + (rest > 0)):
                shift = start + copy * self._rows
                if shards:
                    ranges = _shard_ranges(part.shard_sizes)
                    if copy == copies:
                        ranges = _take([ranges[j] for j in self._fixed(i, len(ranges))], epoch * rest, rest)
                    pieces += [np.arange(a + shift, b + shift) for a, b in ranges if b > a]
                else:
                    rows = np.arange(part.rows)
                    if copy == copies:
                        rows = np.take(
                            self._fixed(i, part.rows), np.arange(epoch * rest, (epoch + 1) * rest), mode="wrap"
                        )
                    if by_shard:
                        rows = self._generator(epoch, 1 + i, copy).permutation(rows)
                    pieces.append(rows + shift)
            by_part.append(pieces)
            start += part.rows
        return by_part

    def _computed(self, epoch: int, lanes: int, size: int) -> Order:
        """The order of an epoch that is not held."""
        if not self._shuffle:
            return Straight(len(self))
        if not self._buffer:
            return Shuffled(self._tracks(epoch, by_shard=False), [self._seed, _STREAM, epoch])
        tracks = self._tracks(epoch, by_shard=True)
        key = int(self._generator(epoch, 0, 0).bit_generator.random_raw())
        return Streamed(tracks, key, lanes=lanes, batch_size=size, buffer=self._buffer)

    def _tracks(self, epoch: int, by_shard: bool) -> list[Track]:
        """As ``_pieces``, without the rows; by shard the pieces of each part are shuffled."""
        tracks: list[Track] = []
        start = 0
        for i, part in enumerate(self._parts):
            copies, rest = part.passes
            shifts = [start + copy * self._rows for copy in range(copies + (rest > 0))]
            if by_shard and (part.streamed or len(part.shard_sizes) > 1):
                one = _shard_ranges(part.shard_sizes)
                ranges = [(a + shift, b + shift) for shift in shifts[:copies] for a, b in one]
                if rest:
                    some = _take([one[j] for j in self._fixed(i, len(one))], epoch * rest, rest)
                    ranges += [(a + shifts[-1], b + shifts[-1]) for a, b in some]
                starts, ends = self._generator(epoch, 1 + i, 0).permutation(np.array(ranges, np.int64).reshape(-1, 2)).T
                tracks.append(Track(ends - starts, starts))
            else:
                sizes = [part.rows] * copies + [rest] * (rest > 0)
                maps = tuple(
                    self._copy(i, epoch, copy, shift, size, permuted=by_shard)
                    for copy, (shift, size) in enumerate(zip(shifts, sizes, strict=True))
                )
                tracks.append(Track(np.array(sizes, np.int64), maps=maps))
            start += part.rows
        return tracks

    def _copy(
        self, i: int, epoch: int, copy: int, shift: int, size: int, *, permuted: bool
    ) -> Callable[[np.ndarray], np.ndarray]:
        """What makes rows of the places in one copy of a part, whole or the fraction at the end."""
        rows = self._parts[i].rows
        shuffle = KeyedPermutation(size, [self._seed, _STREAM, epoch, 1 + i, copy]) if permuted else None
        # The fraction goes around a fixed order, which is the same in every epoch.
        fixed = KeyedPermutation(rows, [self._seed, _STREAM, i]) if copy == self._parts[i].passes[0] else None

        def numbers(places: np.ndarray) -> np.ndarray:
            places = shuffle(places) if shuffle is not None else places
            return (fixed((epoch * size + places) % rows) if fixed is not None else places) + shift

        return numbers

    def _streamed(self, epoch: int, lanes: int, size: int) -> np.ndarray:
        generator = self._generator(epoch, 0, 0)
        sequence = _interleave(self._pieces(epoch, by_shard=True), generator)
        steps, rest = divmod(len(sequence), size)
        full, last = np.empty((steps, size), np.int64), np.empty(rest, np.int64)
        at = 0
        for lane in range(lanes):
            begin, end = size * lane // lanes, size * (lane + 1) // lanes
            last_begin, last_end = rest * lane // lanes, rest * (lane + 1) // lanes
            count = steps * (end - begin) + last_end - last_begin
            rows = sequence[at : at + count]
            rows = rows[np.argsort(np.arange(count) + generator.random(count) * self._buffer, kind="stable")]
            full[:, begin:end] = rows[: steps * (end - begin)].reshape(steps, end - begin)
            last[last_begin:last_end] = rows[steps * (end - begin) :]
            at += count
        return np.concatenate([full.ravel(), last])

    def _fixed(self, part: int, n: int) -> np.ndarray:
        """The order in which the epochs take their fractions of a part: the same in every epoch."""
        return np.random.Generator(np.random.PCG64([self._seed, _STREAM, part])).permutation(n)

    def _generator(self, epoch: int, stream: int, copy: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, _STREAM, epoch, stream, copy]))


def _interleave(parts: Sequence[Sequence[np.ndarray]], generator: np.random.Generator) -> np.ndarray:
    """The pieces of each part in random order, and the parts, row by row, spread evenly through each other."""
    rows = [np.concatenate([part[i] for i in generator.permutation(len(part))] or [np.arange(0)]) for part in parts]
    together = np.concatenate(rows or [np.arange(0)])
    if len(rows) < 2:
        return together
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in rows])
    return together[np.argsort(places, kind="stable")]


def _shard_ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _take(ranges: Sequence[tuple[int, int]], start: int, count: int) -> list[tuple[int, int]]:
    """The ``count`` rows from the ``start``-th on of the rows of some ranges, going around at the end."""
    total = sum(b - a for a, b in ranges)
    start %= total
    taken: list[tuple[int, int]] = []
    at = 0
    for a, b in [*ranges, *ranges]:
        low, high = max(at, start), min(at + b - a, start + count)
        if high > low:
            taken.append((a + low - at, a + high - at))
        at += b - a
    return taken
