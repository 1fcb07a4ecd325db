"""Where each sample lies in its tar, as arrow columns: scanned once, then mapped from a saved file.

Scanning reads each header; for millions of members that takes minutes. The result is kept in the cache under a name
made of path, size and modification time of every tar, and used by later runs and by the other ranks of a host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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

_FORMAT = 4
_MIN_SAVED_BYTES = 64 * 1024 * 1024  # tars smaller than this together are scanned faster than it is worth a file
_DOTTED = "files", "whose key has a dot, as WebDataset's key ends at the first"
_REPEATED = "files", "of a name that the tar holds before"
_PARTS = frozenset((*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS))
_COLUMNS = ("image_offset", "image_size", "caption_offset", "caption_size")


def group_members(members: Sequence[Member], extensions: Sequence[Sequence[str]]) -> dict[str, list[Member | None]]:
    """Sorts the members of a tar into samples.

    Unlike a WebDataset stream, the files of a sample need not be neighbours.

    Args:
        members: The members of one tar.
        extensions: For each part of a sample the extensions it may have, the preferred one first.

    Returns:
        For each key that has any of the parts, in order of appearance, the member of each part or None.
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


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One row a sample over several tars; a truncated tar has one more, whose image offset is ``CUT``.

    Attributes:
        sizes: Rows of each tar.
        cuts: By tar, what is missing at its end.
        keys: The samples' keys, ``large_string``.
        places: ``(N,)`` int64 each: offset and size of the image, offset and size of the caption, in bytes.
        file: The file that the arrays are mapped from; None when they are in memory.
        left_out: What lies in the tars and is in no row though it looks like a part of one, one line a kind.
    """

    sizes: tuple[int, ...]
    cuts: dict[int, str]
    keys: pa.Array
    places: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    file: Path | None = None
    left_out: tuple[str, ...] = ()
    _ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum(self.sizes))

    def __len__(self) -> int:
        return len(self.keys)

    def shard(self, row: int) -> int:
        """The tar that holds a row."""
        return int(np.searchsorted(self._ends, row, side="right"))

    def complete(self, shard: int) -> int:
        """Samples of one tar, without the row that stands for a loss."""
        return self.sizes[shard] - (shard in self.cuts)

    def __reduce__(self) -> Any:
        # To a spawned worker goes the name of the file, not its content.
        if self.file is not None and touch(self.file):
            return _read, (self.file,)
        return ShardIndex, (self.sizes, self.cuts, self.keys, self.places)


def open_index(reader: TarReader, cache: Cache, *, beside: bool = False) -> ShardIndex:
    """The index of some tars: the cached one if it is of these very files, else a new one.

    Args:
        reader: The tars.
        cache: Where it is kept, for tars of 64 MiB or more together. Where that cannot be written, it is not kept.
        beside: The one tar lies in the cache, and its index is kept beside it, whatever its size.

    Raises:
        InputError: A tar is missing or is no tar.
    """
    facts: list[tuple[str, int, int]] = []
    for path in reader.paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        facts.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    if not beside and sum(size for _, size, _ in facts) < _MIN_SAVED_BYTES:
        return scan_index(reader)
    key = hashlib.blake2b(json.dumps([_FORMAT, facts]).encode(), digest_size=16).hexdigest()
    scanned: list[ShardIndex] = []

    def make(target: Path) -> None:
        scanned.append(scan_index(reader))
        _write(scanned[0], target, key)

    for _ in range(2):  # again where the file is damaged, or of a shard that was fetched anew
        with contextlib.suppress(InputError):  # the folder cannot be written; or of a tar, which then says so below
            file = cache.beside(reader.paths[0], make) if beside else cache.get("indices", f"{key}.arrow", make)
            if (saved := _saved(file, key)) is not None:
                return saved
            cache.drop(file)
        if scanned:
            return scanned[0]
    return scan_index(reader)


def scan_index(reader: TarReader) -> ShardIndex:
    """The index of some tars, made anew."""
    keys: list[pa.Array] = []
    places: list[np.ndarray] = []
    cuts: dict[int, str] = {}
    odd: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for i, path in enumerate(reader.paths):
        listing = reader.listing(i)
        for kind, name in _left_out(listing):
            odd[kind] += 1
            examples.setdefault(kind, printable(f"{path.name}/{name}"))
        shard_keys, shard_places = _index_one(listing)
        if listing.cut is not None:
            cuts[i] = listing.cut
        keys.append(pa.array(shard_keys, pa.large_string()))
        places.append(shard_places)
    a, b, c, d = np.ascontiguousarray(np.concatenate(places).T)
    left_out = tuple(f"{counted(n, kind[0])} {kind[1]}, e.g. {examples[kind]}" for kind, n in odd.items())
    sizes = tuple(len(k) for k in keys)
    return ShardIndex(sizes, cuts, pa.concat_arrays(keys), (a, b, c, d), left_out=left_out)


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


def _index_one(listing: TarListing) -> tuple[list[str], np.ndarray]:
    samples = group_members(listing.members, (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS))
    if listing.cut is not None and samples:
        # The last sample of a cut shard may have lost its second file: it is part of the loss, not one more.
        last = next(reversed(samples))
        if None in samples[last]:
            del samples[last]
    keys = [printable(key) for key in samples]
    rows = [
        [number for member in sample for number in ((member.offset, member.size) if member else (ABSENT, 0))]
        for sample in samples.values()
    ]
    if listing.cut is not None:
        keys.append("")
        rows.append([CUT, 0, CUT, 0])
    return keys, np.array(rows, np.int64).reshape(-1, 4)


def _write(index: ShardIndex, file: Path, key: str) -> None:
    about = {"key": key, "sizes": index.sizes, "cuts": list(index.cuts.items()), "left_out": index.left_out}
    table = pa.table(
        {"key": index.keys, **{name: pa.array(column) for name, column in zip(_COLUMNS, index.places, strict=True)}}
    ).replace_schema_metadata({"cloob": json.dumps(about)})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _saved(file: Path, key: str) -> ShardIndex | None:
    """What a file holds if it is whole and has this key."""
    try:
        return _read(file, key)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


def _read(file: Path, key: str | None = None) -> ShardIndex:
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    about = json.loads(table.schema.metadata[b"cloob"])
    if key not in (None, about["key"]):
        raise KeyError(key)
    columns = [table.column(name).combine_chunks() for name in ("key", *_COLUMNS)]
    a, b, c, d = (column.to_numpy(zero_copy_only=False) for column in columns[1:])
    sizes, cuts = tuple(about["sizes"]), {int(i): cut for i, cut in about["cuts"]}
    return ShardIndex(sizes, cuts, columns[0], (a, b, c, d), file, tuple(about["left_out"]))
