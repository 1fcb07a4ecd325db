"""Pairs that a table lists: CSV, TSV, Parquet, JSON lines."""

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

from cloob.data.batch import (
    BadSample,
    RawSample,
    as_utf8,
    clean_caption,
    read_pair_file,
)
from cloob.data.source import (
    IMAGE_EXTENSIONS,
    Fingerprint,
    Source,
    first_equal,
    of_column,
)
from cloob.data.sources.arrow import check_name, is_list, is_parquet
from cloob.data.sources.files import reading
from cloob.errors import InputError, counted

_TEXT_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", ".jsonl", ".ndjson")

FILE_COLUMN = "file_name"
"""The column of pictures in an imagefolder's table; as the caption column of a folder,
file names are captions.
"""
_DELIMITERS = ("\t", ",", ";", "|")
# a row must fit into one block; a caption of a megabyte is only a bad sample
_BLOCK_BYTES = 32 * 1024 * 1024


class TableSource(Source):
    """Rows of a table, as two Arrow columns; ``stray`` are rows with a field that holds
    rows, see ``_stray_quotes``.
    """

    def __init__(self, path: Path, image_column: str, caption_column: str) -> None:
        self.name = str(path)
        self._path = path
        # one may be both
        columns = list(dict.fromkeys((image_column, caption_column)))
        names = column_names(path, columns)
        check_name(path, names, image_column, "image")
        check_name(path, names, caption_column, "caption")
        table, self.stray = read_table(path, columns)
        self._images = _as_bytes(path, table, image_column)
        self._captions = _as_bytes(path, table, caption_column)
        del table
        # parsing takes about as much again as the columns
        pa.default_memory_pool().release_unused()
        self.shard_sizes = (len(self._images),)
        if self.stray:
            rows = counted(len(self.stray), "rows")
            lines = counted(sum(self.stray.values()), "lines")
            self.remark = (
                f"stray quotes in {rows}, first in row {min(self.stray) + 1:,}, take in"
                f" {lines}: close or double each"
            )

    def fingerprint(self) -> Fingerprint:
        return {
            "rows": len(self),
            "image paths": of_column(self._images),
            "captions": of_column(self._captions),
        }

    def pictures(self) -> np.ndarray | None:
        """(N,) int64: per row the first of its path, where that has several captions;
        None where no path has.
        """
        path, caption = _codes(self._images), _codes(self._captions)
        n = len(path)
        # a path once for each of its captions; n + 1 is above every code
        distinct = np.unique(path * (n + 1) + caption) // (n + 1)
        is_several = np.isin(path, distinct[1:][distinct[1:] == distinct[:-1]])
        is_several &= pc.fill_null(pc.not_equal(self._images, b""), False).to_numpy()
        if not is_several.any():
            return None
        return first_equal(np.where(is_several, path, -1 - np.arange(n)))

    def row(self, index: int) -> tuple[str, bytes | None]:
        """Path of the image and caption of row ``index`` (from 0) as the table has
        them; no image is opened.
        """
        path = as_text(self._images[index].as_py()).strip()
        return path, self._captions[index].as_py()

    def picture(self, stored: str, key: str = "", where: str = "") -> bytes:
        """The file of a path in the table."""
        path = self._path.parent / stored
        return read_pair_file(path, key or as_utf8(stored), "image", where)

    def read(self, index: int) -> RawSample:
        """The pair in row ``index`` (from 0); its key is the image path, and a
        ``BadSample`` counts rows from 1.
        """
        where = self._where(index)
        if index in self.stray:
            lines = counted(self.stray[index], "lines")
            detail = f"{where}: a field takes in {lines} that look like rows"
            raise BadSample("stray quote", where, detail)
        key, caption = self.caption(index)
        stored, _ = self.row(index)
        return RawSample(key, self.picture(stored, key, where), caption)

    def caption(self, index: int) -> tuple[str, str]:
        """Key and caption of a row, whose picture is not opened."""
        stored, raw = self.row(index)
        key = as_utf8(stored) or self._where(index)
        return key, clean_caption(raw, key, self._where(index))

    def _where(self, index: int) -> str:
        return f"row {index + 1:,} of {self._path.name}"


