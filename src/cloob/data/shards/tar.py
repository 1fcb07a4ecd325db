"""Pairs in WebDataset tars on this machine: ``key.jpg`` and ``key.txt`` are one sample;
an index of them is cached.
"""

from __future__ import annotations

import errno
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cloob.cache import Cache
from cloob.data.batch import (
    MOST_BYTES,
    BadSample,
    Part,
    RawSample,
    as_utf8,
    clean_caption,
    reading_part,
)
from cloob.data.shards.headers import Member, members_of
from cloob.data.source import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    Fingerprint,
    Source,
    digest,
    of_column,
)
from cloob.data.sources.files import reading
from cloob.errors import counted
from cloob.files import TooLarge

_OPENERS: dict[bytes, Callable[[Path], Any]] = {  # by the first bytes
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_MAX_OPEN_FILES = 64

_ABSENT = Member("", -1, 0)  # a part that a sample does not have
_FORMAT = 12
_PLACES = ("image_offset", "image_size", "caption_offset", "caption_size")
_INDEX = pa.schema(
    [("key", pa.large_string()), *((name, pa.int64()) for name in _PLACES)]
)
_ODD = (
    "that a tar holds twice, or whose key has a dot: WebDataset's key ends at the first"
)

Sample = list[Member | None]  # the member of every part


def group_members(
    members: Sequence[Member], extensions: Sequence[Sequence[str]]
) -> tuple[dict[str, Sample], list[str]]:
    """A tar's samples by key, with the member (or None) of every part; and the names of
    files that look like parts.

    Of a part with several files that of the earlier extension counts.
    """
    wanted = set(itertools.chain(*extensions))
    files: dict[str, dict[str, Member]] = {}
    dotted: list[tuple[str, str]] = []
    twice: list[str] = []
    for member in members:
        key, extension = _split_name(member.name)
        if extension in wanted:
            first = files.setdefault(key, {}).setdefault(extension, member)
            if first is not member:
                twice.append(member.name)
        elif extension.rpartition(".")[2] in wanted:
            dotted.append((key, member.name))
    samples = {key: _first_parts(parts, extensions) for key, parts in files.items()}
    # a.seg.png next to a.jpg is intended
    strangers = [name for key, name in dotted if key not in samples]
    return samples, strangers + twice


def _first_parts(
    parts: dict[str, Member], extensions: Sequence[Sequence[str]]
) -> Sample:
    return [next(filter(None, map(parts.get, group)), None) for group in extensions]


def _split_name(name: str) -> tuple[str, str]:
    """``a/b.seg.PNG`` has the key ``a/b`` and the extension ``seg.png``; a hidden file
    has no extension.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if stem else ""


class TarReader:
    """Reads byte ranges of tars, which are addressed by their place in ``paths``, in
    any threads and processes.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths
        self._file = lru_cache(_MAX_OPEN_FILES)(self._open)

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset`` of the (unpacked) archive; fewer where it
        ends. OSError if it is gone.
        """
        # a reference: the file stays open when another thread's takes its place
        file = self._file(tar)
        return os.pread(file.fileno(), size, offset)

    def listing(self, tar: int) -> tuple[list[Member], str | None]:
        """The complete members of an archive, and what is missing where it is cut or
        damaged.
        """
        with self._open(tar) as file:
            return members_of(file, self.paths[tar])

    def _open(self, tar: int) -> _File:
        """The tar itself, or what it unpacks to."""
        path = self.paths[tar]
        with path.open("rb") as file:
            start = file.read(6)
        for magic, opener in _OPENERS.items():
            if start.startswith(magic):
                stat = path.stat()
                version = f"{stat.st_size} {stat.st_mtime_ns}"
                name = f"{path.resolve()} {version} {path.name} unpacked.tar"
                path = Cache().get("shards", name, partial(_unpack, opener, path))
        return _File(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return TarReader, (self.paths,)


class _File(io.FileIO):
    def __del__(self) -> None:
        self.close()


def _unpack(opener: Callable[[Path], Any], path: Path, target: Path) -> None:
    """Writes what a compressed tar unpacks to."""
    damaged = (EOFError, zlib.error, lzma.LZMAError)
    with reading(path, *damaged), opener(path) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain)


def scan(reader: TarReader) -> pa.Table:
    """One row a complete sample: its key, and where its parts lie."""
    tables: list[pa.Table] = []
    cuts: dict[int, str] = {}
    odd: list[str] = []
    for number, path in enumerate(reader.paths):
        with reading(path):
            members, cut = reader.listing(number)
        parts = IMAGE_EXTENSIONS, (CAPTION_EXTENSION,)
        samples, left_out = group_members(members, parts)
        odd += (as_utf8(f"{path.name}/{name}") for name in left_out)
        rows = [(as_utf8(key), *_places(*parts)) for key, parts in samples.items()]
        if cut is not None:
            cuts[number] = cut
            if rows and _ABSENT.offset in rows[-1]:
                # it may have lost its second file, which is part of the cut
                rows.pop()
        columns = zip(*rows, strict=True) if rows else [[]] * len(_INDEX)
        tables.append(pa.table(list(map(list, columns)), schema=_INDEX))
    remark = ""
    if odd:
        remark = f"not read: {counted(len(odd), 'files')} {_ODD}, e.g. {odd[0]}"
    about = {"complete": [*map(len, tables)], "cuts": cuts, "remark": remark}
    together = pa.concat_tables(tables).combine_chunks()
    return together.replace_schema_metadata({"cloob": json.dumps(about)})


def _places(image: Member | None, caption: Member | None) -> tuple[int, int, int, int]:
    image, caption = image or _ABSENT, caption or _ABSENT
    return image.offset, image.size, caption.offset, caption.size


class ShardSource(Source):
    """Samples in tars on local disks, a truncated one with its complete samples and a
    row ``"truncated shard"``; ``label`` is what the only one is called.
    """

    def __init__(self, name: str, paths: Sequence[Path], label: str = "") -> None:
        self._arguments = name, tuple(paths), label
        self.name = name
        self.reader = TarReader(tuple(paths))
        self._labels = (label,) if label else tuple(path.name for path in paths)
        index = self._index()
        about = json.loads(index.schema.metadata[b"cloob"])
        self._keys, *places = (column.combine_chunks() for column in index.columns)
        # (N,) int64 each, bytes
        self._places = [column.to_numpy(zero_copy_only=False) for column in places]
        self.complete: list[int] = about["complete"]
        # what truncated tars lack
        self.cuts = {int(tar): str(cut) for tar, cut in about["cuts"].items()}
        self.remark = about["remark"]
        sizes = enumerate(self.complete)
        self.shard_sizes = tuple(n + (tar in self.cuts) for tar, n in sizes)
        self._ends = np.cumsum(self.shard_sizes)
        self._complete_ends = np.cumsum(self.complete)

    def _index(self) -> pa.Table:
        """Where the samples lie, from the cache while the tars are the same."""
        versions = []
        for path in self.reader.paths:
            stat = path.stat()
            versions.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
        name = json.dumps([_FORMAT, versions])
        file = Cache().get("indices", f"{name}.arrow", self._write)
        with reading(file), pa.memory_map(str(file)) as source:
            return pa.ipc.open_file(source).read_all()

    def _write(self, target: Path) -> None:
        table = scan(self.reader)
        with pa.ipc.new_file(str(target), table.schema) as writer:
            writer.write_table(table)

    def __reduce__(self) -> tuple[Any, ...]:  # a spawned worker maps the index
        return ShardSource, self._arguments

    def fingerprint(self) -> Fingerprint:
        shards = zip(self._labels, self.shard_sizes, strict=True)
        names = digest(f"{label} {n}" for label, n in shards)
        members = digest([of_column(pa.chunked_array([self._keys])), *self._places])
        return {"samples": len(self), "shards": names, "members": members}

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is ``shard file/key in the shard``."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path, label = self.reader.paths[shard], self._labels[shard]
        left = int(self._ends[shard]) - index - (shard in self.cuts)
        if left == 0:
            complete = f"{self.complete[shard]:,} samples are complete"
            detail = f"{path}: {self.cuts[shard]}; {complete}"
            raise BadSample("truncated shard", label, detail)
        row = int(self._complete_ends[shard]) - left
        key = f"{label}/{self._keys[row].as_py()}"
        image_place, image_size, caption_place, caption_size = (
            int(column[row]) for column in self._places
        )
        with reading_part("image", key, str(path)):
            image = self._part("image", shard, image_place, image_size)
        with reading_part("caption", key, str(path)):
            caption = self._part("caption", shard, caption_place, caption_size)
        return RawSample(key, image, clean_caption(caption, key))

    def _part(self, part: Part, shard: int, place: int, size: int) -> bytes:
        if place == _ABSENT.offset:
            raise FileNotFoundError(errno.ENOENT, "none of this name")
        if size > MOST_BYTES[part]:
            raise TooLarge(f"{size:,} bytes, the limit is {MOST_BYTES[part]:,}")
        return self.reader.read(shard, place, size)
