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
    column_digest,
    digest,
    place_in,
    starts_of,
)
from cloob.data.sources.files import reading
from cloob.errors import counted
from cloob.files import TooLarge

Opener = Callable[[Path], io.BufferedIOBase]

_OPENERS: dict[bytes, Opener] = {  # by the first two bytes
    b"\x1f\x8b": gzip.open,
    b"\xfd7": lzma.open,
}
_MAX_OPEN_FILES = 64
_FORMAT = 14
_ABSENT = -1  # the place of a part that a sample does not have
# A row a sample; a tar that is cut or damaged ends with a row without parts. Places are
# bytes.
_ROW = pa.struct(
    [
        ("key", pa.large_string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("caption_offset", pa.int64()),
        ("caption_size", pa.int64()),
    ]
)
_LEFT_OUT = (
    "that a tar holds twice, or whose key has a dot: WebDataset's key ends at the first"
)

Sample = list[Member | None]  # the member of every part
Row = tuple[str, int, int, int, int]  # of the index


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
    any threads.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths
        self._file = lru_cache(_MAX_OPEN_FILES)(lambda path: _File(unpacked(path)))

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset``; fewer where the archive ends. OSError if it
        is gone.
        """
        # a reference: the file stays open when another thread's takes its place
        file = self._file(self.paths[tar])
        return os.pread(file.fileno(), size, offset)


class _File(io.FileIO):
    def __del__(self) -> None:
        self.close()


def unpacked(path: Path) -> Path:
    """A tar, or what a compressed one unpacks to, in the cache."""
    with path.open("rb") as file:
        opener = _OPENERS.get(file.read(2))
    if opener is None:
        return path
    stat = path.stat()
    name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {path.name}"
    return Cache().get("shards", name, partial(_unpack, opener, path))


def _unpack(opener: Opener, path: Path, target: Path) -> None:
    damaged = (EOFError, zlib.error, lzma.LZMAError)
    with reading(path, *damaged), opener(path) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain)


def scan(paths: Sequence[Path]) -> pa.Table:
    """The index of tars; its metadata have what is to be known of every tar, and a
    remark.
    """
    rows: list[Row] = []
    sizes: list[int] = []
    damages: list[str | None] = []
    left_out: list[str] = []
    for path in paths:
        rows_of_tar, damage, names = _scan_tar(path)
        rows += rows_of_tar
        sizes.append(len(rows_of_tar))
        damages.append(damage)
        left_out += names
    remark = ""
    if left_out:
        files = counted(len(left_out), "files")
        remark = f"not read: {files} {_LEFT_OUT}, e.g. {left_out[0]}"
    about = json.dumps({"sizes": sizes, "damages": damages, "remark": remark})
    table = pa.Table.from_struct_array(pa.array(rows, _ROW))
    return table.replace_schema_metadata({"cloob": about})


def _scan_tar(path: Path) -> tuple[list[Row], str | None, list[str]]:
    """The rows of a tar in the index, its damage, and the files that are not read."""
    with reading(path):
        members, damage = members_of(unpacked(path))
    parts = IMAGE_EXTENSIONS, (CAPTION_EXTENSION,)
    samples, left_out = group_members(members, parts)
    rows = [
        (as_utf8(key), *_place(image), *_place(caption))
        for key, (image, caption) in samples.items()
    ]
    if damage is not None:
        if rows and _ABSENT in rows[-1]:
            # it may have lost its second file, which is part of the damage
            rows.pop()
        rows.append(("", *_place(None), *_place(None)))
    return rows, damage, [as_utf8(f"{path.name}/{name}") for name in left_out]


def _place(member: Member | None) -> tuple[int, int]:
    return (_ABSENT, 0) if member is None else (member.offset, member.size)


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
        self.shard_sizes = tuple(about["sizes"])
        self.remark = about["remark"]
        self._damages: list[str | None] = about["damages"]
        self._starts = starts_of(self.shard_sizes)
        columns = [column.combine_chunks() for column in index.columns]
        self._keys = columns[0]
        # (N,) int64 offsets and sizes of images, and of captions
        self._places = [column.to_numpy() for column in columns[1:]]

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
        table = scan(self.reader.paths)
        with pa.ipc.new_file(str(target), table.schema) as writer:
            writer.write_table(table)

    def __reduce__(self) -> tuple[object, ...]:  # a spawned worker maps the index
        return ShardSource, self._arguments

    def fingerprint(self) -> Fingerprint:
        shards = zip(self._labels, self.shard_sizes, strict=True)
        names = digest(f"{label} {n}" for label, n in shards)
        members = digest([column_digest(pa.chunked_array([self._keys])), *self._places])
        return {"samples": len(self), "shards": names, "members": members}

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is ``shard file/key in the shard``."""
        shard, row = place_in(self._starts, index)
        self._check_damage(shard, row)
        key = f"{self._labels[shard]}/{self._keys[index].as_py()}"
        places = [int(column[index]) for column in self._places]
        image = self._part("image", key, shard, *places[:2])
        caption = self._part("caption", key, shard, *places[2:])
        return RawSample(key, image, clean_caption(caption, key))

    def _check_damage(self, shard: int, row: int) -> None:
        """A damaged tar's last row is a bad sample."""
        damage = self._damages[shard]
        n_complete = self.shard_sizes[shard] - 1
        if damage is not None and row == n_complete:
            detail = f"{damage}; {n_complete:,} samples are complete"
            path = self.reader.paths[shard]
            raise BadSample("truncated shard", self._labels[shard], f"{path}: {detail}")

    def _part(self, part: Part, key: str, shard: int, place: int, size: int) -> bytes:
        with reading_part(part, key, str(self.reader.paths[shard])):
            if place == _ABSENT:
                raise FileNotFoundError(errno.ENOENT, "none of this name")
            if size > MOST_BYTES[part]:
                raise TooLarge(f"{size:,} bytes, the limit is {MOST_BYTES[part]:,}")
            return self.reader.read(shard, place, size)