def _as_bytes(path: Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of text as bytes; refuses other columns."""
    column = table.column(name)
    if column.type in (pa.binary(), pa.large_binary()):
        return column
    try:
        return column.cast(pa.large_string()).cast(pa.large_binary())
    except pa.ArrowException:
        raise InputError(
            f"{path}: column {name!r} holds {column.type}, not text"
        ) from None


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64 numbers, equal for equal cells; -1 for none."""
    codes = column.dictionary_encode().combine_chunks().indices
    return np.asarray(codes.fill_null(-1).to_numpy(), np.int64)


def as_text(raw: Any) -> str:
    """What a cell holds as text; bytes that are not UTF-8 become surrogates."""
    if isinstance(raw, bytes):
        return raw.decode("utf-8", "surrogateescape")
    return "" if raw is None else str(raw)


def column_names(path: Path, required: Sequence[str]) -> list[str]:
    """A table's columns, of JSON up to the line where all of ``required`` are there;
    they also tell the delimiter.
    """
    with reading(path):
        if path.suffix.lower() in _TEXT_SUFFIXES:
            return _header(path, required)[1]
        if is_parquet(path):
            return list(parquet.read_schema(path).names)
    names: dict[str, None] = {}
    for row in json_rows(path):
        names |= dict.fromkeys(row)
        if names.keys() >= {*required}:
            break
    return list(names)


def read_table(path: Path, columns: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
    """Columns of a table, those of text tables as bytes; and its rows with a stray
    quote, see ``_stray_quotes``.
    """
    with reading(path):
        if path.suffix.lower() in _TEXT_SUFFIXES:
            delimiter, names = _header(path, columns)
            table = _read_text(path, columns, delimiter, names)
            return table, _stray_quotes(table, delimiter)
        if is_parquet(path):
            table = parquet.ParquetFile(path).read(columns=list(columns))
            places = [table.column_names.index(column) for column in columns]
            return _without_lists(table.select(places)), {}
    rows: list[Sequence[bytes | None]] = []
    for row in json_rows(path):
        cells = (row.get(column) for column in columns)
        rows += itertools.product(*map(_stored, cells))
    texts = zip(*rows, strict=True) if rows else [[]] * len(columns)
    arrays = [pa.array(text, pa.large_binary()) for text in texts]
    return pa.table(arrays, list(columns)), {}


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


def _without_lists(table: pa.Table) -> pa.Table:
    """The table with a row for every text of a list, as of the captions of a
    picture.
    """
    for place, name in enumerate(table.column_names):
        column = table.column(name)
        if is_list(column.type):
            cells = [cell or [None] for cell in column.to_pylist()]
            rows = np.repeat(np.arange(len(cells)), list(map(len, cells)))
            texts = pa.array(itertools.chain(*cells), column.type.value_type)
            table = table.take(rows).set_column(place, name, texts)
    return table


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
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


def _stored(cell: Any) -> list[bytes | None]:
    """The texts of a cell, which may be a list, as bytes."""
    texts = cell if isinstance(cell, list) else [cell]
    return [_encoded(text) for text in texts or [None]]


def _encoded(value: Any) -> bytes | None:
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


def _stray_quotes(table: pa.Table, delimiter: str) -> dict[int, int]:
    """The rows with a field of which a line looks like a row, as an unclosed quote
    makes it; and its lines.
    """
    comma = re.escape(delimiter)
    path = rf"[^\s{comma}]+\.(?:{'|'.join(IMAGE_EXTENSIONS)})\"?"
    row = rf"[\r\n](?:(?:.*{comma})?{path}{comma}|.*{comma}{path}(?:[\r\n]|\z))"
    stray = {}
    for column in table.columns:
        found = pc.match_substring_regex(column, row, ignore_case=True)
        for index in pc.indices_nonzero(found.fill_null(False)).to_pylist():
            stray[index] = len(column[index].as_py().splitlines()) - 1
    return stray


def _header(path: Path, columns: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter and the column names: the first that yields all columns, else that
    of most fields.
    """
    with path.open("rb") as file:
        line = file.readline(csv.field_size_limit())
    if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
        wrong = "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8"
        raise InputError(f"{path} {wrong}; the first line must name the columns")
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


def metadata_of(folder: Path) -> Path | None:
    """The table of a Hugging Face imagefolder."""
    for path in (folder / "metadata.csv", folder / "metadata.jsonl"):
        if path.is_file() and FILE_COLUMN in column_names(path, (FILE_COLUMN,)):
            return path
    return None
