"""Sources of pairs: several as one, a part of one, the held-out split; and digests, by
which a run notices other data.

A fingerprint is of content as far as that is cheap: a table's two columns, names and
sizes in tars and folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cloob.data.batch import BadSample, RawSample, Reader, caption_id
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

    def pictures(self) -> np.ndarray | None:
        """(N,) int64: per row the first that names the same picture; None where no two
        do.
        """
        return None

    def prefetch(self, indices: np.ndarray, /) -> None:
        """Has the files of rows that will be read soon prepared."""
        return


class MixedSource(Source):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.name = " + ".join(part.name for part in parts)
        self.shard_sizes = tuple(size for part in parts for size in part.shard_sizes)
        self.streamed = any(part.streamed for part in parts)
        self._ends = np.cumsum(list(map(len, parts)))
        self._starts = [0, *self._ends[:-1].tolist()]

    def read(self, index: int) -> RawSample:
        part, row = self._place(index)
        return part.read(row)

    def caption(self, index: int) -> tuple[str, str]:
        part, row = self._place(index)
        return part.caption(row)

    def _place(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - self._starts[part]

    def pictures(self) -> np.ndarray | None:
        """As of every part, in rows of all parts together; None where no picture
        repeats.
        """
        pictures = [part.pictures() for part in self.parts]
        if all(same is None for same in pictures):
            return None
        columns = []
        for start, part, same in zip(self._starts, self.parts, pictures, strict=True):
            columns.append(start + (np.arange(len(part)) if same is None else same))
        return np.concatenate(columns)

    def prefetch(self, indices: np.ndarray) -> None:
        owners = np.searchsorted(self._ends, indices, side="right")
        for number, part in enumerate(self.parts):
            part.prefetch(indices[owners == number] - self._starts[number])

    def fingerprint(self) -> Fingerprint:
        found: Fingerprint = {}
        for number, part in enumerate(self.parts, 1):
            for key, value in part.fingerprint().items():
                found[f"{key} of source {number}"] = value
        return found


def mix(sources: Sequence[Source]) -> Source:
    """One source of several."""
    return sources[0] if len(sources) == 1 else MixedSource(sources)


class Subset(Source):
    """Some rows of a source, ascending int64; ``part`` is ``training`` or ``held
    out``.
    """

    def __init__(self, source: Source, rows: np.ndarray, part: str) -> None:
        self.source, self.rows, self.part = source, rows, part
        self.name, self.streamed = f"{source.name} ({part})", source.streamed
        ends = np.searchsorted(rows, np.cumsum(source.shard_sizes))
        sizes = np.diff(ends, prepend=0)
        # files of which nothing is left do not count
        self.shard_sizes = tuple(sizes[sizes > 0].tolist())

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

    def pictures(self) -> np.ndarray | None:
        same = self.source.pictures()
        return None if same is None else first_equal(same[self.rows])

    def prefetch(self, indices: np.ndarray) -> None:
        self.source.prefetch(self.rows[indices])


def first_equal(column: np.ndarray) -> np.ndarray:
    """(N,) int64 the first place that holds the same as a place."""
    _, firsts, which = np.unique(column, return_index=True, return_inverse=True)
    return np.asarray(firsts[which])


def linked(first: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """(N,) the least of ``first`` among all rows that a row is linked to, by equal
    numbers in any column.
    """
    sparse = require("scipy.sparse", "train")
    csgraph = require("scipy.sparse.csgraph", "train")
    n = len(first)
    edges = [first_equal(column) for column in (first, *columns)]
    ends = np.tile(np.arange(n), len(edges)), np.concatenate(edges)
    graph = sparse.coo_array((np.ones(len(ends[0]), bool), ends), shape=(n, n))
    _, component = csgraph.connected_components(graph, directed=False)
    least = np.full(component.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, component, first)
    return np.asarray(least[component])


def choose_held_out(sources: Sequence[Source], share: float) -> list[np.ndarray]:
    """The held-out rows of every source, ascending int64: at most ``share`` of all, at
    least two.

    Pairs of equal pictures or captions are held out together, with all that they are
    linked to, in the order of a hash.
    """
    chosen: list[list[int]] = [[] for _ in sources]
    places, groups = _linked_pairs(sources)
    n = len(places)
    n_wanted = min(max(2, round(share * n)), n - 1)
    n_chosen = 0
    for members in groups:
        pairs = [places[pair] for pair in members]
        if len(pairs) <= n_wanted - n_chosen and _can_be_decoded(sources, pairs):
            n_chosen += len(pairs)
            for source, row in pairs:
                chosen[source].append(row)
    held_out = [np.array(sorted(rows), np.int64) for rows in chosen]
    _check_split(sources, held_out, f"val_split is {share:g}: of {n:,} usable pairs")
    return held_out


def _linked_pairs(
    sources: Sequence[Source],
) -> tuple[list[tuple[int, int]], Iterator[np.ndarray]]:
    """Source and row of the readable pairs; and the groups of their numbers, in the
    order of a hash.
    """
    places: list[tuple[int, int]] = []
    columns: list[tuple[int, int, int]] = []

    def hashes(place: tuple[int, int]) -> tuple[int, int, int] | None:
        """Three numbers by which copies of a pair, its picture and its caption are
        known; None of a bad pair.
        """
        source, row = place
        try:
            sample = sources[source].read(row)
        except BadSample:
            return None
        picture = hashlib.blake2b(sample.image, digest_size=16).digest()
        caption = caption_id(sample.caption)
        pair = hashlib.blake2b(picture + caption.to_bytes(8, "little"), digest_size=16)
        return _number(pair.digest()), _number(picture), caption

    every = [(i, row) for i, source in enumerate(sources) for row in range(len(source))]
    workers = decoders()
    found = in_threads(hashes, every, workers, 4 * workers)
    for place, numbers in zip(every, found, strict=True):
        if numbers is not None:
            places.append(place)
            columns.append(numbers)
    if not places:
        return [], iter([])
    groups = linked(*np.array(columns, np.int64).T)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return places, iter(np.split(order, starts))


def _number(digest: bytes) -> int:
    """The first 63 bits, in the order of the bytes."""
    return int.from_bytes(digest[:8], "big") >> 1


def _can_be_decoded(
    sources: Sequence[Source], places: Iterable[tuple[int, int]]
) -> bool:
    try:
        for source, row in places:
            Encoded(sources[source].read(row).image).rgb(reduction=8)
    except (BadSample, Unreadable):
        return False
    return True


def _check_split(
    sources: Sequence[Source], held_out: Sequence[np.ndarray], of_all: str
) -> None:
    """Refuses a split with fewer than two held-out pairs, or that leaves a source
    nothing to train on.
    """
    wrong = ""
    n_chosen = sum(map(len, held_out))
    if n_chosen < 2:
        wrong = f"{of_all} {n_chosen} can be held out"
    for source, rows in zip(sources, held_out, strict=True):
        if len(rows) == len(source):
            wrong = f"{source.name}: all its pairs would be held out"
    if wrong:
        raise InputError(
            f"{wrong} without a picture or caption that the others have too; give"
            " --val-data"
        )


def split(
    sources: Sequence[Source], held_out: Sequence[np.ndarray]
) -> tuple[Source, Source]:
    """The training pairs and the held-out pairs, as :func:`choose_held_out` chose
    them.
    """
    train: list[Source] = []
    val: list[Source] = []
    for source, rows in zip(sources, held_out, strict=True):
        training_rows = np.setdiff1d(np.arange(len(source)), rows)
        train.append(Subset(source, training_rows, "training"))
        if len(rows):
            val.append(Subset(source, rows, "held out"))
    return mix(train), mix(val)


def add_part(state: hashlib.blake2b, part: str | bytes | np.ndarray) -> None:
    """Adds a part and its length to a digest, so that no two lists of parts are the
    same bytes.
    """
    if isinstance(part, str):
        part = part.encode("utf-8", "surrogateescape")
    array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
    data = np.ascontiguousarray(array).data
    state.update(data.nbytes.to_bytes(8, "little"))
    state.update(data)


def digest(parts: Iterable[str | bytes | np.ndarray]) -> str:
    """Sixteen hexadecimal digits that other parts do not give."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        add_part(state, part)
    return state.hexdigest()


