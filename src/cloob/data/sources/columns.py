"""Columns of Arrow and Parquet files, as pyarrow reads them. What it raises is ``READ_ERRORS``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from cloob.errors import InputError
from cloob.files import check_regular

READ_ERRORS = (OSError, UnicodeDecodeError, pa.ArrowException)  # UnicodeDecodeError: a column's name

_MAGIC = b"ARROW1"  # a file begins so; a stream has none
_ROWS = 64  # of a batch of pictures
_POOL = pa.proxy_memory_pool(pa.default_memory_pool())  # for mapped files alone; only what is compressed takes from it
_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def map_arrow(path: Path) -> pa.Table:
    """An Arrow file or stream, mapped: its rows are read only after :func:`checked`.

    Raises:
        InputError: It is compressed.
    """
    check_regular(path)
    before = _POOL.bytes_allocated()
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source, memory_pool=_POOL)
        batches = []
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            batches.append(batch)
            if _POOL.bytes_allocated() > before:
                raise InputError(f"{path}: is compressed; save it as Arrow without compression, or as Parquet")
    table = pa.Table.from_batches(batches, reader.schema)
    _ = [field.name for field in table.schema]  # UnicodeDecodeError
    return table


def checked(table: pa.Table) -> pa.Table:
    """The table, whose offsets lead into its own data. Whether a text is UTF-8 is its row's own matter."""
    for column in table.columns:
        column.cast(_BYTES.get(column.type, column.type)).validate(full=True)
    return table


def open_parquet(path: Path | str) -> parquet.ParquetFile:
    """Opens a file, and no pipe."""
    check_regular(path)
    return parquet.ParquetFile(path)


def read_schema(path: Path | str) -> pa.Schema:
    """The columns of a Parquet file."""
    with open_parquet(path) as file:
        return file.schema_arrow


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file; of several of one name the first."""
    with open_parquet(path) as file:
        table = file.read(columns=list(columns))
    return pa.table({column: table.column(table.column_names.index(column)) for column in columns})


def unpacked(
    path: Path, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, few at a time; None: all columns, all groups of rows."""
    with open_parquet(path) as file:
        yield from file.iter_batches(_ROWS, row_groups=groups, columns=columns)
