"""Random access into tar archives: where each member lies, and how to read it there.

A tar is scanned once, header by header: plain files here, anything else by the standard library. Afterwards a member
is one read. A compressed tar (gzip, bzip2, xz; told by its first bytes, as WebDataset and GNU tar do) is unpacked into
memory once, up to ``MAX_UNPACKED_BYTES``, and where it is small up to a multiple of its size.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import re
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cloob.errors import InputError

MAX_UNPACKED_BYTES = 1024**3
"""A compressed tar may unpack to at most this; a larger one belongs on disk as a plain tar, which is read in place."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_MAGIC: tuple[tuple[bytes, Callable[[Path], gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile]], ...] = (
    (b"\x1f\x8b", gzip.GzipFile),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)
# What tarfile raises for headers that are cut, damaged or claim what no tar holds.
_DAMAGE = (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError, MemoryError)
_RECORDS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MOST_RATIO = 200  # of what a tar unpacks to, to its size: pictures barely compress, headers and captions 100-fold
_LEAST_LIMIT = 64 << 20  # whatever the ratio
_MOST_EXTENDED = 1 << 20
_MOST_NAME = 4096  # as Linux has it
_MOST_GLOBAL = 100  # records that hold for all members behind them
_OF_ONE = re.compile(rb"path|linkpath|size|GNU\.sparse\..*", re.DOTALL)  # what no two members have in common
_RECORD = re.compile(rb"([0-9]{1,20}) ([^=]+)=")
_LONG_NUMBER = re.compile(rb"[0-9]{256}")
_BLOCK = 512
_pread: Callable[[int, int, int], bytes] | None = getattr(os, "pread", None)  # Windows has none
_MAX_OPEN_FILES = 64
_MOST_PADDING = 1 << 20  # behind the end mark; tar pads to 10 KiB


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
    """The complete members of a tar, in order.

    ``cut`` says what is missing at the end when the archive was truncated or damaged, else it is None. ``goes_on``:
    behind the end mark another archive begins, which is not read, as where tars were put together by ``cat``.
    """

    members: tuple[Member, ...]
    cut: str | None = None
    goes_on: bool = False


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
        """The bytes at ``offset``; fewer where the file ends.

        Raises:
            OSError: They cannot be read, or size or offset is negative.
        """
        if size < 0 or offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if _pread is not None:
            return _pread(self._file.fileno(), size, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class TarReader:
    """Reads byte ranges of several tars: of files in place, of unpacked ones by slices.

    Safe over fork and spawn, and in several threads: each process opens its own file handles, and unpacks compressed
    tars itself when it was not forked from a process that had. At most 64 files are held open.

    Args:
        paths: The tars; they are addressed by their place in this tuple.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths
        self._unpacked: dict[int, bytes | None] = {}  # None: not compressed
        self._forget()

    def _forget(self) -> None:
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset`` of the (unpacked) archive; shorter if the file has shrunk.

        Raises:
            OSError: The file is gone or cannot be read.
        """
        if tar not in self._unpacked:
            self._unpacked[tar] = _unpack(self.paths[tar])[0]
        unpacked = self._unpacked[tar]
        if unpacked is not None:
            return unpacked[offset : offset + size]
        return self._handle(tar).read(size, offset)

    def listing(self, tar: int) -> TarListing:
        """Scans the headers of an archive; InputError if it is no tar, cannot be read, or unpacks to too much."""
        path = self.paths[tar]
        try:
            data, cut = _unpack(path)
            self._unpacked[tar] = data
            if data is not None and self.unpacked_bytes > MAX_UNPACKED_BYTES:
                raise _too_large(f"{path} and the tars before it unpack", MAX_UNPACKED_BYTES)
            if data is None:
                handle = _Handle(path)
                with path.open("rb") as file:
                    return _scan(path, file, lambda at: handle.read(_BLOCK, at))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        listing = _scan(path, io.BytesIO(data), lambda at: data[at : at + _BLOCK])
        return TarListing(listing.members, cut or listing.cut, listing.goes_on)

    @property
    def unpacked_bytes(self) -> int:
        """What it holds of compressed tars."""
        return sum(len(held or b"") for held in self._unpacked.values())

    def _handle(self, tar: int) -> _Handle:
        if self._pid != os.getpid():  # forked: another thread of the parent may have held the lock
            self._forget()
        with self._lock:
            handle = self._handles.pop(tar, None) or _Handle(self.paths[tar])
            self._handles[tar] = handle
            if len(self._handles) > _MAX_OPEN_FILES:
                self._handles.popitem(last=False)  # a thread that is reading keeps it open until it is done
        return handle

    def close(self) -> None:
        """Lets go of this process's file handles; the next read opens what it needs."""
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"])  # type: ignore[misc]


def _unpack(path: Path) -> tuple[bytes | None, str | None]:
    """The unpacked bytes (None for an uncompressed file), and what is wrong with the end, if anything is."""
    with path.open("rb") as plain:
        start = plain.read(6)
    opener = next((opener for magic, opener in _MAGIC if start.startswith(magic)), None)
    if opener is None:
        return None, None
    most = min(MAX_UNPACKED_BYTES, max(_LEAST_LIMIT, _MOST_RATIO * path.stat().st_size))
    data, cut = io.BytesIO(), None  # gives its bytes away without a copy
    with opener(path) as file:
        try:
            while chunk := file.read1(1 << 16):  # read() would withhold what precedes a cut
                data.write(chunk)
                if data.tell() > most:
                    raise _too_large(f"{path} unpacks", most)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if not data.tell():
                raise InputError(f"{path} cannot be unpacked: {error}") from None
            cut = f"the compressed data ends after {data.tell():,} unpacked bytes: {error}"
    return data.getvalue(), cut


def _too_large(what: str, most: int) -> InputError:
    return InputError(f"{what} to more than {most:,} bytes: unpack what is compressed to plain .tar, read in place")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Header(tarfile.TarInfo):
    """A header whose records are looked at first, whose names have an end, and which is of no sparse file.

    Python up to 3.12.5 takes memory and time by the square of a record's length (CVE-2024-6232). It reads the map of a
    sparse file into a list, however many numbers that says it has; no picture is stored as one.
    """

    def _proc_member(self, archive: Any) -> tarfile.TarInfo:
        if self.type in (*_RECORDS, *_NAMES) and not 0 <= self.size <= _MOST_EXTENDED:
            raise tarfile.HeaderError
        if self.type in _RECORDS:
            at = archive.fileobj.tell()
            keys = _keys(archive.fileobj.read(self.size))
            if keys is None or (self.type == tarfile.XGLTYPE and not _may_be_global(keys, archive.pax_headers)):
                raise tarfile.HeaderError
            archive.fileobj.seek(at)
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]

    def _refuse(self, *_: Any) -> None:
        raise tarfile.HeaderError

    # GNU's own type, and the three forms that records have.
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def _keys(content: bytes) -> list[bytes] | None:
    """The keys of an extended header; None unless it holds ``LENGTH KEY=VALUE`` lines in a row, zeros behind them."""
    at, keys = 0, []
    while at < len(content) and content[at]:
        record = _RECORD.match(content, at)
        end = at + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            return None
        keys.append(record[2])
        at = end
    return None if _LONG_NUMBER.search(content) else keys


