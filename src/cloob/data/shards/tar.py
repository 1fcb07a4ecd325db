"""Random access into tar archives: where each member lies, and how to read it there.

The headers of a tar are read once, by the standard library; a member is then one read. A compressed tar (gzip, bzip2,
xz; told by its first bytes, as WebDataset and GNU tar do) is unpacked into the cache.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cloob.cache import Cache
from cloob.errors import InputError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_Packed = gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile
_MAGIC: tuple[tuple[bytes, Callable[[Path], _Packed]], ...] = (
    (b"\x1f\x8b", gzip.GzipFile),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)
_DAMAGE = (tarfile.TarError, ValueError, IndexError, OverflowError)  # what tarfile raises for damaged headers
_BLOCK = 512
_CHUNK = 1 << 16
_pread: Callable[[int, int, int], bytes] | None = getattr(os, "pread", None)  # Windows has none
_MAX_OPEN_FILES = 64


def is_tar(path: Path) -> bool:
    """Whether the name says that this is a tar that can be read here."""
    return path.name.lower().endswith(TAR_SUFFIXES)


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar: its name, and where its content lies in the (unpacked) archive, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarListing:
    """The complete members of a tar, in order; ``cut`` says what is missing where it is truncated or damaged."""

    members: tuple[Member, ...]
    cut: str | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's sample key and extension: ``"a/b.seg.png"`` is ``("a/b", "seg.png")``; None without either."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class _Handle:
    """An open file that several threads read at once; closed when the last of them has let go of it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read(self, size: int, offset: int) -> bytes:
        """The bytes at ``offset``; fewer where the file ends."""
        if _pread is not None:
            return _pread(self._file.fileno(), size, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class TarReader:
    """Reads byte ranges of several tars; safe over fork and spawn, and in several threads.

    Args:
        paths: The tars; they are addressed by their place in this tuple.
        cache: Where compressed ones are unpacked; None: ``Cache()``.
    """

    def __init__(self, paths: tuple[Path, ...], cache: Cache | None = None) -> None:
        self.paths = paths
        self._cache = cache
        self.close()

    def close(self) -> None:
        """Lets go of this process's file handles; the next read opens what it needs."""
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset`` of the (unpacked) archive; shorter if the file has shrunk.

        Raises:
            OSError: The file is gone or cannot be read.
        """
        return self._handle(tar).read(size, offset)

    def listing(self, tar: int) -> TarListing:
        """Reads the headers of an archive; InputError if it is no tar, or cannot be read."""
        path = self.paths[tar]
        try:
            with self._plain(path).open("rb") as file:
                return _scan(path, file)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None

    def _plain(self, path: Path) -> Path:
        """The tar itself; of a compressed one what it unpacks to, in the cache."""
        if _opener(path) is None:
            return path
        stat = path.stat()
        name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {path.name} unpacked.tar"
        return (self._cache or Cache()).get("shards", name, lambda target: _unpack(path, target))

    def _handle(self, tar: int) -> _Handle:
        if self._pid != os.getpid():  # forked: another thread of the parent may have held the lock
            self.close()
        with self._lock:
            handle = self._handles.pop(tar, None) or _Handle(self._plain(self.paths[tar]))
            self._handles[tar] = handle
            if len(self._handles) > _MAX_OPEN_FILES:
                self._handles.popitem(last=False)  # a thread that is reading keeps it open until it is done
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def make_plain(path: Path) -> None:
    """Unpacks a compressed tar in its place."""
    if _opener(path) is not None:
        unpacked = path.with_name(f"{path.name}.unpacked")
        _unpack(path, unpacked)
        unpacked.replace(path)


def _opener(path: Path) -> Callable[[Path], _Packed] | None:
    with path.open("rb") as file:
        start = file.read(6)
    return next((opener for magic, opener in _MAGIC if start.startswith(magic)), None)


def _unpack(path: Path, target: Path) -> None:
    """Unpacks what can be had of a compressed tar: one that is cut becomes a plain tar that is cut."""
    opener = _opener(path)
    assert opener is not None
    with opener(path) as packed, target.open("wb") as plain:
        plain.writelines(_chunks(path, packed))


def _chunks(path: Path, packed: _Packed) -> Iterator[bytes]:
    found = False
    try:
        while chunk := packed.read1(_CHUNK):  # read() would withhold what precedes a cut
            found = True
            yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # of the disk
            raise
        if not found:
            raise InputError(f"{path} cannot be unpacked: {error}") from None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _scan(path: Path, file: IO[bytes]) -> TarListing:
    """Lists an archive, or several in a row. Behind a damaged header it goes on with the next sound one."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return TarListing((), "the file is empty")

    def goes_on(at: int) -> bool:
        """Whether a header or an end mark lies at a place, as behind a whole member."""
        file.seek(min(at, size))
        block = file.read(_BLOCK)
        return block == bytes(_BLOCK) or _is_header(block)

    members: list[Member] = []
    end, cut = 0, None
    try:
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115 - the file is ours
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # tarfile keeps every header otherwise, a kilobyte each
            if tar.offset <= info.offset:  # a size that leads back would be followed for ever
                raise tarfile.ReadError
            if info.offset != end and not goes_on(end):
                cut = cut or f"a damaged header at byte {end:,} of {size:,}"
            if info.isreg() and info.offset_data + info.size <= size:
                members.append(Member(info.name, info.offset_data, info.size))
            end = tar.offset
    except _DAMAGE:
        cut = cut or f"cut after {size:,} bytes"
    if not members and size >= _BLOCK and not goes_on(0):
        raise InputError(f"{path} is not a tar archive")
    if not goes_on(end):
        cut = cut or f"no end-of-archive mark at byte {end:,} of {size:,}"
    return TarListing(tuple(members), cut)
