"""torch's zip archive: a directory that must be true in every field before a record is looked at.

Records are stored, never compressed (but for the code in a TorchScript archive, which nobody reads). Each has one name,
one place and a right CRC-32; nothing lies before the first one or after the directory. The local headers say what the
directory says. So a file means one thing to every reader.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cloob.errors import InputError
from cloob.models.weights.formats.pickles import printable

_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ALLOWED_FLAGS = 0x0808  # sizes that follow the data, and names in UTF-8
_DESCRIPTOR = 24  # bytes that may follow a record's data, at most
_SAFE = re.compile(r"[^\\:\0/]+(/[^\\:\0/]+)*")
_BLOCK = 1 << 20
_MAX_DIRECTORY = 1 << 26


class Record(NamedTuple):
    """One record: where its bytes lie in the file."""

    start: int
    size: int


class _Entry(NamedTuple):
    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int


def read_directory(path: Path, file: BinaryIO, size: int) -> dict[str, Record]:
    """The records of a torch archive by their names, without the folder that they all lie in.

    Args:
        path: For errors.
        file: Open for reading.
        size: Of the file, bytes.

    Raises:
        InputError: It is no such archive, or a field of it is not true.
    """
    try:
        entries, directory = _entries(path, file, size)
        records = _records(path, file, entries, directory)
    except (struct.error, UnicodeDecodeError):
        raise _wrong(path, "its directory is damaged") from None
    for entry, record in records:
        _check_crc(path, file, entry, record)
    names = {entry.name.decode("utf-8"): record for entry, record in records}
    if len(names) != len(records):
        raise _wrong(path, "two records have one name")
    for name in names:
        if not _SAFE.fullmatch(name) or {".", ".."} & set(name.split("/")):
            raise _wrong(path, f"a record is called {printable(name)!r}")
    folders = {name.partition("/")[0] for name in names}
    if len(folders) != 1 or any("/" not in name for name in names):
        raise _wrong(path, "its records do not lie in one folder")
    return {name.partition("/")[2]: record for name, record in names.items()}


def _wrong(path: Path, why: str) -> InputError:
    return InputError(f"{path}: not an archive that torch writes, or damaged: {why}")


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _entries(path: Path, file: BinaryIO, size: int) -> tuple[list[_Entry], int]:
    """The directory's entries, and where it begins."""
    end = size - _END.size
    if end < 0:
        raise _wrong(path, "it is cut short")
    sign, disk, first, here, total, length, offset, comment = _END.unpack(_at(file, end, _END.size))
    if sign != b"PK\x05\x06" or comment:
        raise _wrong(path, "it does not end as a zip does (cut short?)")
    locator = end - _LOCATOR.size
    if locator >= _END_64.size and _at(file, locator, 4) == b"PK\x06\x07":
        _, _, place, _ = _LOCATOR.unpack(_at(file, locator, _LOCATOR.size))
        end = locator - _END_64.size
        if place != end:
            raise _wrong(path, "its end is not where it says")
        long = _END_64.unpack(_at(file, end, _END_64.size))
        if long[0] != b"PK\x06\x06" or long[1] != _END_64.size - 12:
            raise _wrong(path, "its end is not what it says")
        disk, first, here, total, length, offset = long[4:]
    if disk or first or here != total or offset + length != end or length > _MAX_DIRECTORY:
        raise _wrong(path, "its directory is not where it says")
    block, entries, at = _at(file, offset, length), [], 0
    while at < length:
        fields = _ENTRY.unpack(block[at : at + _ENTRY.size])
        name_size, extra_size, comment = fields[10:13]
        begin = at + _ENTRY.size
        name, extra = block[begin : begin + name_size], block[begin + name_size : begin + name_size + extra_size]
        at = begin + name_size + extra_size
        if fields[0] != b"PK\x01\x02" or comment or fields[13] or at > length:
            raise _wrong(path, "its directory is damaged")
        flags, method, crc = fields[3], fields[4], fields[7]
        packed, plain, place = _long_sizes(path, extra, fields[8], fields[9], fields[16])
        code = b"/code/" in name  # of TorchScript, and never read here
        if flags & ~_ALLOWED_FLAGS or method not in ((0, 8) if code else (0,)) or (packed != plain and not method):
            raise _wrong(path, "a record is compressed or encrypted; torch only stores")
        entries.append(_Entry(name, flags, method, crc, packed, plain, place))
    if len(entries) != total:
        raise _wrong(path, f"its directory has {len(entries)} records and says {total}")
    return entries, offset


def _long_sizes(path: Path, extra: bytes, packed: int, plain: int, place: int) -> tuple[int, int, int]:
    """Sizes and place with what the zip64 field says where 32 bits are too few."""
    if 0xFFFFFFFF not in (packed, plain, place):
        return packed, plain, place
    at = 0
    while at + 4 <= len(extra):
        kind, count = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            numbers = list(struct.unpack_from(f"<{count // 8}Q", extra, at + 4))
            plain = numbers.pop(0) if plain == 0xFFFFFFFF and numbers else plain
            packed = numbers.pop(0) if packed == 0xFFFFFFFF and numbers else packed
            place = numbers.pop(0) if place == 0xFFFFFFFF and numbers else place
            return packed, plain, place
        at += 4 + count
    raise _wrong(path, "a record's size is missing")


def _records(path: Path, file: BinaryIO, entries: list[_Entry], directory: int) -> list[tuple[_Entry, Record]]:
    """The entries with the place of their bytes, in the file's order."""
    records, free = [], 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if not (free <= entry.offset <= free + _DESCRIPTOR and (free or not entry.offset)):
            raise _wrong(path, "its records overlap, or bytes between them belong to none")
        local = _LOCAL.unpack(_at(file, entry.offset, _LOCAL.size))
        sign, _, flags, method, _, _, crc, packed, plain, name_size, extra_size = local
        name = _at(file, entry.offset + _LOCAL.size, name_size)
        agrees = crc in (entry.crc, 0) and packed in (entry.packed, 0, 0xFFFFFFFF)
        agrees = agrees and plain in (entry.size, 0, 0xFFFFFFFF)
        if sign != b"PK\x03\x04" or name != entry.name or flags != entry.flags or method != entry.method or not agrees:
            raise _wrong(path, "a record and the directory contradict each other")
        start = entry.offset + _LOCAL.size + name_size + extra_size
        free = start + entry.packed
        if free > directory:
            raise _wrong(path, "a record runs into the directory")
        records.append((entry, Record(start, entry.packed)))
    if directory - free > _DESCRIPTOR:
        raise _wrong(path, "bytes before its directory belong to no record")
    return records


def _check_crc(path: Path, file: BinaryIO, entry: _Entry, record: Record) -> None:
    if entry.method:
        return
    file.seek(record.start)
    crc, left = 0, record.size
    while left:
        block = file.read(min(left, _BLOCK))
        if not block:
            raise _wrong(path, "it is cut short")
        crc = zlib.crc32(block, crc)
        left -= len(block)
    if crc != entry.crc:
        name = printable(entry.name.decode("utf-8", "replace"))
        raise _wrong(path, f"the bytes of {name!r} are not those that were written (CRC-32)")
