"""Pictures that are files of their own: in a folder, or named by a table."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection as Paths
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, clean_caption
from cloob.data.shards.tar import TAR_SUFFIXES
from cloob.data.sources.arrow import ARROW_SUFFIXES
from cloob.data.sources.folder import CAPTION_SUFFIXES, IMAGE_SUFFIXES, captions_by_stem
from cloob.data.sources.table import TABLE_SUFFIXES, column_names, json_rows, read_table
from cloob.errors import InputError, nearest
from cloob.search.records import Value, valid
from cloob.search.scan.collection import Collection, Found, LeftOut, named, newest, stated, values
from cloob.search.where import NUMBERS, TEXTS

CAPTION_COLUMNS = ("title", "caption", "text")
"""Where captions are sought when nobody has named their column."""

_CODE = r"^[+-]?(0\d|\d{19})"
_INDEX = "index.sqlite"
_NEVER = ("@eaDir", "#recycle", "System Volume Information", "node_modules")
"""Folders that file servers, Windows and npm make."""
_KINDS = 3


class Rows:
    """A table whose rows say something of pictures, by their paths; several rows of one path are one picture.

    Attributes:
        state: Of the table's file.
        stored: The path in each row as the table has it.
        by_path: The rows of each picture, by its absolute path.
    """

    def __init__(self, path: Path, image_column: str, caption_column: str | None) -> None:
        self.state = path.stat()
        self._path = path
        self._rows = [row for _, row in json_rows(path)] if path.suffix.lower() in (".jsonl", ".ndjson") else []
        there = column_names(path, (image_column, caption_column or image_column))
        names = list(filter(None, dict.fromkeys([*there, *(name for row in self._rows for name in row)])))
        for option, column in (("--image-column", image_column), ("--caption-column", caption_column)):
            if column is not None and column not in names:
                raise InputError(
                    f"{path} has no column {column!r}; {nearest(column, names)} ({option} of cloob index names one)"
                )
        self._image = image_column
        self._caption = caption_column or next((name for name in CAPTION_COLUMNS if name in names), None)
        self._names, self._hidden = names, 0
        if self._rows:
            images: list[Any] = [valid(_text(row.get(image_column))) for row in self._rows]
        else:
            table, stray = read_table(path, names)
            self._hidden = sum(stray.values())
            columns = dict(zip(names, table.columns, strict=True))
            for name in columns.keys() - {image_column}:
                columns[name] = _as_text(columns[name], repair=path.suffix.lower() != ".parquet")
                columns[name] = columns[name] if name == self._caption else _as_numbers(columns[name])
            self._table = pa.table(columns)
            images = columns[image_column].to_pylist()
        self.stored = [_text(each).strip() for each in images]
        self.by_path: dict[str, list[int]] = {}
        folder = os.path.abspath(path.parent)  # noqa: PTH100
        for row, stored in enumerate(self.stored):
            if stored and "\0" not in stored:
                self.by_path.setdefault(os.path.normpath(os.path.join(folder, stored)), []).append(row)  # noqa: PTH118
        self._composed = {unicodedata.normalize("NFC", each): rows for each, rows in self.by_path.items()}

    def of(self, path: str) -> list[int]:
        """The rows that name a picture, letters with their accents in one character or in two."""
        return self.by_path.get(path) or self._composed.get(unicodedata.normalize("NFC", path), [])

    def describe(self, rows: list[int]) -> tuple[str | None, dict[str, Value]]:
        """The captions of some rows, a line each, and the other columns of the first."""
        contents = [self._row(row) for row in rows]
        captions = (valid(_text(content.get(self._caption or ""))).strip() for content in contents)
        first = contents[0] if contents else {}
        others = {name: raw for name, raw in first.items() if name not in (self._image, self._caption)}
        return "\n".join(filter(None, dict.fromkeys(captions))) or None, values(others)

    def tell(self, left_out: LeftOut) -> None:
        """Counts what of the table an index does not hold as it stands there."""
        if self._hidden:
            left_out.add("row hidden by a stray quote", str(self._path), self._hidden)
        known = {self._image, self._caption, "date"}
        for column in (name for name in self._names if name in (*TEXTS, *NUMBERS) and name not in known):
            left_out.add("from filters, a column of a name that all pictures have", column)

    def _row(self, row: int) -> dict[str, Any]:
        return self._rows[row] if self._rows else {name: plain(self._table.column(name)[row]) for name in self._names}


class Table(Collection):
    """The pictures that a table names."""

    def __init__(self, path: Path, image_column: str, caption_column: str | None, exclude: tuple[str, ...]) -> None:
        super().__init__(os.path.abspath(path), exclude)  # noqa: PTH100 - links in it stay
        self._rows = Rows(path, image_column, caption_column)

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures in order of their first rows; one that is not there is found with no bytes."""
        self.left_out = LeftOut()
        self._rows.tell(self.left_out)
        for row, stored in enumerate(self._rows.stored):
            if not stored or "\0" in stored:
                self.left_out.add("row without a path", f"row {row + 1:,}")
            elif self.excluded(stored):
                self.left_out.add("excluded", stored)
        for path, rows in self._rows.by_path.items():
            if not self.excluded(self._rows.stored[rows[0]]):
                yield named(path, self._rows.state, rows)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The captions of its rows, and the other columns of the first."""
        return self._rows.describe(found.place)


class Folder(Collection):
    """All pictures below a folder, by the endings of their names.

    Hidden files and folders, folders of ``_NEVER``, and folders that are an index themselves are passed over. A link
    is followed where it leads to a picture below the folder. ``table`` says something of the pictures, or is None.
    """

    def __init__(self, folder: Path, exclude: tuple[str, ...] = (), table: Rows | None = None) -> None:
        super().__init__(os.path.abspath(folder), exclude)  # noqa: PTH100 - links in it stay
        self._table = table

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures, folder by folder in order of their names."""
        self.left_out, self.unlisted = LeftOut(), []
        others: Counter[str] = Counter()
        seen: set[int] = set()
        for folder, folders, names in os.walk(self.name, onerror=self._cannot_list):
            if _INDEX in names:
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if self._enters(folder, name))
            captions = captions_by_stem(names)
            for name in sorted(names):
                path, lower = os.path.join(folder, name), name.lower()  # noqa: PTH118
                if name.startswith(".") or lower.endswith(CAPTION_SUFFIXES):
                    continue
                if self._left_out(path):
                    self.left_out.add("excluded", path)
                elif lower.endswith(IMAGE_SUFFIXES):
                    caption = captions.get(name.rpartition(".")[0])
                    found = self._found(path, caption and os.path.join(folder, caption))  # noqa: PTH118
                    if found is not None:
                        seen.update(self._table.of(path) if self._table else ())
                        yield found
                elif lower.endswith((*TAR_SUFFIXES, *ARROW_SUFFIXES)):
                    self.left_out.add("tar or Arrow file beside pictures", path)
                else:
                    others[os.path.splitext(lower)[1] or name] += 1  # noqa: PTH122
        if others:
            kinds = [f"{count:,} {kind}" for kind, count in others.most_common(_KINDS)]
            rest = sum(count for _, count in others.most_common()[_KINDS:])
            kinds += [f"{rest:,} others"] * (rest > 0)
            self.left_out.add("file of another kind", ", ".join(kinds), others.total())
        for path, rows in self._table.by_path.items() if self._table else ():
            if seen.isdisjoint(rows) and not self._left_out(path):
                self.left_out.add("row of the folder's table that names no picture of it", path)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption beside it or in the table, and the table's other columns."""
        caption, columns = self._table.describe(self._table.of(found.path)) if self._table else (None, {})
        return (found.place and read_caption(found.place)) or caption, columns

    def _left_out(self, path: str) -> bool:
        return bool(self._exclude) and self.excluded(os.path.relpath(path, self.name))

    def _cannot_list(self, error: OSError) -> None:
        self.unlisted.append(error.filename)
        self.left_out.add("folder cannot be listed", f"{error.filename} ({error.strerror})")

    def _enters(self, folder: str, name: str) -> bool:
        """Whether a folder is looked through."""
        path = os.path.join(folder, name)  # noqa: PTH118
        if name.startswith(".") or name in _NEVER:
            return False
        if self._left_out(path):
            self.left_out.add("excluded", path)
            return False
        if os.path.islink(path):  # noqa: PTH114
            self.left_out.add("linked folder, not followed", path)
            return False
        return True

    def _found(self, path: str, caption: str | None) -> Found | None:
        """A picture, whose time is also that of what describes it; None where it is no file of the folder."""
        try:
            state: os.stat_result | None = os.lstat(path)
            if state and stat.S_ISLNK(state.st_mode):
                root = os.path.realpath(self.name)
                if os.path.commonpath([root, os.path.realpath(path)]) != root:
                    self.left_out.add("link that leads out of the folder, not followed", path)
                    return None
            if not (state and stat.S_ISREG(state.st_mode)):
                state = stated(path)
            if state is None:
                self.left_out.add("pipe or device", path)
                return None
            time = newest(state, stated(caption) if caption else None, self._table.state if self._table else None)
            return Found(path, state.st_size, time, caption)
        except OSError:  # reading it says why
            return Found(path, None, None, caption)


