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

from cloob.data.sources.bounds import names_in_utf8
from cloob.errors import InputError
from cloob.files import check_regular

_MAGIC = b"ARROW1"  # begins and ends a file; a stream has none
_BLOCK = struct.Struct("<qi4xq")  # of a file's end: where a message lies, and the sizes of its two parts
# The numbers of fields: of a message, of a dictionary, of a batch, and of a file's end.
_HEADER, _DATA, _IS_DELTA, _NODES, _COMPRESSION, _DICTIONARIES, _BATCHES = 2, 1, 2, 1, 3, 2, 3
_MOST = 1_000_000  # rows, or columns of all batches together, that a file may have whatever its size
_BYTES_A_COLUMN = 64  # of a batch: pyarrow takes some 300 bytes of memory for each, a file no more than 16
_COMPRESSION_0_17 = b"ARROW:experimental_compression"  # a key of a message's metadata, which pyarrow still follows


def map_arrow(path: Path) -> pa.Table:
    """An Arrow file of either kind, mapped. Its rows are read only after :func:`cloob.data.sources.bounds.checked`.

    Raises:
        InputError: It is compressed, of more columns or rows than a file of its size has, or a dictionary grows in it.
        OSError: There is no such file, it ends early, or is a pipe.
        pa.ArrowException: It is no such file, or damaged.
    """
    check_regular(path)
    with pa.memory_map(str(path)) as source:
        size = source.size()
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        columns = 0
        for message in _of_file(source) if is_file else pa.ipc.MessageReader.open_stream(source):
            if message.type not in ("record batch", "dictionary"):
                continue
            data = message.metadata.to_pybytes()
            batch = _batch(data, message.type)
            if _is_compressed(data, batch):
                raise InputError(
                    f"{path}: is compressed, so all of it would be unpacked into memory; save it as Arrow without "
                    "compression, or as Parquet"
                )
            if not is_file and message.type == "dictionary" and _is_delta(data):
                raise InputError(
                    f"{path}: adds to a dictionary between batches, and each of them would have a copy of its own; "
                    "save it as an Arrow file, not as a stream"
                )
            columns += _columns(data, batch)
            if columns > _MOST + size // _BYTES_A_COLUMN:
                raise InputError(f"{path}: is cut into too many small batches; save it again with more rows in each")
        source.seek(0)
        table = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()
    table.validate()
    with names_in_utf8():
        structs = [field.type for field in table.schema if pa.types.is_struct(field.type)]
        _ = {field.name for fields in (table.schema, *structs) for field in fields}
    if table.num_rows > _MOST + size:
        raise InputError(f"{path}: counts {table.num_rows:,} rows, but has {size:,} bytes; save it again")
    return table


def _of_file(source: pa.MemoryMappedFile) -> Iterator[pa.Message]:
    """The messages that the end of a file lists, which may lie anywhere in it, but not over each other."""
    pa.ipc.open_file(source)  # raises where the end is damaged
    behind = source.size() - 4 - len(_MAGIC)
    (size,) = struct.unpack("<i", source.read_at(4, behind))
    end = source.read_at(size, behind - size)
    listed: list[tuple[int, int, int]] = []
    for number in (_DICTIONARIES, _BATCHES):
        if (blocks := _followed(end, _field(end, _root(end), number))) is not None:
            count = _unsigned(end, blocks)
            listed += _BLOCK.iter_unpack(end[blocks + 4 : blocks + 4 + count * _BLOCK.size])
    last = 0
    for offset, about, body in sorted(listed):
        if offset < last or about < 0 or body < 0:
            raise pa.ArrowInvalid("its end lists batches that lie over each other")
        last = offset + about + body
    for offset, _, _ in listed:
        source.seek(offset)
        with contextlib.suppress(EOFError):  # an empty one, at which reading the file fails
            yield pa.ipc.read_message(source)


def _batch(data: bytes, kind: str) -> int | None:
    """Where the batch lies that a message holds, or that its dictionary is."""
    header = _followed(data, _field(data, _root(data), _HEADER))
    return header if kind == "record batch" or header is None else _followed(data, _field(data, header, _DATA))


def _is_compressed(data: bytes, batch: int | None) -> bool:
    said = batch is not None and _field(data, batch, _COMPRESSION) is not None
    return said or _COMPRESSION_0_17 in data


def _is_delta(data: bytes) -> bool:
    """Whether a dictionary adds to the one before it."""
    header = _followed(data, _field(data, _root(data), _HEADER))
    said = None if header is None else _field(data, header, _IS_DELTA)
    return said is not None and data[said] != 0


def _columns(data: bytes, batch: int | None) -> int:
    """How many columns a batch has, with those inside of others."""
    nodes = None if batch is None else _followed(data, _field(data, batch, _NODES))
    return 0 if nodes is None else _unsigned(data, nodes)


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
