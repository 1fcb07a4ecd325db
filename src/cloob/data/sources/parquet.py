"""Parquet files, of which a small one may unpack to more than memory holds.

What a file says of it is looked at before, and what comes of it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cloob.data.decode import MAX_IMAGE_BYTES
from cloob.errors import InputError
from cloob.files import check_regular

_MOST_TIMES = 100  # its size is what a file may unpack to: one picture has dozens of captions in some sets
_MOST_LISTED = 100_000  # columns, groups of rows and the like; memory for as many as a file claims is taken at once
_INDEX_BYTES = 4  # of a value that stands in a dictionary
_ROWS = 64  # of a batch of pictures: few have to be in memory at a time
_BATCH_BYTES = 16 * 1024**2  # from which on a batch gets no more rows


def open_parquet(path: Path | str, **how: Any) -> parquet.ParquetFile:
    """Opens a file; ``how`` is what ``pyarrow.parquet.ParquetFile`` takes.

    Raises:
        OSError: There is no such file, its end is damaged, or it is a pipe.
        pa.ArrowException: It is no such file.
    """
    check_regular(path)
    return parquet.ParquetFile(path, thrift_container_size_limit=_MOST_LISTED, **how)


def read_metadata(path: Path | str) -> parquet.FileMetaData:
    """What the end of a file says of it; raises as :func:`open_parquet`."""
    with open_parquet(path) as file:
        return file.metadata


def read_schema(path: Path | str) -> pa.Schema:
    """The columns of a file; raises as :func:`open_parquet`."""
    return read_metadata(path).schema.to_arrow_schema()


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a file, whole; those of text or bytes as large ones.

    Text is read as it is stored at its smallest, each value once and an index in each row, and spelled out when it is
    known to what it comes. pyarrow cannot do so inside lists and structures; of these few rows are read at a time.

    Raises:
        InputError: They come to more than a hundred times the file's size and ``MAX_IMAGE_BYTES``.
        OSError: There is no such file.
        pa.ArrowException: It is no such file, or damaged.
    """
    most = MAX_IMAGE_BYTES + _MOST_TIMES * path.stat().st_size
    about = read_metadata(path)
    if _stated_bytes(about, columns, range(about.num_row_groups)) > most:
        raise _too_large(path, most)
    leaves = {about.schema.column(i).path for i in range(len(about.schema.names))}
    flat = [column for column in columns if column in leaves]
    with open_parquet(path, read_dictionary=flat) as file:
        table = file.read(columns=flat)
        found = {column: table.column(table.column_names.index(column)) for column in flat}  # a name may be there twice
        held = sum(_bytes_of(chunk) for column in found.values() for chunk in column.chunks)
        for column in columns:
            if column not in leaves:
                found[column] = _few_at_a_time(file, column, most - held)
                held += found[column].nbytes
    if held > most:
        raise _too_large(path, most)
    return pa.table({column: _spelled(found[column]) for column in columns})


def _few_at_a_time(file: parquet.ParquetFile, column: str, most: int) -> pa.ChunkedArray:
    """A column of lists or structures, no further than to where it is more than ``most`` bytes."""
    chunks, held = [], 0
    for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
        chunks.append(batch.column(0))
        held += batch.nbytes
        if held > most:
            break
    return pa.chunked_array(chunks, file.schema_arrow.field(column).type)


def _is_text(kind: pa.DataType) -> bool:
    """Whether it is a dictionary of text or bytes, as which pyarrow was asked to read them."""
    held = kind.value_type if pa.types.is_dictionary(kind) else None
    return held in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _spelled(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not _is_text(column.type):
        return column
    is_bytes = column.type.value_type in (pa.binary(), pa.large_binary())
    return column.cast(pa.large_binary() if is_bytes else pa.large_string())


def _bytes_of(chunk: pa.Array) -> int:
    """What it takes when it is spelled out."""
    if not _is_text(chunk.type):
        return int(chunk.nbytes)
    lengths = pc.cast(pc.binary_length(chunk.dictionary), pa.int64())
    return int(pc.sum(lengths.take(chunk.indices)).as_py() or 0)


def _too_large(path: Path, most: int) -> InputError:
    return InputError(
        f"{path} unpacks to more than {most:,} bytes: save it as Arrow without compression, which is read in place"
    )


def unpacked(
    path: Path, columns: Sequence[str] | None = None, group: int | None = None, *, most_times: int = _MOST_TIMES
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, few at a time.

    They are unpacked one by one: a picture of megabytes takes two bytes in each row but the first where it stands in a
    dictionary, and no size in the file speaks of that.

    Args:
        path: The file.
        columns: These alone; None: all.
        group: This group of rows alone; None: all.
        most_times: Its size is what the file may unpack to, beside ``MAX_IMAGE_BYTES``.

    Raises:
        InputError: It unpacks to more.
        OSError: There is no such file.
        pa.ArrowException: It is no such file, or damaged.
    """
    most = MAX_IMAGE_BYTES + most_times * path.stat().st_size
    with open_parquet(path) as file:
        groups = list(range(file.num_row_groups) if group is None else [group])
        if _stated_bytes(file.metadata, columns, groups) > most:
            raise _too_large(path, most)
        rows, held, done = [], 0, 0
        for row in file.iter_batches(batch_size=1, row_groups=groups, columns=columns):
            rows.append(row)
            held += row.nbytes
            if done + held > most:
                raise _too_large(path, most)
            if len(rows) == _ROWS or held > _BATCH_BYTES:
                yield pa.concat_batches(rows)
                rows, held, done = [], 0, done + held
        if rows:
            yield pa.concat_batches(rows)


def _stated_bytes(about: parquet.FileMetaData, columns: Sequence[str] | None, groups: Sequence[int]) -> int:
    """What some columns unpack to at least, as the file's end has it; nothing checks that."""
    found = [about.row_group(i) for i in groups]
    chunks = [group.column(i) for group in found for i in range(group.num_columns)]
    wanted = None if columns is None else tuple(f"{column}." for column in columns)
    return sum(
        max(chunk.total_uncompressed_size, _INDEX_BYTES * chunk.num_values)
        for chunk in chunks
        if wanted is None or f"{chunk.path_in_schema}.".startswith(wanted)
    )
