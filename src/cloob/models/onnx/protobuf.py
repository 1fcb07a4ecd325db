"""The wire format of protocol buffers, as far as looking at a file of unknown origin needs it: nothing is copied.

A message is a run of bytes, given by where it starts and ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Buffer = memoryview
_LONGEST_NUMBER = 10  # bytes of a varint of 64 bits


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: Of the field.
        value: A number; the value's own bytes for fixed32 and fixed64.
        start: Where the bytes of a string, a message or a packed list begin; -1 for a number.
        end: Where they end.
    """

    number: int
    value: int
    start: int
    end: int


def fields(data: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of a message, in order; ValueError if these bytes are no message."""
    at = start
    while at < end:
        key, at = _number(data, at, end)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _number(data, at, end)
            yield Field(number, value, -1, -1)
        elif kind == 2:
            length, at = _number(data, at, end)
            if length > end - at:
                raise ValueError(f"a field of {length:,} bytes where {end - at:,} are left")
            yield Field(number, 0, at, at + length)
            at += length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            if size > end - at:
                raise ValueError("cut short")
            yield Field(number, int.from_bytes(data[at : at + size], "little"), -1, -1)
            at += size
        else:
            raise ValueError(f"a field of kind {kind}, which there is not")


def text(data: Buffer, field: Field) -> str:
    """The string that a field holds, what is no UTF-8 replaced."""
    return bytes(data[field.start : field.end]).decode("utf-8", "replace")


def numbers(data: Buffer, field: Field, most: int) -> list[int]:
    """The signed whole numbers of a field, alone or packed; ValueError for more than ``most``."""
    found: list[int] = []
    if field.start < 0:
        found.append(field.value)
    at = field.start
    while field.start >= 0 and at < field.end:
        value, at = _number(data, at, field.end)
        found.append(value)
        if len(found) > most:
            raise ValueError(f"a list of more than {most} numbers")
    return [value - (1 << 64) if value >> 63 else value for value in found]


def _number(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """A varint, and where what follows begins."""
    value = 0
    for place in range(_LONGEST_NUMBER):
        if at >= end:
            raise ValueError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
    raise ValueError("a number of more than 64 bits")
