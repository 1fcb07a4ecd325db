"""Pairs listed in a table: one column of image paths, one of captions (CSV, TSV, Parquet, JSON lines)."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from cloob.data.batch import BadSample, RawSample, clean_caption, printable, read_image_file
from cloob.data.fingerprint import Fingerprint, of_column
from cloob.data.source import IMAGE_EXTENSIONS
from cloob.data.sources.files import reading
from cloob.errors import InputError, counted, first_of

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")

_DELIMITERS = ("\t", ",", ";", "|")
_BLOCK_BYTES = 32 * 1024 * 1024  # a row must fit into one block; a caption of a megabyte is only a bad sample


class TableSource:
    """Rows of a table, as two Arrow columns; ``stray`` are rows with a field that holds rows, see ``_stray_quotes``."""

    streamed = False

    def __init__(self, path: Path, image_column: str, caption_column: str) -> None:
        self.name = str(path)
        self._path = path
        columns = tuple(dict.fromkeys((image_column, caption_column)))  # one may be both
        there = column_names(path, columns)
        check_name(path, there, image_column, "image")
        check_name(path, there, caption_column, "caption")
        table, self.stray = read_table(path, columns)
        self._images, self._captions = (_as_bytes(table, name, path) for name in (image_column, caption_column))
        del table
        pa.default_memory_pool().release_unused()  # parsing takes about as much again as the columns
        self.shard_sizes = (len(self),)
        rows, lines = counted(len(self.stray), "rows"), counted(sum(self.stray.values()), "lines")
        first = f"stray quotes in {rows}, first in row {min(self.stray, default=0) + 1:,}"
        self.remark = f"{first}, take in {lines}: close or double each" if self.stray else ""

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> Fingerprint:
        return {"rows": len(self), "image paths": of_column(self._images), "captions": of_column(self._captions)}

    def pictures(self) -> np.ndarray | None:
        """(N,) int64, equal for rows of one path; None where no path comes twice."""
        codes = [chunk.indices.fill_null(-1).to_numpy() for chunk in self._images.dictionary_encode().chunks]
        same = np.concatenate([np.zeros(0, np.int64), *codes])
        nowhere = (same < 0) | pc.equal(self._images, b"").fill_null(False).to_numpy()
        same = np.where(nowhere, -1 - np.arange(len(same)), same)
        return same if len(np.unique(same)) < len(same) else None

    def row(self, index: int) -> tuple[str, bytes | None]:
        """Path of the image and caption of row ``index`` (from 0) as the table has them; no image is opened."""
        return as_text(self._images[index].as_py()).strip(), self._captions[index].as_py()

    def picture(self, stored: str, key: str = "", where: str = "") -> bytes:
        return read_image_file(self._path.parent / stored, key or printable(stored), where)

    def read(self, index: int) -> RawSample:
        """The pair in row ``index`` (from 0); its key is the image path, and a ``BadSample`` counts rows from 1."""
        where = f"row {index + 1:,} of {self._path.name}"
        if index in self.stray:
            lines = counted(self.stray[index], "lines")
            raise BadSample("stray quote", where, f"{where}: a field takes in {lines} that look like rows")
        stored, raw = self.row(index)
        key = printable(stored) or where
        caption = clean_caption(raw, key, where)
        return RawSample(key, self.picture(stored, key, where), caption)


def as_text(raw: Any) -> str:
    """What a cell holds as text; bytes that are not UTF-8 become surrogates."""
    return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else "" if raw is None else str(raw)


def _as_bytes(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    column = table.column(name)
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column
    try:
        return column.cast(pa.large_string()).cast(pa.large_binary())
    except pa.ArrowException:
        raise InputError(f"{path}: column {name!r} holds {column.type}, not text") from None


def check_name(path: Path, there: Sequence[str], column: str, kind: str) -> None:
    if (count := there.count(column)) != 1:
        what = f"{count} columns" if count else "no column"
        names = f"its columns: {first_of([name[:60] for name in there])} (--{kind}-column names one)"
        raise InputError(f"{path} has {what} {column!r}; {'rename all but one' if count else names}")


def column_names(path: Path, wanted: Sequence[str]) -> list[str]:
    """A table's columns, of JSON up to the line where all of ``wanted`` are there; they also tell the delimiter."""
    with reading(path):
        match path.suffix.lower():
            case ".csv" | ".tsv":
                return _header(path, wanted)[1]
            case ".parquet":
                return list(parquet.read_schema(path).names)
    names: dict[str, None] = {}
    for row in json_rows(path):
        names |= dict.fromkeys(row)
        if names.keys() >= {*wanted}:
            break
    return list(names)


def read_table(path: Path, columns: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
    """Columns of a table, those of text tables as bytes; and its rows with a stray quote, see ``_stray_quotes``.

    Of several columns of one name the first is read. A list in a line of JSON stands for as many rows.
    """
    with reading(path):
        match path.suffix.lower():
            case ".csv" | ".tsv":
                return _read_text(path, columns)
            case ".parquet":
                table = parquet.ParquetFile(path).read(columns=list(columns))
                return table.select([table.column_names.index(column) for column in columns]), {}
    rows: list[Sequence[bytes | None]] = []
    for row in json_rows(path):
        cells = (row.get(column) for column in columns)
        lists = (cell if isinstance(cell, list) and cell else [cell] for cell in cells)
        rows += itertools.product(*([_stored(value) for value in each] for each in lists))
    texts = zip(*rows, strict=True) if rows else [[]] * len(columns)
    return pa.table([pa.array(text, pa.large_binary()) for text in texts], list(columns)), {}


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a table of JSON that are not empty; bytes that are not UTF-8 are escaped."""
    with reading(path), path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    row.keys()
                except (ValueError, RecursionError, AttributeError) as error:
                    raise InputError(f"{path}: line {number:,} is not JSON or no object: {error}") from None
                yield row


def _stored(value: Any) -> bytes | None:
    """A value's bytes in the file; half a surrogate pair, which only an escape can say, becomes bytes of no UTF-8."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _read_text(path: Path, columns: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
    delimiter, names = _header(path, columns)
    table = arrow_csv.read_csv(
        path,
        read_options=arrow_csv.ReadOptions(column_names=names, skip_rows=1, block_size=_BLOCK_BYTES),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.binary()), check_utf8=False
        ),
    )
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


def _header(path: Path, columns: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter and the column names: the first that yields all columns, else that of most fields."""
    with path.open("rb") as file:
        line = file.readline(csv.field_size_limit())
    header = re.split(r"[\r\n]", line.decode("utf-8-sig", "replace"), maxsplit=1)[0]
    if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")) or not header.strip():
        wrong = "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8" if line.strip() else "is empty"
        raise InputError(f"{path} {wrong}; the first line must name the columns")
    written = {delimiter: next(csv.reader([header], delimiter=delimiter)) for delimiter in _DELIMITERS}
    splits = [(delimiter, [name.strip() for name in names]) for delimiter, names in written.items()]
    return max(splits, key=lambda split: ({*columns} <= {*split[1]}, len(split[1])))