def read_caption(path: str) -> str | None:
    """The caption in a file; None where it holds none that can be used."""
    try:
        if stated(path) is None:
            return None
        with open(path, "rb") as file:  # noqa: PTH123
            return clean_caption(file.read(MAX_CAPTION_BYTES + 1), path)
    except (OSError, BadSample):
        return None


def find_table(folder: Path, caption_column: str | None) -> Rows | None:
    """The ``metadata.csv`` or ``.jsonl`` of an imagefolder, if there is one with a column ``file_name``."""
    for path in (folder / f"metadata{suffix}" for suffix in TABLE_SUFFIXES):
        if path.is_file() and "file_name" in column_names(path, ("file_name",)):
            return Rows(path, "file_name", caption_column)
    return None


def plain(scalar: pa.Scalar) -> Any:
    """What Arrow holds, for Python; None where Python has no such value (a year above 9999, text that is not UTF-8)."""
    try:
        return scalar.as_py()
    except (ArithmeticError, ValueError, LookupError, pa.ArrowException):
        return None


def _text(raw: Any) -> str:
    if isinstance(raw, list):
        return "\n".join(filter(None, dict.fromkeys(_text(each).strip() for each in raw if not isinstance(each, list))))
    return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else "" if raw is None else str(raw)


def _as_text(column: pa.ChunkedArray, *, repair: bool) -> pa.ChunkedArray:
    """Bytes as text, where all are UTF-8; with ``repair`` whatever they are."""
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return column
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException:
        texts = (None if raw is None else raw.decode("utf-8", "replace") for raw in column.to_pylist())
        return pa.chunked_array([pa.array(texts, pa.large_string())]) if repair else column


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
