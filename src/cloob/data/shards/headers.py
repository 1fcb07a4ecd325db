"""The members of a tar by its headers alone, where these are plain.

tarfile makes an object of thirty attributes of every header, which takes most of the
time to open a set of shards. A header of POSIX.1-1988 (ustar) is 512 bytes of fixed
fields; its checksum is the sum of its bytes with that of the checksum's own eight taken
for spaces. What is read here is the subset on which no two readers differ: complete
archives of regular files with short ASCII names, and the times that WebDataset writes
in headers of their own; owners, times and devices are not looked at. Of all else,
damaged archives included, nothing is decided here: the answer is None, and tarfile
reads the archive.
"""

from __future__ import annotations

import os
import struct
from functools import lru_cache
from typing import NamedTuple

BLOCK = 512
_MAX_PADDING = 1 << 20  # bytes behind the end that are looked at
_MAX_TIMES = 2 * BLOCK  # bytes of the times of a member
_FIELDS = struct.Struct("100s 24x 12s 12x 8s c 188x 167s")
_CHECKSUM = slice(148, 156)
_NOTHING = bytes(167)
_REGULAR = (b"0", b"\0")
_EXTENDED = b"x"
_TIMES = (b"mtime", b"atime", b"ctime")


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its content lies in the (unpacked)
    archive, in bytes.
    """

    name: str
    offset: int
    size: int


def plain_members(file: int, size: int) -> list[Member] | None:
    """The members of the tar in an open file of ``size`` bytes, by its headers; None
    where one of them is not plain.
    """
    members: list[Member] = []
    place = 0
    after_times = False  # whether the header before has the times of the next member
    while len(head := os.pread(file, BLOCK, place)) == BLOCK:
        if head[0] == 0:
            is_whole = members and not after_times and _is_end(file, place, size)
            return members if is_whole else None
        fields = _plain_fields(head)
        if fields is None:
            return None
        name, n_bytes, kind = fields
        content = place + BLOCK
        n_blocks = -(-n_bytes // BLOCK)
        place = content + n_blocks * BLOCK
        if place > size:
            return None
        if kind in _REGULAR:
            members.append(Member(name, content, n_bytes))
            after_times = False
        elif after_times or not _are_times(file, content, n_bytes):
            return None
        else:
            after_times = True
    return None


def _plain_fields(head: bytes) -> tuple[str, int, bytes] | None:
    """The name, the size and the kind of a header; None of one that is not plain."""
    raw_name, size, checksum, kind, rest = _FIELDS.unpack(head)
    n_bytes = _octal(size)
    if n_bytes is None or rest != _NOTHING or _octal(checksum) != _sum(head):
        return None
    name, zero, _ = raw_name.partition(b"\0")
    if not zero or not name.isascii() or name.endswith(b"/"):
        return None
    if kind not in _REGULAR and kind != _EXTENDED:
        return None
    return name.decode("ascii"), n_bytes, kind


@lru_cache(256)
def _octal(field: bytes) -> int | None:
    """The number of a field, 0 of an empty one; None of what is not octal digits."""
    digits = field.lstrip(b" ").rstrip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        return None
    return int(digits, 8)


def _sum(head: bytes) -> int:
    return sum(head) - sum(head[_CHECKSUM]) + 8 * ord(" ")


def _is_end(file: int, place: int, size: int) -> bool:
    """Whether two blocks of zeros end the archive, and nothing but zeros follows."""
    if not 2 * BLOCK <= size - place <= _MAX_PADDING:
        return False
    padding = os.pread(file, size - place, place)
    return padding == bytes(size - place)


def _are_times(file: int, place: int, size: int) -> bool:
    """Whether an extended header has times alone: records ``length key=value`` and a
    newline, as pax writes them.
    """
    if size > _MAX_TIMES:
        return False
    records = os.pread(file, size, place)
    while records:
        length, space, rest = records.partition(b" ")
        if not space or not length.isdigit() or len(length) > 4:
            return False
        end = int(length)
        record, records = records[:end], records[end:]
        key = rest.partition(b"=")[0]
        if len(record) != end or not record.endswith(b"\n") or key not in _TIMES:
            return False
    return True
