"""Sources of pairs: several as one, a part of one, the held-out split; and digests, by
which a run notices other data.

A fingerprint is of content as far as that is cheap: a table's two columns, names and
sizes in tars and folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cloob.data.batch import BadSample, RawSample, caption_id
from cloob.errors import InputError, require
from cloob.machine import decoders, in_threads
from cloob.pictures import Encoded, Unreadable

if TYPE_CHECKING:  # models need a digest, and no pyarrow
    import pyarrow as pa

_OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", *_OTHER_IMAGES)
CAPTION_EXTENSION = "txt"
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
CAPTION_SUFFIX = f".{CAPTION_EXTENSION}"
Fingerprint = dict[str, int | str]  # name -> count or digest

# of a folder that are opened at most: every one costs a call, on a network a round trip
MAX_FILES = 100_000


class ShardSizes(NamedTuple):
    """What the order of an epoch knows of a source."""

    shard_sizes: tuple[int, ...]  # rows of every file
    streamed: bool = False  # costly to read in random order


class Source(Protocol):
    """Pairs by number.

    Picklable, cheap to copy into a worker, and safe to read from several processes.

    ``shard_sizes`` are the numbers of consecutive rows that lie in one file; they add
    up to ``len``.
    """

    name: str
    shard_sizes: tuple[int, ...]
    streamed: bool = False
    """Whether reading in random order is costly: the loader then reads file by file."""
    remark: str = ""
    """What a user should know of it, such as what was left out."""

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @property
    def parts(self) -> tuple[ShardSizes, ...]:
        """One of a source, several of mixed ones, through which an epoch spreads
        them.
        """
        return (ShardSizes(self.shard_sizes, self.streamed),)

    def fingerprint(self) -> Fingerprint:
        """A few digests and counts of the content: equal for equal data, wherever they
        lie.
        """

    def read(self, index: int, /) -> RawSample:
        """The pair at ``index`` in [0, len); raises ``BadSample`` when it cannot be
        used.
        """

    def caption(self, index: int, /) -> tuple[str, str]:
        """Key and caption of a pair, without its picture where the source can; raises
        ``BadSample``.
        """
        sample = self.read(index)
        return sample.key, sample.caption

    def first_rows(self) -> np.ndarray | None:
        """(N,) int64: per row the first that names the same picture; None where no two
        do.
        """
        return None

    def groups(self) -> np.ndarray:
        """(N,) int64 numbers, equal for pairs with one picture or caption, and all that
        these are linked to; −1 for a pair that cannot be read. Reads all.
        """
        return _linked_rows(self)

    def prefetch(self, indices: np.ndarray, /) -> None:
        """Has the files of rows that will be read soon prepared."""
        return


class MixedSource(Source):
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.name = " + ".join(source.name for source in sources)
        self.streamed = any(source.streamed for source in sources)
        self.shard_sizes = tuple(
            size for source in sources for size in source.shard_sizes
        )
        self._starts = starts_of(map(len, sources))

    @property
    def parts(self) -> tuple[ShardSizes, ...]:
        return tuple(part for source in self.sources for part in source.parts)

    def read(self, index: int) -> RawSample:
        number, row = place_in(self._starts, index)
        return self.sources[number].read(row)

    def caption(self, index: int) -> tuple[str, str]:
        number, row = place_in(self._starts, index)
        return self.sources[number].caption(row)

    def first_rows(self) -> np.ndarray | None:
        """As of every source, in rows of all together; None where no picture
        repeats.
        """
        columns = [source.first_rows() for source in self.sources]
        if all(column is None for column in columns):
            return None
        first_rows = np.arange(len(self))
        for start, column in zip(self._starts, columns, strict=True):
            if column is not None:
                first_rows[start : start + len(column)] = start + column
        return first_rows

    def prefetch(self, indices: np.ndarray) -> None:
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number, source in enumerate(self.sources):
            source.prefetch(indices[numbers == number] - self._starts[number])

    def fingerprint(self) -> Fingerprint:
        parts: Fingerprint = {}
        for number, source in enumerate(self.sources, 1):
            for key, value in source.fingerprint().items():
                parts[f"{key} of source {number}"] = value
        return parts


def mix(sources: Sequence[Source]) -> Source:
    """One source of several."""
    return sources[0] if len(sources) == 1 else MixedSource(sources)


class Subset(Source):
    """Some rows of a source, ascending int64; ``part`` is ``training`` or ``held
    out``.
    """

    def __init__(self, source: Source, rows: np.ndarray, part: str) -> None:
        self.source, self.rows, self.part = source, rows, part
        self.name = f"{source.name} ({part})"
        self.streamed = source.streamed
        ends = np.searchsorted(rows, np.cumsum(source.shard_sizes))
        self.shard_sizes = tuple(np.diff(ends, prepend=0).tolist())

    @property
    def parts(self) -> tuple[ShardSizes, ...]:
        """Files of which nothing is left do not count."""
        sizes = iter(self.shard_sizes)
        parts = []
        for part in self.source.parts:
            sizes_of_part = [next(sizes) for _ in part.shard_sizes]
            parts.append(ShardSizes(tuple(filter(None, sizes_of_part)), part.streamed))
        return tuple(parts)

    def fingerprint(self) -> Fingerprint:
        return {
            **self.source.fingerprint(),
            "pairs": len(self),
            f"rows that are {self.part}": digest([self.rows]),
        }

    def read(self, index: int) -> RawSample:
        return self.source.read(int(self.rows[index]))

    def caption(self, index: int) -> tuple[str, str]:
        return self.source.caption(int(self.rows[index]))

    def first_rows(self) -> np.ndarray | None:
        first_rows = self.source.first_rows()
        return None if first_rows is None else first_equal(first_rows[self.rows])

    def prefetch(self, indices: np.ndarray) -> None:
        self.source.prefetch(self.rows[indices])


def starts_of(sizes: Iterable[int]) -> np.ndarray:
    """Where each of several parts begins, by their numbers of rows."""
    return np.cumsum([0, *sizes])[:-1]


def place_in(starts: np.ndarray, index: int) -> tuple[int, int]:
    """The number of the part that holds a row of all together, and the row in it."""
    number = int(np.searchsorted(starts, index, side="right")) - 1
    return number, index - int(starts[number])


def first_equal(column: np.ndarray) -> np.ndarray:
    """(N,) int64: per row the first that holds the same."""
    _, firsts, place = np.unique(column, return_index=True, return_inverse=True)
    return np.asarray(firsts[place])


def linked_groups(numbers: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """(N,) int64, equal for rows that are linked: by equal numbers in any column, over
    other rows too. A group is called by the least of its ``numbers``.
    """
    sparse = require("scipy.sparse", "train")
    csgraph = require("scipy.sparse.csgraph", "train")
    n = len(numbers)
    columns = (numbers, *columns)
    rows = np.tile(np.arange(n), len(columns))
    equal_rows = np.concatenate([first_equal(column) for column in columns])
    is_linked = np.ones(len(rows), bool)
    graph = sparse.coo_array((is_linked, (rows, equal_rows)), shape=(n, n))
    n_groups, group = csgraph.connected_components(graph, directed=False)
    least_number = np.full(n_groups, np.iinfo(np.int64).max)
    np.minimum.at(least_number, group, numbers)
    return np.asarray(least_number[group])


def choose_held_out(source: Source, share: float) -> np.ndarray:
    """The rows to hold out, ascending int64: at most ``share`` of all, at least two.

    Pairs of equal pictures or captions are held out together, with all that they are
    linked to, in the order of a hash.
    """
    groups = source.groups()
    readable = np.flatnonzero(groups >= 0)
    order = readable[np.argsort(groups[readable], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    n = len(readable)
    n_wanted = min(max(2, round(share * n)), n - 1)
    chosen: list[int] = []
    for group in np.split(order, starts):
        rows = group.tolist()
        if len(rows) <= n_wanted - len(chosen) and _can_be_decoded(source, rows):
            chosen += rows
    if len(chosen) < 2:
        raise InputError(
            f"val_split is {share:g}: of {n:,} usable pairs {len(chosen)} can be held"
            " out without a picture or caption that the others have too; give"
            " --val-data"
        )
    return np.array(sorted(chosen), np.int64)


def _linked_rows(source: Source) -> np.ndarray:
    """As ``Source.groups``; the numbers are hashes, of which the order is by chance."""

    def read_numbers(row: int) -> tuple[int, int, int, int] | None:
        """The row and three numbers that are equal for equal pairs, pictures and
        captions; None of a bad pair.
        """
        try:
            sample = source.read(row)
        except BadSample:
            return None
        picture = hashlib.blake2b(sample.image, digest_size=16).digest()
        caption = caption_id(sample.caption)
        pair = hashlib.blake2b(picture + caption.to_bytes(8, "little"), digest_size=16)
        return row, _number(pair.digest()), _number(picture), caption

    groups = np.full(len(source), -1)
    workers = decoders()
    every_row = in_threads(read_numbers, range(len(source)), workers, 4 * workers)
    readable = [numbers for numbers in every_row if numbers is not None]
    if readable:
        rows, *columns = np.array(readable, np.int64).T
        groups[rows] = linked_groups(*columns)
    return groups


def _number(digest: bytes) -> int:
    """The first 63 bits, in the order of the bytes."""
    return int.from_bytes(digest[:8], "big") >> 1


def _can_be_decoded(source: Source, rows: Sequence[int]) -> bool:
    try:
        for row in rows:
            Encoded(source.read(row).image).rgb(reduction=8)
    except (BadSample, Unreadable):
        return False
    return True


def split(source: Source, held_out: np.ndarray) -> tuple[Source, Source]:
    """The training pairs and the held-out pairs, as :func:`choose_held_out` chose
    them.
    """
    training = np.setdiff1d(np.arange(len(source)), held_out)
    return Subset(source, training, "training"), Subset(source, held_out, "held out")


def digest(parts: Iterable[str | bytes | np.ndarray], n_bytes: int = 8) -> str:
    """Hexadecimal digits that other parts do not give: the length of each counts, so
    that no two lists of parts are the same bytes.
    """
    state = hashlib.blake2b(digest_size=n_bytes)
    for part in parts:
        if isinstance(part, str):
            part = part.encode("utf-8", "surrogateescape")
        array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
        data = np.ascontiguousarray(array).data
        state.update(data.nbytes.to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def content_key(source: Source) -> str:
    """A digest of all that the samples of a source consist of, in order; names and
    times of files do not count.
    """
    return digest(_contents(source), 16)


def _contents(source: Source) -> Iterator[str | bytes]:
    for index in range(len(source)):
        try:
            sample = source.read(index)
            yield from (sample.key, sample.image, sample.caption)
        except BadSample as bad:
            yield from (bad.key, b"", bad.reason)


def column_digest(column: pa.ChunkedArray) -> str:
    """The digest of a column of texts or bytes, however it is cut into chunks; a second
    for half a gigabyte.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = hashlib.blake2b(digest_size=8)
    column = column.cast(pa.large_binary())
    for chunk in filter(len, column.chunks):
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int64)[chunk.offset :]
        if data is not None:
            values.update(memoryview(data)[bounds[0] : bounds[len(chunk)]])
    lengths = pc.fill_null(pc.binary_length(column), -1).to_numpy()
    return digest([values.digest(), lengths])


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """In what two fingerprints differ: counts with both values, digests by name."""
    changes = []
    for key in before | now:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, int) and isinstance(new, int):
            changes.append(f"{old:,} {key} before, {new:,} now")
        else:
            changes.append(f"other {key}")
    return changes


def spread(n: int, most: int = MAX_FILES) -> list[int]:
    """All of range(n), or ``most`` of it, evenly spread."""
    count = min(n, most)
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]
