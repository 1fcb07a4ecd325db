"""Random access into tar archives: headers are read once, a member is then one read.

A compressed tar (gzip, bzip2 or xz by its first bytes, as WebDataset and GNU tar do) is unpacked into the cache.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from cloob.cache import Cache
from cloob.errors import InputError

_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\x00": lzma.LZMAFile}
_BLOCK = 512
_CHUNK = 1 << 16
_MAX_OPEN_FILES = 64


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its content lies in the (unpacked) archive, in bytes."""

    name: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's sample key and extension: ``"a/b.seg.png"`` is ``("a/b", "seg.png")``; empty without either."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem, extension.lower()) if stem and dot else ("", "")


def group_members(members: Sequence[Member], extensions: Sequence[Sequence[str]]) -> dict[str, list[Member | None]]:
    """The samples of one tar by key, in order of appearance: the member of each part, or None.

    ``extensions`` are those that each part may have, the preferred one first.
    """
    place = {ext: (part, rank) for part, group in enumerate(extensions) for rank, ext in enumerate(group)}
    samples: dict[str, list[Member | None]] = {}
    ranks: dict[tuple[str, int], int] = {}
    for member in members:
        key, extension = split_name(member.name)
        if extension not in place:
            continue
        part, rank = place[extension]
        sample = samples.setdefault(key, [None] * len(extensions))
        if rank < ranks.get((key, part), len(place)):
            sample[part], ranks[key, part] = member, rank
    return samples


class TarReader:
    """Reads byte ranges of tars, which are addressed by their place in ``paths``, in any threads and processes."""

    def __init__(self, paths: tuple[Path, ...], cache: Cache | None = None) -> None:
        self.paths = paths
        self._cache = cache
        self._files: OrderedDict[int, _File] = OrderedDict()

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset`` of the (unpacked) archive; fewer where it ends. OSError if it is gone."""
        # No lock, which a forked process could inherit locked: each of these calls is atomic.
        file = self._files.pop(tar, None) or _File(self._plain(self.paths[tar]))
        self._files[tar] = file
        if len(self._files) > _MAX_OPEN_FILES:
            self._files.popitem(last=False)
        return os.pread(file.fileno(), size, offset)

    def listing(self, tar: int) -> tuple[list[Member], str | None]:
        """The complete members of an archive, and what is missing where it is cut; InputError if it is no tar."""
        with self._plain(self.paths[tar]).open("rb") as file:
            return _scan(self.paths[tar], file)

    def _plain(self, path: Path) -> Path:
        if _decompressor(path) is None:
            return path
        stat = path.stat()
        name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {path.name} unpacked.tar"
        return (self._cache or Cache()).get("shards", name, lambda target: _unpack(path, target))

    def __reduce__(self) -> Any:
        return TarReader, (self.paths, self._cache)


class _File(io.FileIO):
    """An open file, closed when the last thread that reads it lets go of it."""

    def __del__(self) -> None:
        self.close()


def _decompressor(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(6)
    return next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)


def _unpack(path: Path, target: Path) -> None:
    """Writes what a compressed tar unpacks to; one that is cut becomes a plain tar that is cut."""
    with _decompressor(path)(path) as packed, target.open("wb") as plain:
        try:
            while chunk := packed.read1(_CHUNK):  # read() would withhold what precedes a cut
                plain.write(chunk)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None):  # of the disk
                raise
            if not plain.tell():
                raise InputError(f"{path} cannot be unpacked: {error}") from None


def _goes_on(file: IO[bytes], at: int) -> bool:
    file.seek(at)
    block = file.read(_BLOCK)
    try:
        return block == bytes(_BLOCK) or bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    except tarfile.HeaderError:
        return False


def _scan(path: Path, file: IO[bytes]) -> tuple[list[Member], str | None]:
    """Lists an archive, or several in a row. After a damaged header it goes on with the next sound one."""
    if (size := os.fstat(file.fileno()).st_size) == 0:
        return [], "the file is empty"
    members: list[Member] = []
    end, cut = 0, None
    try:
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115 - the file is ours
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # tarfile keeps every header otherwise, a kilobyte each
            if tar.offset <= info.offset:  # a size that leads back would be followed for ever
                cut = cut or f"a damaged header at byte {info.offset:,} of {size:,}"
                break
            if info.offset != end and not _goes_on(file, min(end, size)):
                cut = cut or f"a damaged header at byte {end:,} of {size:,}"
            if info.isreg() and info.offset_data + info.size <= size:
                members.append(Member(info.name, info.offset_data, info.size))
            end = tar.offset
    except (tarfile.TarError, ValueError, IndexError, OverflowError):  # damaged headers
        cut = cut or f"cut after {size:,} bytes"
    if not members and size >= _BLOCK and not _goes_on(file, 0):
        raise InputError(f"{path} is not a tar archive")
    if not _goes_on(file, min(end, size)):
        cut = cut or f"no end-of-archive mark at byte {end:,} of {size:,}"
    return members, cut
