"""Parquet files, of which a small one may unpack to more than memory holds.

What a file says of it is looked at before, and what comes of it is counted.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cloob.data.sources.bounds import names_in_utf8
from cloob.data.sources.pages import DELTA_BYTE_ARRAY, read_pages
from cloob.errors import InputError
from cloob.files import check_regular
from cloob.pictures import MAX_IMAGE_BYTES

_MOST_TIMES = 100  # its size is what a file may unpack to: one picture has dozens of captions in some sets
_MOST_LISTED = 100_000  # columns, groups of rows and the like; memory for as many as a file claims is taken at once
_MOST_PAGES = 100_000  # and one more for each of these bytes of the file: each is looked at in Python
_BYTES_A_PAGE = 1000
_MR_SPARE = 100  # old versions of parquet-mr forget a header; of any, pyarrow may read so many bytes more of a column
_INDEX_BYTES = 4  # of a value that stands in a dictionary
_ROWS = 64  # of a batch of pictures: few have to be in memory at a time
_BATCH_BYTES = 16 * 1024**2  # from which on a batch gets no more rows


def open_parquet(path: Path | str, **how: Any) -> parquet.ParquetFile:
    """Opens a file; ``how`` is what ``pyarrow.parquet.ParquetFile`` takes.

    Raises:
        InputError: Its numbers of rows are not those of one file, or more than a file of its size may have.
        OSError: There is no such file, its end is damaged, or it is a pipe.
        pa.ArrowException: It is no such file.
    """
    check_regular(path)
    with names_in_utf8():  # pyarrow looks at them all
        file = parquet.ParquetFile(path, thrift_container_size_limit=_MOST_LISTED, **how)
    about = file.metadata
    rows = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != about.num_rows:
        raise InputError(f"{path}: its end says {about.num_rows:,} rows, and {sum(rows):,} in groups; it is damaged")
    if _INDEX_BYTES * about.num_rows > (most := _most(path)):
        raise _too_large(path, most)
    return file


def _most(path: Path | str, times: int = _MOST_TIMES) -> int:
    """The bytes that a file may unpack to."""
    return MAX_IMAGE_BYTES + times * os.stat(path).st_size  # noqa: PTH116


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
    known to what it comes. pyarrow cannot do so inside lists and structures, nor where values begin as those before
    them do; of these few rows are read at a time.

    Raises:
        InputError: They come to more than a hundred times the file's size and ``MAX_IMAGE_BYTES``.
        OSError: There is no such file.
        pa.ArrowException: It is no such file, or damaged.
    """
    most = _most(path)
    about = read_metadata(path)
    largest, chained = _check_pages(path, about, columns, range(about.num_row_groups), most)
    leaves = {about.schema.column(i).path for i in range(len(about.schema.names))} - chained
    flat = [column for column in columns if column in leaves]
    with open_parquet(path, read_dictionary=flat) as file:
        table = file.read(columns=flat)
        found = {column: table.column(table.column_names.index(column)) for column in flat}  # a name may be there twice
        held = sum(_bytes_of(chunk) for column in found.values() for chunk in column.chunks)
        for column in columns:
            if column not in leaves:
                found[column] = _few_at_a_time(file, column, most - held, max(1, most // max(1, largest)))
                held += found[column].nbytes
    if held > most:
        raise _too_large(path, most)
    return pa.table({column: _spelled(found[column]) for column in columns})


def _few_at_a_time(file: parquet.ParquetFile, column: str, most: int, rows: int) -> pa.ChunkedArray:
    """A column, no further than to where it is more than ``most`` bytes, at most so many rows at a time."""
    chunks, held = [], 0
    for batch in file.iter_batches(batch_size=min(rows, _ROWS), columns=[column]):
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
    held = column.type.value_type if _is_text(column.type) else column.type
    if held in (pa.binary(), pa.large_binary()):
        return column.cast(pa.large_binary())
    return column.cast(pa.large_string()) if held in (pa.string(), pa.large_string()) else column


def _bytes_of(chunk: pa.Array) -> int:
    """What it takes when it is spelled out."""
    if not _is_text(chunk.type):
        return int(chunk.nbytes)
    lengths = pc.cast(pc.binary_length(chunk.dictionary), pa.int64())
    return int(pc.sum(lengths.take(chunk.indices)).as_py() or 0)


def _too_large(path: Path | str, most: int) -> InputError:
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
    most = _most(path, most_times)
    with open_parquet(path) as file:
        groups = list(range(file.num_row_groups) if group is None else [group])
        _check_pages(path, file.metadata, columns, groups, most)
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


def _check_pages(
    path: Path, about: parquet.FileMetaData, columns: Sequence[str] | None, groups: Sequence[int], most: int
) -> tuple[int, set[str]]:
    """Refuses columns whose pages unpack to too much, by what the file's end says of them and what they say themselves.

    Returns:
        What the largest page unpacks to, and the columns in which values begin as the one before them does.
    """
    found = [about.row_group(i) for i in groups]
    wanted = None if columns is None else tuple(f"{column}." for column in columns)
    chunks = [
        chunk
        for group in found
        for chunk in map(group.column, range(group.num_columns))
        if wanted is None or f"{chunk.path_in_schema}.".startswith(wanted)
    ]
    if sum(max(chunk.total_uncompressed_size, _INDEX_BYTES * chunk.num_values) for chunk in chunks) > most:
        raise _too_large(path, most)
    spare = _MR_SPARE if "parquet-mr" in about.created_by.lower() else 0
    total, count, largest, chained = 0, 0, 0, set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for chunk in chunks:
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
                start = chunk.dictionary_page_offset
            for page in read_pages(data, start, start + chunk.total_compressed_size + spare, chunk.num_values):
                total, count, largest = total + page.unpacked, count + 1, max(largest, page.unpacked)
                if total > most:
                    raise _too_large(path, most)
                if count > _MOST_PAGES + len(data) // _BYTES_A_PAGE:
                    raise InputError(f"{path}: is cut into too many small pages; save it again with larger ones")
                if page.encoding == DELTA_BYTE_ARRAY:
                    chained.add(chunk.path_in_schema)
    return largest, chained
