"""The headers of a Parquet file's pages: pyarrow unpacks each page whole, whatever the file's end says of it.

A header is a ``PageHeader`` of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift in
Thrift's compact protocol. What could be read in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap
from typing import Any, NamedTuple

import pyarrow as pa

DELTA_BYTE_ARRAY = 7  # an encoding: a value says how much of the one before it begins with

_KIND, _UNPACKED, _STORED = 1, 2, 3  # fields of a header
_DATA = {0: (5, 2), 3: (8, 4)}  # kinds of pages with rows: the fields of their own header, and of the encoding in that
_VALUES = 1
_MOST_FIELDS, _MOST_NESTED = 100, 4  # of a header; there are some 20, three deep
_BYTE_SIZES = {1: 0, 2: 0, 3: 1, 7: 8}  # of values of Thrift's kinds: true, false, a byte, a double
_INTEGERS, _INT64, _TEXT, _STRUCT = (4, 5, 6), 6, 8, 12


class Page(NamedTuple):
    """What a page unpacks to, in bytes, and the number of its encoding; None: it holds no rows."""

    unpacked: int
    encoding: int | None


def read_pages(data: mmap | bytes, start: int, end: int, values: int) -> Iterator[Page]:
    """The pages of one column in one group of rows, as far as pyarrow reads them.

    Args:
        data: The file.
        start: Where the first page begins.
        end: Where the last one ends.
        values: How many values they hold together.

    Raises:
        pa.ArrowInvalid: A header is damaged, or encrypted.
    """
    at = start
    while values > 0 and at < end:
        try:
            header = _Header(data, at)
            found = header.struct()
            unpacked, stored, held, encoding = found[_UNPACKED], found[_STORED], 0, None
            if found[_KIND] in _DATA:
                own, number = _DATA[found[_KIND]]
                held, encoding = found[own][_VALUES], found[own][number]
            if min(unpacked, stored, held) < 0:
                raise ValueError
        except (LookupError, TypeError, ValueError):
            raise pa.ArrowInvalid(f"the header of the page at byte {at:,} is damaged") from None
        yield Page(unpacked, encoding)
        at, values = header.at + stored, values - held


class _Header:
    """What is read of a file from a place on."""

    def __init__(self, data: mmap | bytes, at: int) -> None:
        if at < 0:
            raise ValueError
        self._data, self.at = data, at
        self._fields = 0

    def struct(self, depth: int = 1) -> dict[int, Any]:
        """Its fields by their numbers: whole numbers of 32 bits, and structures; the others are passed over."""
        found: dict[int, Any] = {}
        number = 0
        while kind := (head := self._byte()) & 15:
            number = number + (head >> 4) if head >> 4 else _signed(self._unsigned())
            self._fields += 1
            if self._fields > _MOST_FIELDS or depth > _MOST_NESTED or not 0 < number < 2**15:
                raise ValueError
            if kind in _INTEGERS:
                value = _signed(self._unsigned(64 if kind == _INT64 else 32))
                if kind == 5:
                    found[number] = value
            elif kind == _STRUCT:
                found[number] = found.get(number, {}) | self.struct(depth + 1)
            else:
                size = self._unsigned() if kind == _TEXT else _BYTE_SIZES[kind]
                self.at += size
        return found

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self, bits: int = 32) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                break
        if value >> bits or byte > 127:
            raise ValueError
        return value


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
