"""The members of a tar, by a loop over its headers.

tarfile makes an object of thirty attributes of every header, which takes most of the
time to open a set of shards. A header of POSIX.1-1988 (ustar) is 512 bytes of fixed
fields; its checksum is the sum of its bytes with that of the checksum's own eight taken
for spaces. Read here is what no two readers differ on: regular files with short ASCII
names, and the times that WebDataset writes in headers of their own. Every other header,
damaged ones included, is tarfile's.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tarfile
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from cloob.errors import InputError

BLOCK = 512
_MAX_PADDING = 1 << 20  # bytes behind the end of an archive that are looked at
_FIELDS = struct.Struct("100s 24x 12s 12x 8s c 188x 167s")
_NOTHING = bytes(167)  # no part of the name, and no other format's fields
_NUMBER = re.compile(rb" *([0-7]+)[ \0]*")
_TIMES = re.compile(rb"(?:\d{1,3} [acm]time=[-.\d]+\n)+")  # records of pax
# what tarfile raises on damaged headers
_DAMAGED = (tarfile.TarError, ValueError, IndexError, OverflowError)


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its content lies in the archive, in
    bytes.
    """

    name: str
    offset: int
    size: int


class _Header(NamedTuple):
    """What a header says of what follows it: a file, or records of the next header."""

    name: str
    size: int  # bytes
    is_extended: bool  # records follow


def members_of(path: Path) -> tuple[list[Member], str | None]:
    """The complete members of an archive, and what is wrong where it is cut or
    damaged.
    """
    with FileIO(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except _DAMAGED as error:
            if size < BLOCK:
                return [], f"cut after {size:,} bytes"
            raise InputError(f"{path} is not a tar archive") from error
        members: list[Member] = []
        end = 0  # of what has been read
        with contextlib.suppress(*_DAMAGED):
            while True:
                member, following = _member_at(end, file, archive)
                if following <= end:  # a size that leads back would have no end
                    break
                end = following
                if member is not None and member.offset + member.size <= size:
                    members.append(member)
        return members, _fault(file, end, size)


def _member_at(
    offset: int, file: FileIO, archive: tarfile.TarFile
) -> tuple[Member | None, int]:
    """The member whose header is at an offset, None of what is no regular file; and
    where the next header is.
    """
    member = _plain_member(file.fileno(), offset)
    if member is not None:
        return member, -(-(member.offset + member.size) // BLOCK) * BLOCK
    file.seek(offset)
    info = archive.tarinfo.fromtarfile(archive)
    if info.isreg():
        member = Member(info.name, info.offset_data, info.size)
    return member, archive.offset


def _plain_member(file: int, offset: int) -> Member | None:
    """The member whose header, or whose header of times, is at an offset; None where
    tarfile has to read it.
    """
    blocks = os.pread(file, 3 * BLOCK, offset)
    header = _plain_header(blocks[:BLOCK])
    if header is not None and header.is_extended:
        records = blocks[BLOCK : BLOCK + header.size]
        if header.size > BLOCK or not _TIMES.fullmatch(records):
            return None
        offset += 2 * BLOCK
        header = _plain_header(blocks[2 * BLOCK :])
    if header is None or header.is_extended:
        return None
    return Member(header.name, offset + BLOCK, header.size)


def _plain_header(head: bytes) -> _Header | None:
    """The name, the size and the kind of a regular file's header, or of an extended
    one.
    """
    if len(head) < BLOCK:
        return None
    raw_name, raw_size, checksum, kind, rest = _FIELDS.unpack(head)
    total = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    if rest != _NOTHING or kind not in b"0\0x" or _octal(checksum) != total:
        return None
    size = _octal(raw_size)
    name, zero, _ = raw_name.partition(b"\0")
    if size is None or not zero or not name.isascii() or name.endswith(b"/"):
        return None
    return _Header(name.decode("ascii"), size, kind == b"x")


@lru_cache(256)
def _octal(field: bytes) -> int | None:
    number = _NUMBER.fullmatch(field)
    return int(number[1], 8) if number else None


def _fault(file: FileIO, end: int, size: int) -> str | None:
    """What is wrong where the last member ends: zeros alone are to follow."""
    if end > size - BLOCK:
        return f"cut after {size:,} bytes"
    if os.pread(file.fileno(), _MAX_PADDING, end).strip(b"\0"):
        return f"damaged, or another archive follows, at byte {end:,} of {size:,}"
    return None
