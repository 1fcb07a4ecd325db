"""Sources of pairs: several as one, a part of one, the held-out split; and digests, by
which a run notices other data.

A fingerprint is of content as far as that is cheap: a table's two columns, names and
sizes in tars and folders.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cloob.data.batch import BadSample, RawSample, Reader, caption_id
from cloob.errors import InputError, require
from cloob.machine import decoders, in_threads
from cloob.pictures import Encoded, Unreadable

if TYPE_CHECKING:  # models need a digest, and no pyarrow
    import pyarrow as pa

IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "jfif",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "heic",
    "heif",
    "jxl",
)
CAPTION_EXTENSIONS = ("txt", "caption")
IMAGE_SUFFIXES, CAPTION_SUFFIXES = (
    tuple(f".{ext}" for ext in exts) for exts in (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS)
)
Fingerprint = dict[str, int | str]  # name -> count or digest

# of a folder that are opened at most: every one costs a call, on a network a round trip
MAX_FILES = 100_000


class Source(Protocol):
    """Pairs by number.

    Picklable, cheap to copy into a worker, and safe to read from several processes.

    ``shard_sizes`` are the numbers of consecutive rows that lie in one file; they add
    up to ``len``. A source may also have ``prefetch(indices)``: the loader calls it
    with the numbers of pairs that will be read soon.
    """

    name: str
    shard_sizes: tuple[int, ...]
    streamed: bool = False
    """Whether reading in random order is costly: the loader then reads file by file."""

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


class MixedSource(Source):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.name = " + ".join(part.name for part in parts)
        self.shard_sizes = tuple(size for part in parts for size in part.shard_sizes)
        self.streamed = any(part.streamed for part in parts)
        self.bounds = np.cumsum([0, *map(len, parts)])

    def read(self, index: int) -> RawSample:
        part = int(np.searchsorted(self.bounds[1:], index, side="right"))
        return self.parts[part].read(index - int(self.bounds[part]))

    def fingerprint(self) -> Fingerprint:
        numbered = enumerate((part.fingerprint() for part in self.parts), 1)
        return {
            f"{key} of source {i}": value
            for i, one in numbered
            for key, value in one.items()
        }


def mix(sources: Sequence[Source]) -> Source:
    return sources[0] if len(sources) == 1 else MixedSource(sources)


def pictures_of(source: Any) -> np.ndarray | None:
    """(N,) int64: per row of a source the first that names the same picture; None where
    no two do.
    """
    if isinstance(source, MixedSource):
        parts = [pictures_of(part) for part in source.parts]
        if all(same is None for same in parts):
            return None
        item = zip(source.bounds, source.parts, parts, strict=False)
        return np.concatenate(
            [
                start + (range(len(part)) if same is None else same)
                for start, part, same in item
            ]
        )
    same = (
        pictures_of(source.source)
        if isinstance(source, Subset)
        else getattr(source, "pictures", lambda: None)()
    )
    if same is None:
        return None
    same = same[source.rows] if isinstance(source, Subset) else same
    _, first, which = np.unique(same, return_index=True, return_inverse=True)
    return np.asarray(first[which])


def caption_of(source: Any, row: int) -> tuple[str, str]:
    """Key and caption of a row, without its picture where the source can; raises
    ``BadSample``.
    """
    if isinstance(source, Subset):
        return caption_of(source.source, int(source.rows[row]))
    if isinstance(source, MixedSource):
        part = int(np.searchsorted(source.bounds[1:], row, side="right"))
        return caption_of(source.parts[part], row - int(source.bounds[part]))
    if hasattr(source, "caption"):
        key, caption = source.caption(row)
        return str(key), str(caption)
    sample = source.read(row)
    return sample.key, sample.caption


class Subset(Source):
    """Some rows of a source, ascending int64; ``part`` is ``training`` or ``held
    out``.
    """

    def __init__(self, source: Source, rows: np.ndarray, part: str) -> None:
        self.source, self.rows, self.part = source, rows, part
        self.name, self.streamed = f"{source.name} ({part})", source.streamed
        # Rows that are left of every file; files of which nothing is left do not count.
        ends = np.searchsorted(rows, np.cumsum(source.shard_sizes))
        self.shard_sizes = tuple(
            size
            for start, end in pairwise([0, *ends.tolist()])
            if (size := end - start)
        )

    def fingerprint(self) -> Fingerprint:
        return {
            **self.source.fingerprint(),
            "pairs": len(self),
            f"rows that are {self.part}": digest([self.rows]),
        }

    def read(self, index: int) -> RawSample:
        return self.source.read(int(self.rows[index]))


def prefetch(source: Source, indices: np.ndarray) -> None:
    """Has the files of rows that will be read soon prepared, where a source can."""
    if isinstance(source, Subset):
        prefetch(source.source, source.rows[indices])
    elif isinstance(source, MixedSource):
        owners = np.searchsorted(source.bounds[1:], indices, side="right")
        for i, part in enumerate(source.parts):
            prefetch(part, indices[owners == i] - source.bounds[i])
    elif hasattr(source, "prefetch"):
        source.prefetch(indices)


def choose_held_out(sources: Sequence[Source], share: float) -> list[np.ndarray]:
    """The held-out rows of every source, ascending int64: at most ``share`` of all, at
    least two.

    Pairs of equal pictures or captions are held out together, with all that they are
    linked to, in the order of a hash.
    """
    places, groups = _groups(sources)
    chosen: list[list[int]] = [[] for _ in sources]
    left = most = min(max(2, round(share * len(places))), len(places) - 1)
    for members in groups:
        pairs = [places[pair] for pair in members]
        if len(pairs) <= left:
            with contextlib.suppress(BadSample, Unreadable):
                for source, row in pairs:
                    Encoded(sources[source].read(row).image).rgb(reduction=8)
                left -= len(pairs)
                for source, row in pairs:
                    chosen[source].append(row)
    emptied = [
        source.name
        for source, rows in zip(sources, chosen, strict=True)
        if len(rows) == len(source)
    ]
    if most - left < 2 or emptied:
        of_all = (
            f"val_split is {share:g}: of {len(places):,} usable pairs {most - left} can"
            " be held out"
        )
        wrong = f"{emptied[0]}: all its pairs would be held out" if emptied else of_all
        raise InputError(
            f"{wrong} without a picture or caption that the others have too; give"
            " --val-data"
        )
    return [np.array(sorted(rows), np.int64) for rows in chosen]


def split(
    sources: Sequence[Source], held_out: Sequence[np.ndarray]
) -> tuple[Source, Source]:
    """The training pairs and the held-out pairs, as :func:`choose_held_out` chose
    them.
    """
    others = [
        np.setdiff1d(np.arange(len(source)), rows)
        for source, rows in zip(sources, held_out, strict=True)
    ]
    train = [
        Subset(source, rows, "training")
        for source, rows in zip(sources, others, strict=True)
    ]
    val = [
        Subset(source, rows, "held out")
        for source, rows in zip(sources, held_out, strict=True)
        if len(rows)
    ]
    return mix(train), mix(val)


def _groups(sources: Sequence[Source]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Source and row of the readable pairs; and the groups of their numbers, in the
    order of a hash.
    """
    sparse, csgraph = (
        require("scipy.sparse", "train"),
        require("scipy.sparse.csgraph", "train"),
    )
    first: dict[bytes | int, int] = {}  # the first pair with a picture or caption
    places, hashes = list[tuple[int, int]](), list[bytes]()
    # from a pair to the first with its picture, and to the first with its caption
    links: list[int] = []

    def digests(place: tuple[int, int]) -> tuple[bytes, int] | None:
        source, row = place
        try:
            sample = sources[source].read(row)
        except BadSample:
            return None
        return hashlib.blake2b(sample.image, digest_size=16).digest(), caption_id(
            sample.caption
        )

    every = [(i, row) for i, source in enumerate(sources) for row in range(len(source))]
    workers = decoders()
    for place, keys in zip(
        every, in_threads(digests, every, workers, 4 * workers), strict=True
    ):
        if keys is not None:
            links += (first.setdefault(key, len(places)) for key in keys)
            places.append(place)
            hashes.append(
                hashlib.blake2b(
                    keys[0] + keys[1].to_bytes(8, "little"), digest_size=16
                ).digest()
            )
    edges = np.ones(len(links), bool), (np.repeat(np.arange(len(places)), 2), links)
    graph = sparse.coo_array(edges, shape=(len(places), len(places)))
    groups: dict[int, list[int]] = {}
    for pair, group in enumerate(
        csgraph.connected_components(graph, directed=False)[1].tolist()
    ):
        groups.setdefault(group, []).append(pair)
    return places, sorted(
        groups.values(), key=lambda members: min(hashes[pair] for pair in members)
    )


