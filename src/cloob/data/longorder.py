"""The order of epochs too long to hold in memory: any stretch of it is computed when it is asked for.

Positions and rows are int64 arrays of shape (n,) throughout. Everything is a pure function of numbers and keys, so an
epoch goes on anywhere, on any rank, without what came before.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

_ROUNDS = 8
# Rows of a lane that are computed together: fewer than the shuffle's window would compute most of them twice.
_BLOCK = 16_384
_CACHED_BYTES = 2**28


class Order(Protocol):
    """The pairs of an epoch, stretch by stretch: an array, or what computes it."""

    def __len__(self) -> int: ...

    def __getitem__(self, stretch: slice, /) -> np.ndarray:
        """The pairs at ``start:stop``."""


class KeyedPermutation:
    """A random permutation of range(n) of which any part can be computed: an alternating Feistel network.

    A number x < a·b, with a and b near √n, is the pair (x // b, x % b); each round adds to one half a random function
    of the other. The functions are tables of true draws, 2·√n numbers a pair of rounds. Numbers of n and above are
    sent through again until they fall below (there are fewer than a of them).

    Args:
        n: Size, 1 or more.
        key: Numbers that seed the draws.
    """

    def __init__(self, n: int, key: Sequence[int]) -> None:
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        draws = np.random.PCG64(list(key))  # its raw stream is the same in every version of numpy
        sides = [(self._b, self._a), (self._a, self._b)] * (_ROUNDS // 2)
        self._tables = [(draws.random_raw(size) % np.uint64(modulus)).astype(np.int64) for size, modulus in sides]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at some positions."""
        numbers = self._once(positions)
        outside = np.flatnonzero(numbers >= self.n)
        while len(outside):
            numbers[outside] = self._once(numbers[outside])
            outside = outside[numbers[outside] >= self.n]
        return numbers

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        high, low = np.divmod(numbers, self._b)
        for i, table in enumerate(self._tables):
            if i % 2 == 0:
                high = high + table[low]
                high -= self._a * (high >= self._a)
            else:
                low = low + table[high]
                low -= self._b * (low >= self._b)
        return high * self._b + low


@dataclass(frozen=True)
class Track:
    """The rows of one part in an epoch: pieces one after the other.

    Attributes:
        sizes: Rows of each piece.
        starts: First row of each piece whose rows follow one another.
        maps: Instead of ``starts``, for each piece what makes rows of the places in it.
    """

    sizes: np.ndarray
    starts: np.ndarray | None = None
    maps: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()
    _ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum(self.sizes, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The rows at some places."""
        piece = np.searchsorted(self._ends, places, side="right")
        inside = places - (self._ends - self.sizes)[piece]
        if self.starts is not None:
            rows: np.ndarray = self.starts[piece] + inside
            return rows
        rows = np.empty(len(places), np.int64)
        for i in np.unique(piece).tolist():
            mine = piece == i
            rows[mine] = self.maps[i](inside[mine])
        return rows


@dataclass(frozen=True)
class Straight:
    """All pairs in order."""

    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, stretch: slice, /) -> np.ndarray:
        start, stop, _ = stretch.indices(self.n)
        return np.arange(start, stop)


class Shuffled:
    """One permutation of the rows of all tracks.

    Args:
        tracks: The parts.
        key: Of the permutation.
    """

    def __init__(self, tracks: Sequence[Track], key: Sequence[int]) -> None:
        self._tracks = tracks
        self._ends = np.cumsum([len(track) for track in tracks], dtype=np.int64)
        self._permutation = KeyedPermutation(len(self), key)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, stretch: slice, /) -> np.ndarray:
        start, stop, _ = stretch.indices(len(self))
        places = self._permutation(np.arange(start, stop))
        owners = np.searchsorted(self._ends, places, side="right")
        rows = np.empty(len(places), np.int64)
        for i, track in enumerate(self._tracks):
            mine = owners == i
            rows[mine] = track.rows(places[mine] - (self._ends[i] - len(track)))
        return rows


class Streamed:
    """The rows of all tracks spread evenly through each other, cut into lanes and shuffled within a window in each.

    As ``EpochOrder`` describes it; only the draws are others than those of an order that is held in memory.

    Args:
        tracks: The parts.
        key: One number, of the shuffle within the lanes.
        lanes: Pieces of the sequence.
        batch_size: Pairs per global batch.
        buffer: Window of the shuffle in pairs.
    """

    def __init__(self, tracks: Sequence[Track], key: int, *, lanes: int, batch_size: int, buffer: int) -> None:
        self._tracks = tracks
        self._n = sum(len(track) for track in tracks)
        self._key = np.uint64(key)
        self._lanes = lanes
        self._size = batch_size
        self._buffer = buffer
        self._steps, self._rest = divmod(self._n, batch_size)
        self._counts = [
            self._steps * _share(batch_size, lane, lanes) + _share(self._rest, lane, lanes) for lane in range(lanes)
        ]
        self._begins = np.cumsum([0, *self._counts]).tolist()
        self._block = max(_BLOCK, 2 * buffer)
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, stretch: slice, /) -> np.ndarray:
        at, stop, _ = stretch.indices(self._n)
        pieces = [np.arange(0)]
        while at < stop:
            batch, place = divmod(at, self._size)
            width = self._size if batch < self._steps else self._rest
            lane = ((place + 1) * self._lanes - 1) // width  # the last one that begins at this place or before
            begin, end = width * lane // self._lanes, width * (lane + 1) // self._lanes
            count = min(stop - at, end - place)
            first = batch * _share(self._size, lane, self._lanes) + place - begin
            pieces.append(self._lane(lane, first, first + count))
            at += count
        return np.concatenate(pieces)

    def _lane(self, lane: int, start: int, stop: int) -> np.ndarray:
        """The rows of a lane at ``start:stop``."""
        pieces = []
        while start < stop:
            number, inside = divmod(start, self._block)
            piece = self._kept(lane, number)[inside : inside + stop - start]
            pieces.append(piece)
            start += len(piece)
        return np.concatenate(pieces)

    def _kept(self, lane: int, number: int) -> np.ndarray:
        """A block of a lane, computed unless it was needed not long ago."""
        place = lane, number
        if place not in self._blocks:
            while len(self._blocks) * self._block * 8 >= _CACHED_BYTES:
                self._blocks.popitem(last=False)
            start = number * self._block
            self._blocks[place] = self._computed(lane, start, min(start + self._block, self._counts[lane]))
        self._blocks.move_to_end(place)
        return self._blocks[place]

    def _computed(self, lane: int, start: int, stop: int) -> np.ndarray:
        # A row moves by less than the window: what is sorted to these places comes from no farther away.
        low, high = max(0, start - self._buffer - 1), min(self._counts[lane], stop + self._buffer + 1)
        places = np.arange(low, high)
        draws = _uniform(places + self._begins[lane], self._key)
        chosen = np.argsort(places + draws * self._buffer, kind="stable")[start - low : stop - low]
        return self._sequence(self._begins[lane] + low, self._begins[lane] + high)[chosen]

    def _sequence(self, start: int, stop: int) -> np.ndarray:
        """The rows at ``start:stop`` before they are shuffled.

        Row j of a track of n rows stands at (j + ½)/n of the epoch: so each stretch holds every track in proportion.
        """
        if len(self._tracks) == 1:
            return self._tracks[0].rows(np.arange(start, stop))
        some = len(self._tracks)
        rows, shares, before = [], [], 0
        for track in self._tracks:
            first = _standing_before((start - some) / self._n, len(track))
            last = _standing_before((stop + some) / self._n, len(track))
            places = np.arange(first, last)
            rows.append(track.rows(places))
            shares.append((places + 0.5) / max(len(track), 1))
            before += first
        together = np.concatenate(rows)[np.argsort(np.concatenate(shares), kind="stable")]
        return together[start - before : stop - before]


def _share(size: int, lane: int, lanes: int) -> int:
    """What a lane gives to a batch."""
    return size * (lane + 1) // lanes - size * lane // lanes


def _standing_before(share: float, n: int) -> int:
    """How many rows of a track of n stand before a share of the epoch."""
    return min(n, max(0, math.ceil(share * n - 0.5)))


def _uniform(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """A draw from [0, 1) for each number, by SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
