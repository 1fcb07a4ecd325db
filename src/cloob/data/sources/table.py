"""Pairs listed in a table: one column of image paths, one of captions (CSV, TSV, Parquet, JSON lines)."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from cloob.data.batch import BadSample, RawSample, clean_caption, printable
from cloob.data.decode import read_image_file
from cloob.data.fingerprint import Fingerprint, of_column
from cloob.data.source import IMAGE_EXTENSIONS
from cloob.data.sources.columns import read_columns, read_schema
from cloob.errors import InputError, counted, first_of

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")

_DELIMITERS = ("\t", ",", ";", "|")
_BLOCK_BYTES = 32 * 1024 * 1024  # a row must fit into one block; a caption of a megabyte is only a bad sample
_MAX_HEADER_BYTES = 1024 * 1024


class TableSource:
    """A random-access source over the rows of a table.

    The two columns stay arrow arrays: a row costs its bytes and no Python object. Relative image paths are relative to
    the table's folder. The delimiter of a text table is read off its header line, whatever the file's ending is.

    Attributes:
        stray: Rows of a text table with a field that holds rows, see ``_stray_quotes``.

    Args:
        path: The table; its ending says CSV/TSV, Parquet or JSON lines.
        image_column: Column with the path of the image.
        caption_column: Column with the caption.

    Raises:
        InputError: As of ``check_columns``, or the columns hold no text.
    """

    streamed = False

    def __init__(self, path: Path, image_column: str = "filepath", caption_column: str = "title") -> None:
        self.name = str(path)
        self._path = path
        check_columns(path, image_column, caption_column)
        columns = tuple(dict.fromkeys((image_column, caption_column)))  # one may be both
        with _one_line(path):
            table, self.stray = _read(path, columns)
        self._images = _as_bytes(table, image_column, path)
        self._captions = _as_bytes(table, caption_column, path)
        del table
        pa.default_memory_pool().release_unused()  # parsing takes about as much again as the columns
        self.shard_sizes = (len(self),)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def pairs(self) -> int:
        """Rows with a path and a caption, and no stray quote; whether they can be used is seen when they are read."""
        filled = [pc.greater(pc.fill_null(pc.binary_length(column), 0), 0) for column in (self._images, self._captions)]
        spoilt = sum(bool(filled[0][row].as_py() and filled[1][row].as_py()) for row in self.stray)
        return int(pc.sum(pc.and_(*filled)).as_py() or 0) - spoilt

    def fingerprint(self) -> Fingerprint:
        """Both columns by their content; the pictures behind the paths are not looked at."""
        return {
            "rows": len(self),
            "image paths": of_column(self._images),
            "captions": of_column(self._captions),
        }

    def row(self, index: int) -> tuple[bytes | None, bytes | None]:
        """Path of the image and caption of row ``index`` (from 0) as the table has them; no image is opened."""
        return self._images[index].as_py(), self._captions[index].as_py()

    def read(self, index: int) -> RawSample:
        """The pair in row ``index`` (from 0); its key is the image path as the table has it, as text.

        Raises:
            BadSample: It cannot be used; the detail counts rows from 1, without the header.
        """
        where = f"row {index + 1:,} of {self._path.name}"
        if index in self.stray:
            lines = counted(self.stray[index], "lines")
            raise BadSample("stray quote", where, f"{where}: a field takes in {lines} that look like rows")
        stored = (self._images[index].as_py() or b"").decode("utf-8", "surrogateescape").strip()
        key = printable(stored) or where
        caption = clean_caption(self._captions[index].as_py(), key, where)
        if not stored:
            raise BadSample("missing image", key, f"{where}: no path")
        return RawSample(key, read_image_file(self._path.parent / stored, key, where), caption)


def _as_bytes(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    """A column of text as bytes, which may be anything: whether they are UTF-8 is each row's own matter."""
    column = table.column(name)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        try:
            column = column.cast(pa.large_string()).cast(pa.large_binary())
        except pa.ArrowException:
            raise InputError(f"{path}: column {name!r} holds {column.type}, not text") from None
    return column


