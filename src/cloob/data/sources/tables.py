"""Tables of any format: their columns, and their cells as a table of Arrow."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from cloob.data.source import IMAGE_EXTENSIONS
from cloob.data.sources.files import reading
from cloob.errors import InputError, first_of

_TEXT_SUFFIXES = (".csv", ".tsv")
ARROW_SUFFIX = ".arrow"
TABLE_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", ".jsonl")
_MAGIC = b"ARROW1"  # a file of Arrow begins so; a stream has none
_DELIMITERS = ("\t", ",", ";", "|")
# a row must fit into one block; a caption of a megabyte is only a bad sample
_BLOCK_BYTES = 32 * 1024 * 1024


def as_text(raw: object) -> str:
    """What a cell holds as text; bytes that are not UTF-8 become surrogates."""
    if isinstance(raw, bytes):
        return raw.decode("utf-8", "surrogateescape")
    return "" if raw is None else str(raw)


def is_parquet(path: Path) -> bool:
    """Whether a file is called so."""
    return path.suffix.lower() == ".parquet"


def _is_arrow(path: Path) -> bool:
    return path.suffix.lower() == ARROW_SUFFIX


def schema_of(path: Path, required: Sequence[str]) -> pa.Schema:
    """A table's columns; those of text tables and JSON are texts. Of JSON up to the
    line where all of ``required`` are there; they also tell the delimiter.
    """
    with reading(path):
        if is_parquet(path):
            schema = parquet.read_schema(path)
        elif _is_arrow(path):
            with pa.memory_map(str(path)) as source:
                schema = _arrow_reader(source).schema
        else:
            names = map(_replaced, _text_columns(path, required))
            schema = pa.schema([(name, pa.string()) for name in names])
        _ = schema.names  # UnicodeDecodeError
        return schema


def _replaced(name: str) -> str:
    """A name as UTF-8, which Arrow wants; what is none becomes U+FFFD."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _text_columns(path: Path, required: Sequence[str]) -> list[str]:
    if path.suffix.lower() in _TEXT_SUFFIXES:
        return _header(path, required)[1]
    names: dict[str, None] = {}
    for row in json_rows(path):
        names |= dict.fromkeys(row)
        if names.keys() >= {*required}:
            break
    return list(names)


def check_name(path: Path, names: Sequence[str], column: str, kind: str) -> None:
    """Refuses a column that a table does not have, or has twice."""
    count = names.count(column)
    if count > 1:
        raise InputError(f"{path} has {count} columns {column!r}; rename all but one")
    if not count:
        columns = first_of([name[:60] for name in names])
        raise InputError(
            f"{path} has no column {column!r}; its columns: {columns} (--{kind}-column"
            " names one)"
        )


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a table, those of text tables as bytes; of Arrow all."""
    if path.suffix.lower() in _TEXT_SUFFIXES:
        with reading(path):
            delimiter, names = _header(path, columns)
            table = _read_text(path, columns, delimiter, names)
        _check_quotes(table, delimiter, path)
        # parsing takes about as much again as the columns
        pa.default_memory_pool().release_unused()
        return table
    if is_parquet(path):
        with reading(path):
            return parquet.read_table(path, columns=[*columns]).select(columns)
    if _is_arrow(path):
        with reading(path):
            return map_arrow(path)
    rows = list(json_rows(path))
    return pa.table({c: _of_json([row.get(c) for row in rows]) for c in columns})


def map_arrow(path: Path) -> pa.Table:
    """A file or a stream of Arrow, mapped; what is compressed takes its size in
    memory.
    """
    with pa.memory_map(str(path)) as source:
        return _arrow_reader(source).read_all()


def _arrow_reader(
    source: pa.MemoryMappedFile,
) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    is_file = source.read(len(_MAGIC)) == _MAGIC
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _of_json(values: Sequence[object]) -> pa.Array:
    """Values as bytes; lists of them where one of them is a list."""
    if not any(isinstance(value, list) for value in values):
        return pa.array(map(_encoded, values), pa.large_binary())
    lists = [value if isinstance(value, list) else [value] for value in values]
    cells = [list(map(_encoded, each)) for each in lists]
    return pa.array(cells, pa.list_(pa.large_binary()))


def _read_text(
    path: Path, columns: Sequence[str], delimiter: str, names: Sequence[str]
) -> pa.Table:
    return arrow_csv.read_csv(
        path,
        arrow_csv.ReadOptions(column_names=names, skip_rows=1, block_size=_BLOCK_BYTES),
        arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        arrow_csv.ConvertOptions(
            include_columns=columns,
            column_types=dict.fromkeys(columns, pa.binary()),
            check_utf8=False,
        ),
    )


def json_rows(path: Path) -> Iterator[dict[str, object]]:
    """The lines of a table of JSON that are not empty; bytes that are not UTF-8 are
    escaped.
    """
    with (
        reading(path),
        path.open(encoding="utf-8-sig", errors="surrogateescape") as file,
    ):
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    row.keys()
                except (ValueError, RecursionError, AttributeError) as error:
                    raise InputError(
                        f"{path}: line {number:,} is not JSON or no object: {error}"
                    ) from None
                yield row


def _encoded(value: object) -> bytes | None:
    """A value's bytes in the file; half a surrogate pair, which only an escape can say,
    becomes bytes of no UTF-8.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _check_quotes(table: pa.Table, delimiter: str, path: Path) -> None:
    """Refuses a table with a field of which a line looks like a row, as an unclosed
    quote makes it.
    """
    comma = re.escape(delimiter)
    file = rf"[^\s{comma}]+\.(?:{'|'.join(IMAGE_EXTENSIONS)})\"?"
    line = rf"[\r\n](?:(?:.*{comma})?{file}{comma}|.*{comma}{file}(?:[\r\n]|\z))"
    for column in table.columns:
        holds_a_row = pc.match_substring_regex(column, line, ignore_case=True)
        row = pc.index(holds_a_row, True).as_py()  # the first; -1: none
        if row >= 0:
            raise InputError(
                f"{path}: a quote in row {row + 1:,} is not closed and takes in the"
                " rows after it; close it, or double it"
            )


def _header(path: Path, columns: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter and the column names: the first that yields all columns, else that
    of most fields.
    """
    with path.open("rb") as file:
        line = file.readline(csv.field_size_limit())
    if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
        fault = "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8"
        raise InputError(f"{path} {fault}; the first line must name the columns")
    header = re.split(r"[\r\n]", line.decode("utf-8-sig", "replace"), maxsplit=1)[0]
    if not header.strip():
        raise InputError(f"{path} is empty; the first line must name the columns")
    splits = {}
    for delimiter in _DELIMITERS:
        names = next(csv.reader([header], delimiter=delimiter))
        splits[delimiter] = [name.strip() for name in names]

    def fitness(delimiter: str) -> tuple[bool, int]:
        names = splits[delimiter]
        return {*columns} <= {*names}, len(names)

    best = max(_DELIMITERS, key=fitness)
    return best, splits[best]
