"""Pairs in WebDataset tars on this machine: ``key.jpg`` and ``key.txt`` are one sample;
an index of them is cached.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from cloob.cache import Cache
from cloob.data.batch import (
    MAX_CAPTION_BYTES,
    BadSample,
    RawSample,
    as_utf8,
    clean_caption,
    read_fault,
)
from cloob.data.shards.headers import BLOCK, Member, plain_members
from cloob.data.source import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    Fingerprint,
    Source,
    digest,
    of_column,
)
from cloob.data.sources.files import reading
from cloob.errors import InputError, counted
from cloob.pictures import MAX_IMAGE_BYTES

_OPENERS: dict[bytes, Callable[[Path], Any]] = {  # by the first bytes
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
# what tarfile raises on damaged headers
_DAMAGED = (tarfile.TarError, ValueError, IndexError, OverflowError)
_CHUNK = 1 << 16
_MAX_OPEN_FILES = 64
_MAX_PADDING = 1 << 20  # bytes behind the end of an archive that are looked at

_ABSENT = Member("", -1, 0)  # a part that a sample does not have
_CUT = -2  # offset of the image in the row for what a truncated shard has lost
_FORMAT = 10
_COLUMNS = ("image_offset", "image_size", "caption_offset", "caption_size")
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

    def __init__(self, paths: tuple[Path, ...], cache: Cache | None = None) -> None:
        self.paths = paths
        self._cache = cache
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
        path = self.paths[tar]
        with self._plain(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return [], "is empty, or nothing of it can be unpacked"
            plain = plain_members(file.fileno(), size)
            if plain is not None:
                return plain, None
            return _listing(file, size, path)

    def _open(self, tar: int) -> _File:
        return _File(self._plain(self.paths[tar]))

    def _plain(self, path: Path) -> Path:
        """The tar itself, or what it unpacks to."""
        with path.open("rb") as file:
            start = file.read(6)
        for magic, opener in _OPENERS.items():
            if start.startswith(magic):
                stat = path.stat()
                version = f"{stat.st_size} {stat.st_mtime_ns}"
                name = f"{path.resolve()} {version} {path.name} unpacked.tar"
                cache = self._cache or Cache()
                return cache.get("shards", name, partial(_unpack, opener, path))
        return path

    def __reduce__(self) -> tuple[Any, ...]:
        return TarReader, (self.paths, self._cache)


def _listing(file: IO[bytes], size: int, path: Path) -> tuple[list[Member], str | None]:
    """As :meth:`TarReader.listing`, by tarfile."""
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except _DAMAGED as error:
        if size < BLOCK:
            return [], f"cut after {size:,} bytes"
        raise InputError(f"{path} is not a tar archive") from error
    members: list[Member] = []
    by_name: dict[str, Member] = {}
    with contextlib.suppress(*_DAMAGED):
        info = archive.next()
        # a size that leads back would be followed for ever
        while info is not None and info.offset < archive.offset:
            archive.members = []  # type: ignore[attr-defined] # else a kilobyte a header
            if info.isreg() and info.offset_data + info.size <= size:
                by_name[info.name] = Member(info.name, info.offset_data, info.size)
                members.append(by_name[info.name])
            elif info.islnk() and info.linkname in by_name:
                # a hard link: the bytes of a member before it
                members.append(by_name[info.linkname]._replace(name=info.name))
            info = archive.next()
    return members, _missing(file, archive.offset, size)


def _missing(file: IO[bytes], end: int, size: int) -> str | None:
    """What is wrong where the last member ends: zeros alone are to follow."""
    if end > size - BLOCK:
        return f"cut after {size:,} bytes"
    file.seek(max(end, 0))
    if file.read(_MAX_PADDING).strip(b"\0"):
        return f"damaged, or another archive follows, at byte {end:,} of {size:,}"
    return None


class _File(io.FileIO):
    def __del__(self) -> None:
        self.close()


def _unpack(opener: Callable[[Path], Any], path: Path, target: Path) -> None:
    """Writes what a compressed tar unpacks to; one that is cut becomes a plain tar that
    is cut.
    """
    with opener(path) as packed, target.open("wb") as plain:
        try:
            # read() would withhold what precedes a cut
            while chunk := packed.read1(_CHUNK):
                plain.write(chunk)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None):  # of the disk
                raise


def scan(reader: TarReader, captions: Sequence[str] = CAPTION_EXTENSIONS) -> pa.Table:
    """One row a sample: its key, and where its parts lie.

    A truncated tar has one more, whose offset is ``_CUT``.
    """
    keys: list[pa.Array] = []
    places: list[np.ndarray] = []
    cuts: dict[int, str] = {}
    odd: list[str] = []
    for number, path in enumerate(reader.paths):
        with reading(path):
            members, cut = reader.listing(number)
        samples, left_out = group_members(members, (IMAGE_EXTENSIONS, captions))
        odd += (as_utf8(f"{path.name}/{name}") for name in left_out)
        rows = list(map(_place, samples.values()))
        names = list(map(as_utf8, samples))
        if cut is not None:
            cuts[number] = cut
            if rows and _ABSENT.offset in rows[-1]:
                # it may have lost its second file, which is part of the cut
                del rows[-1], names[-1]
            rows.append((_CUT, 0, _CUT, 0))
            names.append("")
        places.append(np.array(rows, np.int64).reshape(-1, len(_COLUMNS)))
        keys.append(pa.array(names, pa.large_string()))
    remark = ""
    if odd:
        remark = f"not read: {counted(len(odd), 'files')} {_ODD}, e.g. {odd[0]}"
    about = json.dumps({"sizes": [*map(len, keys)], "cuts": cuts, "remark": remark})
    columns = np.ascontiguousarray(np.concatenate(places).T)
    table = pa.table([pa.concat_arrays(keys), *columns], names=["key", *_COLUMNS])
    return table.replace_schema_metadata({"cloob": about})


def _place(sample: Sample) -> tuple[int, int, int, int]:
    image, caption = (member or _ABSENT for member in sample)
    return image.offset, image.size, caption.offset, caption.size


class ShardSource(Source):
    """Samples in tars on local disks, a truncated one with its complete samples and a
    row ``"truncated shard"``.

    ``member`` is the key of the captions in a sample's ``.json``; without it they are
    texts.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        cache: Cache | None = None,
        label: str | None = None,
        member: str | None = None,
    ) -> None:
        self._arguments = name, tuple(paths), cache, label, member
        self.name = name
        self._member = member
        self.reader = TarReader(tuple(paths), cache)
        self._labels = (label,) if label else tuple(path.name for path in paths)
        index = self._index(cache)
        about = json.loads(index.schema.metadata[b"cloob"])
        self._keys, *places = (column.combine_chunks() for column in index.columns)
        # (N,) int64 each, bytes
        self._places = [column.to_numpy(zero_copy_only=False) for column in places]
        self.shard_sizes = tuple(about["sizes"])
        # what truncated tars lack
        self.cuts = {int(tar): str(cut) for tar, cut in about["cuts"].items()}
        sizes = enumerate(self.shard_sizes)
        self.complete = tuple(size - (tar in self.cuts) for tar, size in sizes)
        self.remark = about["remark"]
        self._ends = np.cumsum(self.shard_sizes)

    def _index(self, cache: Cache | None) -> pa.Table:
        """Where the samples lie, from the cache while the tars are the same."""
        captions = CAPTION_EXTENSIONS if self._member is None else ("json",)
        if cache is None:
            return scan(self.reader, captions)
        versions = []
        for path in self.reader.paths:
            stat = path.stat()
            versions.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
        name = json.dumps([_FORMAT, captions, versions])
        file = cache.get("indices", f"{name}.arrow", partial(self._write, captions))
        with reading(file), pa.memory_map(str(file)) as source:
            return pa.ipc.open_file(source).read_all()

    def _write(self, captions: Sequence[str], target: Path) -> None:
        table = scan(self.reader, captions)
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
        key = f"{label}/{self._keys[index].as_py()}"
        image_at, image_size, caption_at, caption_size = (
            int(column[index]) for column in self._places
        )
        if image_at == _CUT:
            complete = f"{self.complete[shard]:,} samples are complete"
            detail = f"{path}: {self.cuts[shard]}; {complete}"
            raise BadSample("truncated shard", label, detail)
        if image_at == _ABSENT.offset:
            raise BadSample("missing image", key, f"none of this name in {path}")
        if caption_at == _ABSENT.offset:
            raise BadSample("missing caption", key, f"none of this name in {path}")
        if caption_size > MAX_CAPTION_BYTES:
            detail = f"{caption_size:,} bytes in {path}"
            raise BadSample("caption too long", key, detail)
        if image_size > MAX_IMAGE_BYTES:
            raise BadSample("image too large", key, f"{image_size:,} bytes in {path}")
        try:
            caption = self.reader.read(shard, caption_at, caption_size)
            image = self.reader.read(shard, image_at, image_size)
        except OSError as error:
            reason = read_fault(error, "missing image")
            raise BadSample(reason, key, f"{path}: {error.strerror or error}") from None
        if self._member is not None:
            caption = _caption_in(caption, self._member, key)
        return RawSample(key, image, clean_caption(caption, key))


def _caption_in(content: bytes, member: str, key: str) -> bytes:
    """The text under a key of a sample's JSON."""
    try:
        caption = json.loads(content).get(member)
    except (ValueError, RecursionError, AttributeError) as error:
        wrong = f"its .json is no JSON object: {error}"
        raise BadSample("missing caption", key, wrong) from None
    if not isinstance(caption, str):
        wrong = f"no text under {member!r} in its .json"
        raise BadSample("missing caption", key, wrong)
    return caption.encode("utf-8", "surrogatepass")