def _may_be_global(keys: list[bytes], before: Mapping[str, str]) -> bool:
    """Whether records may hold for all members: each is gone over, and a name copied, for every one of them."""
    return len(keys) + len(before) <= _MOST_GLOBAL and not any(map(_OF_ONE.fullmatch, keys))


def _scan(path: Path, file: IO[bytes], block: Callable[[int], bytes]) -> TarListing:
    """Lists an archive; ``block`` gives the 512 bytes at an offset."""
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(0)
    if size == 0:
        return TarListing((), "the file is empty")
    try:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_Header)  # noqa: SIM115 - closing it would do nothing: the file is ours
    except _DAMAGE as error:
        if size < _BLOCK or _is_header(block(0)):  # cut in the first member's extended header
            return TarListing((), _cut(error, size))
        raise InputError(f"{path} is not a tar archive: {error}") from None
    members: list[Member] = []
    try:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # tarfile keeps every header otherwise, a kilobyte each
            # A size that leads back would be followed for ever.
            if info.size < 0 or tar.offset <= info.offset or len(info.name) > _MOST_NAME:
                raise tarfile.HeaderError
            if info.isreg() and info.offset_data + info.size <= size:
                members.append(Member(info.name, info.offset_data, info.size))
            while (member := _plain_member(block(tar.offset), tar.offset, size)) is not None:
                members.append(member)
                tar.offset = member.offset + -(-member.size // _BLOCK) * _BLOCK
        end = tar.offset
    except _DAMAGE as error:
        return TarListing(tuple(members), _cut(error, size))
    # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        return TarListing(tuple(members), f"no end-of-archive mark at byte {end:,} of {size:,}")
    padding = file.read(_MOST_PADDING)
    at = (len(padding) - len(padding.lstrip(b"\0"))) // _BLOCK * _BLOCK
    return TarListing(tuple(members), goes_on=at < len(padding) and _is_header(padding[at : at + _BLOCK]))


def _cut(error: Exception, size: int) -> str:
    """What is missing at the end of an archive of ``size`` bytes whose headers cannot be followed any further."""
    what = "cut after" if isinstance(error, tarfile.ReadError) else "a damaged header, or a sparse file, within"
    return f"{what} {size:,} bytes"


def _plain_member(header: bytes, at: int, end: int) -> Member | None:
    """The member of a header that needs no more than a glance, three times faster than tarfile; None: ask tarfile.

    That is a regular file with a short ASCII name, a right checksum and all its data before ``end``.
    """
    if len(header) < _BLOCK or header[156] not in b"0\0" or header[257:262] != b"ustar" or header[345]:
        return None
    length = header.find(0, 0, 100)
    name = header[: length if length >= 0 else 100]
    try:
        size, checksum = int(header[124:136].rstrip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:  # a number in base 256, or damage
        return None
    if not name or not name.isascii() or name.endswith(b"/") or size < 0 or at + _BLOCK + size > end:
        return None
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
        return None
    return Member(name.decode(), at + _BLOCK, size)
