"""Tables whose rows say something of pictures, with all their columns."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cloob.data.sources.table import TABLE_SUFFIXES, column_names, json_rows, read_table
from cloob.errors import InputError, nearest
from cloob.search.records import Value, valid
from cloob.search.scan.collection import LeftOut, value
from cloob.search.where import NUMBERS, TEXTS

CAPTION_COLUMNS = ("title", "caption", "text")
"""Where captions are sought when nobody has named their column."""

_CODE = r"^[+-]?(0\d|\d{19})"


class Rows:
    """A table in memory; a row is made into values when it is asked for.

    Args:
        path: CSV, TSV, Parquet or JSON lines.
        image_column: Column with the paths of pictures.
        caption_column: Column with captions; None: the first of ``CAPTION_COLUMNS`` that is there.

    Raises:
        InputError: Not a table, or a column that was named is missing.

    Of several columns of one name the first counts.

    Attributes:
        lost: Rows that a stray quote hides.
        not_utf8: Fields of text that is not UTF-8; what is not stands as U+FFFD.
        shadowed: Columns that no filter sees, as all pictures have one of that name.
    """

    def __init__(self, path: Path, image_column: str, caption_column: str | None) -> None:
        self._rows = [row for _, row in json_rows(path)] if path.suffix.lower() in (".jsonl", ".ndjson") else None
        there = column_names(path, (image_column, caption_column or image_column))
        names = list(filter(None, dict.fromkeys([*there, *(name for row in self._rows or () for name in row)])))
        for option, column in (("--image-column", image_column), ("--caption-column", caption_column)):
            if column is not None and column not in names:
                raise InputError(
                    f"{path} has no column {column!r}; {nearest(column, names)} ({option} of cloob index names one)"
                )
        self._image = image_column
        self._caption = caption_column or next((name for name in CAPTION_COLUMNS if name in names), None)
        known = {image_column, self._caption, "date"}
        self.shadowed = [name for name in names if name in (*TEXTS, *NUMBERS) and name not in known]
        self.lost = self.not_utf8 = 0
        if self._rows is not None:
            self._length = len(self._rows)
        else:
            table, self.lost = read_table(path, names)
            columns = {name: table.column(table.column_names.index(name)) for name in names}
            for name in columns.keys() - {image_column}:
                if _is_bytes(columns[name]):
                    columns[name] = self._as_text(columns[name], spoilt=path.suffix.lower() != ".parquet")
                    columns[name] = columns[name] if name == self._caption else _as_numbers(columns[name])
            self._table = pa.table(columns)
            self._length = len(self._table)

    def __len__(self) -> int:
        return self._length

    def images(self) -> list[str]:
        """The column with the paths."""
        if self._rows is not None:
            return [valid(_text(row.get(self._image))).strip() for row in self._rows]
        return [_text(each).strip() for each in self._table.column(self._image).to_pylist()]

    def row(self, index: int) -> tuple[str | None, dict[str, Value]]:
        """Caption and other columns of a row."""
        if self._rows is not None:
            row = self._rows[index]
        else:
            row = {name: plain(self._table.column(name)[index]) for name in self._table.column_names}
        caption = valid(_text(row.get(self._caption))).strip() if self._caption is not None else ""
        others = {valid(str(name)): value(raw) for name, raw in row.items() if name not in (self._image, self._caption)}
        return caption or None, {name: held for name, held in others.items() if held is not None}

    def tell(self, left_out: LeftOut, name: str) -> None:
        """Counts what of the table is not as it stands there; ``name`` is what the table is called."""
        if self.lost:
            left_out.add("row hidden by a stray quote", name, self.lost)
        if self.not_utf8:
            left_out.add("letters that are not UTF-8", name, self.not_utf8)
        for column in self.shadowed:
            left_out.add("from filters, a column of a name that all pictures have", column)

    def _as_text(self, column: pa.ChunkedArray, *, spoilt: bool) -> pa.ChunkedArray:
        """Bytes as text; as they are where some are no UTF-8, or with ``spoilt`` what can be read of them."""
        try:
            return column.cast(pa.large_string())
        except pa.ArrowException:
            if not spoilt:
                return column
        texts: list[str | None] = []
        for raw in column.to_pylist():
            texts.append(None if raw is None else raw.decode("utf-8", "replace"))
            self.not_utf8 += raw is not None and raw != str(texts[-1]).encode()
        return pa.chunked_array([pa.array(texts, pa.large_string())])


class Described:
    """What the table of an imagefolder says of the pictures beside it.

    Attributes:
        state: Of the table's file.
    """

    def __init__(self, path: Path, caption_column: str | None) -> None:
        self.state = path.stat()
        self._path = path
        self._rows = Rows(path, "file_name", caption_column)
        folder = os.path.abspath(path.parent)  # noqa: PTH100
        paths = self._rows.images()
        self._places = {os.path.normpath(os.path.join(folder, name)): i for i, name in enumerate(paths)}  # noqa: PTH118
        self._composed = {unicodedata.normalize("NFC", path): i for path, i in self._places.items()}

    def tell(self, left_out: LeftOut) -> None:
        """As :meth:`Rows.tell`."""
        self._rows.tell(left_out, str(self._path))

    def of(self, path: str) -> tuple[str | None, Mapping[str, Value]]:
        """Caption and columns of a picture; nothing where the table does not name it."""
        row = self.row(path)
        return (None, {}) if row is None else self._rows.row(row)

    def row(self, path: str) -> int | None:
        """The row that names a picture, letters with their accents in one character or in two; None: none does."""
        return self._places.get(path, self._composed.get(unicodedata.normalize("NFC", path)))

    def others(self, rows: Container[int | None]) -> list[str]:
        """The paths that other rows than these name."""
        return [path for path, row in self._places.items() if row not in rows]


def find_described(folder: Path, caption_column: str | None) -> Described | None:
    """The ``metadata.csv`` or ``.jsonl`` of an imagefolder, if there is one with a column ``file_name``."""
    for path in (folder / f"metadata{suffix}" for suffix in TABLE_SUFFIXES):
        if path.is_file() and "file_name" in column_names(path, ("file_name", "file_name")):
            return Described(path, caption_column)
    return None


def plain(scalar: pa.Scalar) -> Any:
    """What Arrow holds, for Python: Arrow's text of it where Python has no such value, None where neither has one.

    Text that is not UTF-8 has U+FFFD in place of what is not.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "replace") if isinstance(scalar, pa.BinaryScalar) else None
    except (ArithmeticError, ValueError, LookupError, pa.ArrowException):  # year 29349, time zone Mars/Base
        try:
            return scalar.cast(pa.string()).as_py()
        except pa.ArrowException:
            return None


def _text(raw: Any) -> str:
    if isinstance(raw, list):
        return "\n".join(filter(None, dict.fromkeys(_text(each).strip() for each in raw if not isinstance(each, list))))
    return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else "" if raw is None else str(raw)


def _is_bytes(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type))


def _as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as whole numbers or numbers where all are, and none is a code: ``007``, or more digits than numbers keep."""
    if not pa.types.is_large_string(column.type) or pc.any(pc.match_substring_regex(column, _CODE)).as_py():
        return column
    filled = pc.if_else(pc.equal(column, ""), None, column)
    for kind in (pa.int64(), pa.float64()):
        try:
            return filled.cast(kind)
        except pa.ArrowException:
            continue
    return column
