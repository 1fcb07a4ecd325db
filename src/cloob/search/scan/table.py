"""Tables whose rows describe pictures."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from cloob.data.sources.tables import (
    as_text,
    check_name,
    column_names,
    json_rows,
    read_table,
)
from cloob.search.scan.collection import (
    Collection,
    Description,
    FoundPicture,
    ScanOptions,
    caption_of,
    state_of,
    time_of,
    values,
)
from cloob.search.where import NUMBERS, TEXTS

# A number that a text table writes as one: no code (``007``), and not too long.
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d{0,18})(\.\d+)?([eE][+-]?\d{1,3})?")


class Table(Collection):
    """A table whose rows describe pictures; several rows of one path are one
    picture.
    """

    def __init__(self, path: Path, image: str, options: ScanOptions) -> None:
        super().__init__(os.path.abspath(path))  # noqa: PTH100
        self.state = path.stat()
        columns = _read(path, (image, options.caption_column or image))
        names = list(columns)
        check_name(path, names, image, "image")
        caption = caption_of(path, names, options.caption_column)
        paths = columns.pop(image)
        self._captions = columns.pop(caption or "", [])
        self._columns = columns
        # paths as the table has them
        self._stored = [_text(item).strip() for item in paths]
        self.by_path = self._rows_by_path()  # of every picture
        self._composed = {
            unicodedata.normalize("NFC", item): rows
            for item, rows in self.by_path.items()
        }

    def _rows_by_path(self) -> dict[str, list[int]]:
        """Rows by the absolute path of their picture."""
        by_path: dict[str, list[int]] = {}
        for row, stored in enumerate(self._stored):
            if stored and "\0" not in stored:
                joined = os.path.join(self.name, "..", stored)  # noqa: PTH118
                by_path.setdefault(os.path.normpath(joined), []).append(row)
        return by_path

    def rows_of(self, path: str) -> list[int]:
        """The rows that name a picture, letters with their accents in one character or
        in two.
        """
        composed = unicodedata.normalize("NFC", path)
        return self.by_path.get(path) or self._composed.get(composed, [])

    def scan(self) -> Iterator[FoundPicture]:
        self._note_left_out()
        for path, rows in self.by_path.items():
            yield self._found(path, rows)

    def _note_left_out(self) -> None:
        """Counts the rows and columns that are left out."""
        for column in {*TEXTS, *NUMBERS}.intersection(self._columns) - {"date"}:
            self.left_out.add(
                "from filters, a column of a name that all pictures have", column
            )
        for row, stored in enumerate(self._stored, 1):
            if not stored or "\0" in stored:
                self.left_out.add("row without a path", f"row {row:,}")

    def _found(self, path: str, rows: list[int]) -> FoundPicture:
        """A picture as it is now; of size 0 and no time where it is missing."""
        try:
            state = state_of(path)
        except OSError:  # reading it reports why
            return FoundPicture(path, None, None, rows)
        if state is None:
            return FoundPicture(path, 0, None, rows)
        return FoundPicture(path, state.st_size, time_of(state, self.state), rows)

    def describe(self, found: FoundPicture) -> Description:
        return self.describe_rows(found.place)

    def describe_rows(self, rows: Sequence[int]) -> Description:
        """All captions of a picture's rows, and the columns of the first."""
        if not rows:
            return Description(None, {})
        captions = [
            _text(self._captions[row]).strip() for row in rows if self._captions
        ]
        caption = "\n".join(filter(None, dict.fromkeys(captions)))
        first = {name: cells[rows[0]] for name, cells in self._columns.items()}
        return Description(caption or None, values(first))


def _read(path: Path, required: Sequence[str]) -> dict[str, list[Any]]:
    """The cells of a table by column."""
    suffix = path.suffix.lower()
    names = column_names(path, required)
    if suffix == ".jsonl":
        objects = list(json_rows(path))
        names = list(dict.fromkeys(chain(names, *objects)))
        return {name: [row.get(name) for row in objects] for name in names}
    names = list(filter(None, dict.fromkeys(names)))
    table = read_table(path, names)
    columns = {name: _cells_of(table[name]) for name in names}
    if suffix != ".parquet":
        texts = {required[0], required[1], *_captions_in(names)}
        for name in set(names) - texts:
            columns[name] = _typed(columns[name])
    return columns


def _captions_in(names: Sequence[str]) -> list[str]:
    caption = caption_of(Path(), names, None)
    return [caption] if caption else []


def _cells_of(column: pa.ChunkedArray) -> list[Any]:
    """What Arrow holds, for Python; None where Python has no such value (a year above
    9999, text that is not UTF-8).
    """
    try:
        return list(column.to_pylist())
    except (ArithmeticError, ValueError, LookupError, pa.ArrowException):
        return [_cell_of(cell) for cell in column]


def _cell_of(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ArithmeticError, ValueError, LookupError, pa.ArrowException):
        return None


def _typed(cells: Sequence[bytes | None]) -> list[Any]:
    """A column of a text table: numbers where all of it are, else text."""
    texts = [as_text(cell) for cell in cells]
    filled = list(filter(None, texts))
    if not filled or not all(map(_NUMBER.fullmatch, filled)):
        return texts
    kind = int if all(text.lstrip("+-").isdecimal() for text in filled) else float
    return [kind(text) if text else None for text in texts]


def _text(raw: Any) -> str:
    if isinstance(raw, list):
        texts = [_text(item).strip() for item in raw if not isinstance(item, list)]
        return "\n".join(filter(None, dict.fromkeys(texts)))
    return as_text(raw)