def check_columns(path: Path, image_column: str, caption_column: str) -> None:
    """Looks for a table's two columns, in its header alone.

    Raises:
        InputError: No such file, not a table, or a column is missing (those that are there are listed) or there twice.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a table' if path.is_dir() else 'no such file'}")
    wanted = (image_column, caption_column)
    columns = column_names(path, wanted)
    for column, option in zip(wanted, ("--image-column", "--caption-column"), strict=True):
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            names = f"its columns: {first_of(columns)} ({hint}{option} names one)"
            raise InputError(f"{path} has no column {column!r}; {names if columns else 'it has no columns at all'}")
        if columns.count(column) > 1:
            raise InputError(f"{path} has several columns {column!r}; rename all but one")


def column_names(path: Path, wanted: tuple[str, str]) -> list[str]:
    """A table's columns, from its header, or its lines until all of ``wanted`` are there; InputError if it is none.

    ``wanted`` also tells which delimiter is meant.
    """
    with _one_line(path):
        match path.suffix.lower():
            case ".csv" | ".tsv":
                return [name.strip() for name in _sniff(path, wanted)[1]]
            case ".parquet":
                return list(read_schema(path).names)
            case _:
                return _json_names(path, wanted)


def read_table(path: Path, columns: Sequence[str]) -> tuple[pa.Table, int]:
    """Columns of a table, those of text tables as bytes; and how many rows stray quotes hide.

    Raises:
        InputError: Not a table.
    """
    with _one_line(path):
        table, stray = _read(path, columns)
    return table, sum(stray.values())


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What the readers complain of, as one line that names the table."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{path} cannot be read as a {path.suffix[1:].lower()} table: {said}") from None


def _read(path: Path, columns: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
    """The columns, and the rows of a text table with fields that hold rows."""
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _read_text(path, columns)
        case ".parquet":
            return read_columns(path, columns), {}
    return _read_json_lines(path, columns), {}


def _read_json_lines(path: Path, columns: Sequence[str]) -> pa.Table:
    """The columns as bytes, line by line; numbers as they stand in JSON."""
    texts: dict[str, list[bytes | None]] = {column: [] for column in columns}
    for number, row in json_rows(path):
        for column, held in texts.items():
            value = row.get(column)
            if isinstance(value, list | dict):
                raise InputError(f"{path}: line {number:,}: {column!r} is {json.dumps(value)[:60]}, not text")
            text = value if value is None or isinstance(value, str) else json.dumps(value)
            held.append(None if text is None else _as_read(text))
    return pa.table({column: pa.array(held, pa.large_binary()) for column, held in texts.items()})


def _as_read(text: str) -> bytes:
    """The bytes that stand in the file; those of half a surrogate pair, which only an escape can say, are no UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _read_text(path: Path, columns: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
    """The columns, and the rows with fields that hold rows."""
    delimiter, written = _sniff(path, columns)
    names = [name.strip() for name in written]
    try:
        as_written = [written[names.index(column)] for column in columns]
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=as_written, column_types=dict.fromkeys(as_written, pa.binary()), check_utf8=False
            ),
        )
    except pa.ArrowInvalid as error:
        _, one, row = str(error).partition("got 1: ")
        if one and ";" in row and delimiter != ";":
            raise InputError(f"{path}: rows look separated by ';', the first line by {delimiter!r}; use one") from None
        if '"' in str(error):
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: {said}; a quote that is not closed takes in the rows after it") from None
        raise
    table = table.rename_columns([name.strip() for name in table.column_names])
    return table, _stray_quotes(table, delimiter)


def _stray_quotes(table: pa.Table, delimiter: str) -> dict[int, int]:
    """Rows with a field of which a line looks like a row, with a picture's path in a cell; and how many lines it has.

    One quote too many opens a field that goes on, over any number of rows, to the next quote or the end of the file.
    """
    comma = re.escape(delimiter)
    path = rf"[^\s{comma}]+\.(?:{'|'.join(IMAGE_EXTENSIONS)})\"?"
    row = re.compile(rf"[\r\n](?:(?:.*{comma})?{path}{comma}|.*{comma}{path}(?:[\r\n]|\Z))".encode(), re.IGNORECASE)
    found = {}
    for column in table.columns:
        several = pc.or_(*(pc.match_substring(column, end) for end in ("\n", "\r")))
        for index in pc.indices_nonzero(several.fill_null(False)).to_pylist():
            if row.search(text := column[index].as_py()):
                found[index] = len(text.splitlines()) - 1
    return found


def _sniff(path: Path, columns: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter and the column names as written: the first that yields all columns, else that of most fields."""
    header = _first_line(path, _MAX_HEADER_BYTES).decode("utf-8-sig", "replace")
    if not header.strip():
        raise InputError(f"{path} is empty: the first line must name the columns")
    splits = []
    for delimiter in _DELIMITERS:
        with contextlib.suppress(csv.Error):  # a field above 131,072 characters
            splits.append((delimiter, next(csv.reader(io.StringIO(header), delimiter=delimiter))))
    if not splits:
        raise InputError(f"{path}: no line of column names: its first line is {len(header):,} characters in one field")
    for delimiter, names in splits:
        if {*columns} <= {name.strip() for name in names}:
            return delimiter, names
    return max(splits, key=lambda split: len(split[1]))


def _first_line(path: Path, most: int) -> bytes:
    """The first line, without its end: a line feed, a carriage return, or both.

    Raises:
        InputError: The file is UTF-16.
    """
    with path.open("rb") as file:
        line = file.readline(most)
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        raise InputError(
            f"{path} is UTF-16, not UTF-8: save it as UTF-8, or convert it: "
            f"iconv -f UTF-16 -t UTF-8 {shlex.quote(path.name)} > {shlex.quote(f'utf8-{path.name}')}"
        )
    return re.split(rb"[\r\n]", line, maxsplit=1)[0]


def _json_names(path: Path, wanted: Sequence[str]) -> list[str]:
    """The keys of the first line, and of those behind it until all that are wanted are there."""
    if not _first_line(path, _BLOCK_BYTES).strip():
        raise InputError(f"{path} is empty: each line must be a JSON object")
    names: dict[str, None] = {}
    for _, row in json_rows(path):
        names |= dict.fromkeys(row)
        if names.keys() >= {*wanted}:
            break
    return list(names)


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a table of JSON that are not empty, with their numbers from 1; bytes that are not UTF-8 escaped.

    Raises:
        InputError: A line is no JSON object.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(iter(lambda: file.readline(_BLOCK_BYTES), ""), 1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number:,} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number:,} is not a JSON object but a {type(row).__name__}")
            yield number, row
