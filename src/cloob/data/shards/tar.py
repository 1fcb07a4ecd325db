"""Pairs in WebDataset tars on this machine: ``key.jpg`` and ``key.txt`` are one sample;
an index of them is cached.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Sequence
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
    Reason,
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
from cloob.data.sources.arrow import reading
from cloob.errors import InputError, counted
from cloob.pictures import MAX_IMAGE_BYTES

_COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_CHUNK = 1 << 16
_MAX_OPEN_FILES = 64

_ABSENT = -1  # offset of a part that a sample does not have
_CUT = (
    -2
)  # offset of the image in the row that stands for what a truncated shard has lost
_FORMAT = 9
_COLUMNS = ("image_offset", "image_size", "caption_offset", "caption_size")
_ODD = (
    "that a tar holds twice, or whose key has a dot: WebDataset's key ends at the first"
)


def group_members(
    members: Sequence[Member], extensions: Sequence[Sequence[str]]
) -> tuple[dict[str, list[Member | None]], list[str]]:
    """A tar's samples by key, with the member (or None) of every part; and the names of
    files that look like parts.
    """
    place = {
        ext: (part, rank)
        for part, group in enumerate(extensions)
        for rank, ext in enumerate(group)
    }
    samples: dict[str, list[Member | None]] = {}
    taken: dict[tuple[str, int], int] = {}
    dotted, twice = [], []
    for member in members:
        folder, slash, base = member.name.rpartition(
            "/"
        )  # "a/b.seg.png" has the key "a/b", the extension "seg.png"
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}{slash}{stem}", extension.lower() if stem else ""
        if extension not in place:
            dotted += (
                [(key, member.name)] if extension.rpartition(".")[2] in place else []
            )
            continue
        part, rank = place[extension]
        sample, before = (
            samples.setdefault(key, [None] * len(extensions)),
            taken.get((key, part), len(place)),
        )
        if rank < before:
            sample[part], taken[key, part] = member, rank
        elif rank == before:
            twice.append(member.name)
    # a.seg.png next to a.jpg is intended
    return samples, [*(name for key, name in dotted if key not in samples), *twice]


class TarReader:
    """Reads byte ranges of tars, which are addressed by their place in ``paths``, in
    any threads and processes.
    """

    def __init__(self, paths: tuple[Path, ...], cache: Cache | None = None) -> None:
        self.paths = paths
        self._cache = cache
        self._file = lru_cache(_MAX_OPEN_FILES)(
            lambda tar: _File(self._plain(paths[tar]))
        )

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset`` of the (unpacked) archive; fewer where it
        ends. OSError if it is gone.
        """
        file = self._file(
            tar
        )  # a reference, so that it stays open when another thread's takes its place
        return os.pread(file.fileno(), size, offset)

    def listing(self, tar: int) -> tuple[list[Member], str | None]:
        """The complete members of one archive or several in a row, and what is missing
        where it is cut or damaged.
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

    def _plain(self, path: Path) -> Path:
        with path.open("rb") as file:
            start = file.read(6)
        opener = next(
            (
                opener
                for magic, opener in _COMPRESSED.items()
                if start.startswith(magic)
            ),
            None,
        )
        if opener is None:
            return path
        stat = path.stat()
        name = (
            f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {path.name}"
            " unpacked.tar"
        )
        return (self._cache or Cache()).get(
            "shards", name, partial(_unpack, opener, path)
        )

    def __reduce__(self) -> Any:
        return TarReader, (self.paths, self._cache)


def _listing(file: IO[bytes], size: int, path: Path) -> tuple[list[Member], str | None]:
    """As :meth:`TarReader.listing`, by tarfile."""
    members, places, end, cut = list[Member](), dict[str, Member](), 0, None
    try:
        archive = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # else tarfile keeps a kilobyte a header
            if (
                archive.offset <= info.offset
            ):  # a size that leads back would be followed for ever
                cut = cut or f"a damaged header at byte {info.offset:,} of {size:,}"
                break
            if info.offset != end and not _goes_on(file, min(end, size)):
                cut = cut or f"a damaged header at byte {end:,} of {size:,}"
            if info.isreg() and info.offset_data + info.size <= size:
                places[info.name] = Member(info.name, info.offset_data, info.size)
                members.append(places[info.name])
            elif (
                info.islnk() and info.linkname in places
            ):  # a hard link: the bytes of a member before it
                members.append(places[info.linkname]._replace(name=info.name))
            end = archive.offset
    except (
        tarfile.TarError,
        ValueError,
        IndexError,
        OverflowError,
    ):  # damaged headers
        cut = cut or f"cut after {size:,} bytes"
    if not members and size >= BLOCK and not _goes_on(file, 0):
        raise InputError(f"{path} is not a tar archive")
    if not _goes_on(file, min(end, size)):
        cut = cut or f"no end-of-archive mark at byte {end:,} of {size:,}"
    return members, cut


class _File(io.FileIO):
    def __del__(self) -> None:
        self.close()


def _unpack(opener: Any, path: Path, target: Path) -> None:
    """Writes what a compressed tar unpacks to; one that is cut becomes a plain tar that
    is cut.
    """
    with opener(path) as packed, target.open("wb") as plain:
        try:
            while chunk := packed.read1(
                _CHUNK
            ):  # read() would withhold what precedes a cut
                plain.write(chunk)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None):  # of the disk
                raise


def _goes_on(file: IO[bytes], at: int) -> bool:
    file.seek(at)
    block = file.read(BLOCK)
    try:
        return block == bytes(BLOCK) or bool(
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        )
    except tarfile.HeaderError:
        return False


def scan(reader: TarReader, captions: Sequence[str] = CAPTION_EXTENSIONS) -> pa.Table:
    """One row a sample: its key, and where its parts lie.

    A truncated tar has one more, whose offset is ``_CUT``.
    """
    keys, places, cuts, odd = (
        list[pa.Array](),
        list[np.ndarray](),
        dict[int, str](),
        list[str](),
    )
    for number, path in enumerate(reader.paths):
        with reading(path):
            members, cut = reader.listing(number)
        samples, left_out = group_members(members, (IMAGE_EXTENSIONS, captions))
        odd += (as_utf8(f"{path.name}/{name}") for name in left_out)
        if cut is not None:
            cuts[number] = cut
            if samples and None in samples[last := next(reversed(samples))]:
                del samples[
                    last
                ]  # it may have lost its second file, which is part of the cut
        absent = Member("", _ABSENT, 0)
        rows = [
            [*(image or absent)[1:], *(caption or absent)[1:]]
            for image, caption in samples.values()
        ]
        rows += [] if cut is None else [[_CUT, 0, _CUT, 0]]
        places.append(np.array(rows, np.int64).reshape(-1, len(_COLUMNS)))
        keys.append(
            pa.array([*map(as_utf8, samples), ""][: len(rows)], pa.large_string())
        )
    remark = (
        f"not read: {counted(len(odd), 'files')} {_ODD}, e.g. {odd[0]}" if odd else ""
    )
    columns = dict(
        zip(
            _COLUMNS,
            map(pa.array, np.ascontiguousarray(np.concatenate(places).T)),
            strict=True,
        )
    )
    about = json.dumps({"sizes": [*map(len, keys)], "cuts": cuts, "remark": remark})
    return pa.table(
        {"key": pa.concat_arrays(keys), **columns}, metadata={"cloob": about}
    )


class ShardSource(Source):
    """Samples in tars on local disks, a truncated one with its complete samples and a
    row ``"truncated shard"``.

    ``member`` is the key of the captions in a sample's ``.json``; without it they are
    texts.
    """

    streamed = False

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        cache: Cache | None = None,
        label: str | None = None,
        member: str | None = None,
    ) -> None:
        self._given = name, tuple(paths), cache, label, member
        self.name, self._member, self.reader = (
            name,
            member,
            TarReader(tuple(paths), cache),
        )
        self._labels = (label,) if label else tuple(path.name for path in paths)
        captions = CAPTION_EXTENSIONS if member is None else ("json",)
        if cache is None:
            index = scan(self.reader, captions)
        else:

            def write(target: Path) -> None:
                table = scan(self.reader, captions)
                with (
                    pa.OSFile(str(target), "wb") as sink,
                    pa.ipc.new_file(sink, table.schema) as writer,
                ):
                    writer.write_table(table)

            stats = ((str(path.resolve()), path.stat()) for path in paths)
            facts = json.dumps(
                [
                    _FORMAT,
                    captions,
                    [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
                ]
            )
            file = cache.get("indices", f"{facts}.arrow", write)
            with reading(file), pa.memory_map(str(file)) as source:
                index = pa.ipc.open_file(source).read_all()
        about = json.loads(index.schema.metadata[b"cloob"])
        self._keys, *places = (column.combine_chunks() for column in index.columns)
        self._places = tuple(
            column.to_numpy(zero_copy_only=False) for column in places
        )  # (N,) int64 each, bytes
        self.shard_sizes: tuple[int, ...] = tuple(about["sizes"])
        self.cuts: dict[int, str] = {
            int(tar): cut for tar, cut in about["cuts"].items()
        }  # what truncated tars lack
        self.complete = tuple(
            size - (tar in self.cuts) for tar, size in enumerate(self.shard_sizes)
        )
        self.remark: str = about["remark"]
        self._ends = np.cumsum(self.shard_sizes)

    def __reduce__(self) -> Any:  # a spawned worker maps the index
        return ShardSource, self._given

    def fingerprint(self) -> Fingerprint:
        shards = zip(self._labels, self.shard_sizes, strict=True)
        members = digest([of_column(pa.chunked_array([self._keys])), *self._places])
        return {
            "samples": len(self),
            "shards": digest(f"{label} {n}" for label, n in shards),
            "members": members,
        }

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is ``shard file/key in the shard``."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path, label = self.reader.paths[shard], self._labels[shard]
        key = f"{label}/{self._keys[index].as_py()}"
        image_at, image_size, caption_at, caption_size = (
            int(column[index]) for column in self._places
        )
        faults: list[tuple[bool, Reason, str]] = [
            (image_at == _ABSENT, "missing image", f"none of this name in {path}"),
            (caption_at == _ABSENT, "missing caption", f"none of this name in {path}"),
            (
                caption_size > MAX_CAPTION_BYTES,
                "caption too long",
                f"{caption_size:,} bytes in {path}",
            ),
            (
                image_size > MAX_IMAGE_BYTES,
                "image too large",
                f"{image_size:,} bytes in {path}",
            ),
        ]
        if image_at == _CUT:
            complete = f"{self.complete[shard]:,} samples are complete"
            key, faults = (
                label,
                [(True, "truncated shard", f"{path}: {self.cuts[shard]}; {complete}")],
            )
        for is_bad, reason, detail in faults:
            if is_bad:
                raise BadSample(reason, key, detail)
        try:
            caption: Any = self.reader.read(shard, caption_at, caption_size)
            image = self.reader.read(shard, image_at, image_size)
        except OSError as error:
            raise BadSample(
                read_fault(error, "missing image"),
                key,
                f"{path}: {error.strerror or error}",
            ) from None
        if self._member is not None:
            wrong = f"no text under {self._member!r} in its .json"
            try:
                caption = json.loads(caption).get(self._member)
            except (ValueError, RecursionError, AttributeError) as error:
                caption, wrong = None, f"its .json is no JSON object: {error}"
            if not isinstance(caption, str):
                raise BadSample("missing caption", key, wrong)
            caption = caption.encode("utf-8", "surrogatepass")
        return RawSample(key, image, clean_caption(caption, key))