def add_part(state: Any, part: str | bytes | np.ndarray) -> None:
    """Adds a part and its length to a digest, so that no two lists of parts are the
    same bytes.
    """
    part = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
    data = (
        np.ascontiguousarray(part).data
        if isinstance(part, np.ndarray)
        else memoryview(part)
    )
    state.update(data.nbytes.to_bytes(8, "little"))
    state.update(data)


def digest(parts: Iterable[str | bytes | np.ndarray]) -> str:
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
        try:
            sample = reader.read(index)
            key, data, *_ = (
                sample if isinstance(sample, tuple) else (sample.key, sample.image)
            )
            parts: tuple[str | bytes, ...] = (key, data, getattr(sample, "caption", ""))
        except BadSample as bad:
            parts = ("\0".join((bad.key, bad.reason, *bad.captions)),)
        for part in parts:
            add_part(state, part)
    return state.hexdigest()


def of_column(column: pa.ChunkedArray) -> str:
    """The digest of a column of texts or bytes, however it is cut into chunks; a second
    for half a gigabyte.
    """
    import pyarrow as pa

    values, lengths = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for chunk in filter(len, column.chunks):
        chunk = (
            chunk.cast(pa.large_string()) if pa.types.is_string(chunk.type) else chunk
        )
        chunk = chunk.cast(pa.large_binary())
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[
            chunk.offset : chunk.offset + len(chunk) + 1
        ]
        sizes = np.diff(ends)
        sizes[chunk.is_null().to_numpy(zero_copy_only=False)] = -1
        lengths.update(sizes.data)
        if data is not None:
            values.update(memoryview(data)[int(ends[0]) : int(ends[-1])])
    return digest([values.digest(), lengths.digest()])


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """In what two fingerprints differ: counts with both values, digests by name."""
    changed = {
        key: (before.get(key), now.get(key))
        for key in before | now
        if before.get(key) != now.get(key)
    }
    return [
        (
            f"{old:,} {key} before, {new:,} now"
            if isinstance(old, int) and isinstance(new, int)
            else f"other {key}"
        )
        for key, (old, new) in changed.items()
    ]


def spread(n: int, most: int = MAX_FILES) -> list[int]:
    """All of range(n), or ``most`` of it, evenly spread."""
    count = min(n, most)
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]
