"""Arrow files and streams, mapped: nothing of them is in memory before it is looked at.

That holds for what is not compressed. Compressed batches are unpacked whole by pyarrow, in each process, however much a
small file makes of itself; and pyarrow does not say beforehand that they are. Their messages do. These are flatbuffers
(Message.fbs and File.fbs of https://github.com/apache/arrow/tree/main/format), and found sound by pyarrow before they
are read here.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cloob.errors import InputError

_MAGIC = b"ARROW1"  # begins and ends a file; a stream has none
_BLOCK = struct.Struct("<qi4xq")  # of a file's end: where a message lies, and the sizes of its two parts
# The numbers of fields: of a message, of a dictionary, of a batch, and of a file's end.
_HEADER, _DATA, _COMPRESSION, _DICTIONARIES, _BATCHES = 2, 1, 3, 2, 3
_COMPRESSION_0_17 = b"ARROW:experimental_compression"  # a key of a message's metadata, which pyarrow still follows


def map_arrow(path: Path) -> pa.Table:
    """An Arrow file of either kind, mapped.

    Raises:
        InputError: It is compressed.
        OSError: There is no such file, or it ends early.
        pa.ArrowException: It is no such file, or damaged.
    """
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        messages = _of_file(source) if is_file else pa.ipc.MessageReader.open_stream(source)
        if any(map(_is_compressed, messages)):
            raise InputError(
                f"{path}: is compressed, so all of it would be unpacked into memory; save it as Arrow without "
                "compression, or as Parquet"
            )
        source.seek(0)
        return (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()


def _of_file(source: pa.MemoryMappedFile) -> Iterator[pa.Message]:
    """The messages that the end of a file lists, which may lie anywhere in it."""
    pa.ipc.open_file(source)  # raises where the end is damaged
    behind = source.size() - 4 - len(_MAGIC)
    (size,) = struct.unpack("<i", source.read_at(4, behind))
    end = source.read_at(size, behind - size)
    for number in (_DICTIONARIES, _BATCHES):
        if (blocks := _followed(end, _field(end, _root(end), number))) is not None:
            count = _unsigned(end, blocks)
            for offset, _, _ in _BLOCK.iter_unpack(end[blocks + 4 : blocks + 4 + count * _BLOCK.size]):
                source.seek(offset)
                with contextlib.suppress(EOFError):  # an empty one, at which reading the file fails
                    yield pa.ipc.read_message(source)


def _is_compressed(message: pa.Message) -> bool:
    if message.type not in ("record batch", "dictionary"):
        return False
    data = message.metadata.to_pybytes()
    batch = _followed(data, _field(data, _root(data), _HEADER))
    if message.type == "dictionary" and batch is not None:
        batch = _followed(data, _field(data, batch, _DATA))
    said = batch is not None and _field(data, batch, _COMPRESSION) is not None
    return said or _COMPRESSION_0_17 in data


def _unsigned(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _root(data: bytes) -> int:
    """Where a flatbuffer's outermost table lies."""
    return _unsigned(data, 0)


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a table lies; None: it is left out."""
    places = table - struct.unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    if slot >= struct.unpack_from("<H", data, places)[0]:
        return None
    offset = int(struct.unpack_from("<H", data, places + slot)[0])
    return table + offset if offset else None


def _followed(data: bytes, field: int | None) -> int | None:
    """Where the table or list lies that a field refers to."""
    return None if field is None else field + _unsigned(data, field)