def content_key(reader: Reader) -> str:
    """A digest of all that the samples of a set consist of, in order; names and times
    of files do not count.
    """
    state = hashlib.blake2b(digest_size=16)
    for index in range(len(reader)):
        for part in _content(reader, index):
            add_part(state, part)
    return state.hexdigest()


def _content(reader: Reader, index: int) -> tuple[str | bytes, ...]:
    """What a fingerprint has of a pair: key, picture and caption, or why it is bad."""
    try:
        sample = reader.read(index)
    except BadSample as bad:
        return ("\0".join((bad.key, bad.reason, *bad.captions)),)
    if isinstance(sample, tuple):
        key, data, *_ = sample
        return key, data, ""
    return sample.key, sample.image, getattr(sample, "caption", "")


def of_column(column: pa.ChunkedArray) -> str:
    """The digest of a column of texts or bytes, however it is cut into chunks; a second
    for half a gigabyte.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = hashlib.blake2b(digest_size=8)
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    column = column.cast(pa.large_binary())
    for chunk in filter(len, column.chunks):
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset :]
        if data is not None:
            values.update(memoryview(data)[ends[0] : ends[len(chunk)]])
    lengths = pc.fill_null(pc.binary_length(column), -1).to_numpy()
    return digest([values.digest(), hashlib.blake2b(lengths, digest_size=8).digest()])


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """In what two fingerprints differ: counts with both values, digests by name."""
    changes = []
    for key in before | now:
        old, new = before.get(key), now.get(key)
        if isinstance(old, int) and isinstance(new, int) and old != new:
            changes.append(f"{old:,} {key} before, {new:,} now")
        elif old != new:
            changes.append(f"other {key}")
    return changes


def spread(n: int, most: int = MAX_FILES) -> list[int]:
    """All of range(n), or ``most`` of it, evenly spread."""
    count = min(n, most)
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]
