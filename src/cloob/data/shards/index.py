"""Where each sample lies in its tar, as Arrow columns: scanned once, then mapped from a file in the cache.

The file's name is made of path, size and modification time of every tar. Later runs and the other ranks of a host use
it: reading the headers of millions of members takes minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cloob.cache import Cache, touch
from cloob.data.batch import printable
from cloob.data.shards.tar import Member, TarListing, TarReader, split_name
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.errors import InputError, counted

ABSENT = -1
"""Offset of a part that a sample does not have."""
CUT = -2
"""Offset of the image in the row that stands for what a truncated shard has lost."""

_FORMAT = 5
_MIN_SAVED_BYTES = 64 * 1024 * 1024  # smaller tars are scanned faster than it is worth a file
_DOTTED = "files", "whose key has a dot, as WebDataset's key ends at the first"
_REPEATED = "files", "of a name that the tar holds before"
_PARTS = frozenset((*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS))


def group_members(members: Sequence[Member], extensions: Sequence[Sequence[str]]) -> dict[str, list[Member | None]]:
    """The samples of one tar by key, in order of appearance: the member of each part, or None.

    ``extensions`` are those that each part may have, the preferred one first. The files of a sample need not be
    neighbours.
    """
    place = {ext: (part, rank) for part, group in enumerate(extensions) for rank, ext in enumerate(group)}
    samples: dict[str, list[Member | None]] = {}
    ranks: dict[tuple[str, int], int] = {}
    for member in members:
        names = split_name(member.name)
        if names is None or names[1] not in place:
            continue
        key, (part, rank) = names[0], place[names[1]]
        sample = samples.setdefault(key, [None] * len(extensions))
        if rank < ranks.get((key, part), len(place)):
            sample[part], ranks[key, part] = member, rank
    return samples


class ShardIndex:
    """One row a sample over several tars; a truncated tar has one more, whose image offset is ``CUT``.

    Attributes:
        keys: The samples' keys, ``large_string``.
        places: ``(N,)`` int64 each: offset and size of the image, offset and size of the caption, in bytes.
        sizes: Rows of each tar.
        cuts: By tar, what is missing in it.
        left_out: What looks like a part of a sample and is in no row, one line a kind.
    """

    def __init__(self, table: pa.Table, file: Path | None = None) -> None:
        about = json.loads(table.schema.metadata[b"cloob"])
        self.keys, *places = (column.combine_chunks() for column in table.columns)
        self.places = tuple(column.to_numpy(zero_copy_only=False) for column in places)
        self.sizes: tuple[int, ...] = tuple(about["sizes"])
        self.cuts: dict[int, str] = {int(tar): cut for tar, cut in about["cuts"].items()}
        self.left_out: tuple[str, ...] = tuple(about["left_out"])
        self._table, self._file = table, file
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return len(self.keys)

    def shard(self, row: int) -> int:
        """The tar that holds a row."""
        return int(np.searchsorted(self._ends, row, side="right"))

    def complete(self, shard: int) -> int:
        """Samples of one tar, without the row that stands for a loss."""
        return self.sizes[shard] - (shard in self.cuts)

    def write(self, file: Path) -> None:
        """Writes what can be mapped again."""
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, self._table.schema) as writer:
            writer.write_table(self._table)

    def __reduce__(self) -> Any:
        # A spawned worker gets the name of the file, not its content.
        if self._file is not None and touch(self._file):
            return _map, (self._file,)
        return ShardIndex, (self._table,)


def open_index(reader: TarReader, cache: Cache, *, always: bool = False) -> ShardIndex:
    """The index of some tars: the cached one if it is of these very files, else a new one.

    It is kept for tars of 64 MiB or more together, or ``always``; where the cache cannot be written, it is not.
    """
    facts: list[tuple[str, int, int]] = []
    for path in reader.paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        facts.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    scanned: list[ShardIndex] = []

    def scan_into(target: Path) -> None:
        scanned.append(scan_index(reader))
        scanned[-1].write(target)

    if always or sum(size for _, size, _ in facts) >= _MIN_SAVED_BYTES:
        key = hashlib.blake2b(json.dumps([_FORMAT, facts]).encode(), digest_size=16).hexdigest()
        for _ in range(2):  # again where the file is damaged
            with contextlib.suppress(InputError):  # the cache cannot be written; or of a tar, which then says so below
                file = cache.get("indices", f"{key}.arrow", scan_into)
                with contextlib.suppress(OSError, ValueError, KeyError, pa.ArrowException):
                    return _map(file)
                cache.drop(file)
    return scanned[-1] if scanned else scan_index(reader)


def scan_index(reader: TarReader) -> ShardIndex:
    """The index of some tars, made anew."""
    keys: list[pa.Array] = []
    places: list[np.ndarray] = []
    cuts: dict[int, str] = {}
    odd: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for number, path in enumerate(reader.paths):
        listing = reader.listing(number)
        for kind, name in _left_out(listing):
            odd[kind] += 1
            examples.setdefault(kind, printable(f"{path.name}/{name}"))
        shard_keys, shard_places = _rows(listing)
        if listing.cut is not None:
            cuts[number] = listing.cut
        keys.append(pa.array(shard_keys, pa.large_string()))
        places.append(shard_places)
    about = {
        "sizes": [len(each) for each in keys],
        "cuts": cuts,
        "left_out": [f"{counted(n, kind[0])} {kind[1]}, e.g. {examples[kind]}" for kind, n in odd.items()],
    }
    names = ("image_offset", "image_size", "caption_offset", "caption_size")
    columns = dict(zip(names, map(pa.array, np.ascontiguousarray(np.concatenate(places).T)), strict=True))
    table = pa.table({"key": pa.concat_arrays(keys), **columns})
    return ShardIndex(table.replace_schema_metadata({"cloob": json.dumps(about)}))


def _left_out(listing: TarListing) -> Iterator[tuple[tuple[str, str], str]]:
    """What looks like a part of a sample and is none: its kind and its name."""
    seen: set[tuple[str, str]] = set()
    dotted: list[tuple[str, str]] = []
    for member in listing.members:
        key, extension = split_name(member.name) or ("", "")
        if extension in _PARTS:
            if (key, extension) in seen:
                yield _REPEATED, member.name
            seen.add((key, extension))
        elif extension.rpartition(".")[2] in _PARTS:
            dotted.append((key, member.name))
    keys = {key for key, _ in seen} if dotted else set()
    yield from ((_DOTTED, name) for key, name in dotted if key not in keys)  # a.seg.png beside a.jpg is meant so


def _rows(listing: TarListing) -> tuple[list[str], np.ndarray]:
    """Keys and places of a tar's samples."""
    samples = group_members(listing.members, (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS))
    if listing.cut is not None and samples and None in samples[last := next(reversed(samples))]:
        del samples[last]  # the last sample of a cut shard may have lost its second file: no loss of its own
    keys = [printable(key) for key in samples]
    rows = [
        [number for member in sample for number in ((member.offset, member.size) if member else (ABSENT, 0))]
        for sample in samples.values()
    ]
    if listing.cut is not None:
        keys.append("")
        rows.append([CUT, 0, CUT, 0])
    return keys, np.array(rows, np.int64).reshape(-1, 4)


def _map(file: Path) -> ShardIndex:
    with pa.memory_map(str(file)) as source:
        return ShardIndex(pa.ipc.open_file(source).read_all(), file)
