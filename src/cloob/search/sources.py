"""What the sources of an index name, without opening the pictures: folders, pictures,
and tables of paths.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from cloob.data.batch import (
    MAX_CAPTION_BYTES,
    BadSample,
    clean_caption,
    read_pair_file,
)
from cloob.data.shards.spec import is_remote
from cloob.data.source import CAPTION_SUFFIX, IMAGE_SUFFIXES
from cloob.data.sources.folder import captions_by_stem, walk
from cloob.data.sources.tables import (
    TABLE_SUFFIXES,
    as_text,
    check_name,
    json_rows,
    read_table,
    schema_of,
)
from cloob.errors import InputError
from cloob.search.database import is_index
from cloob.search.records import INDEX_FILE, Value
from cloob.search.where import NUMBERS, TEXTS

_UNTYPED = (".csv", ".tsv")  # tables that hold text alone
CAPTION_COLUMNS = ("title", "caption", "text")  # of captions, where no column is named
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
# Made by file servers, Windows and npm.
_NEVER = ("@eaDir", "#recycle", "System Volume Information", "node_modules")
# A number that a text table writes as one: no code (``007``), and not too long.
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d{0,18})(\.\d+)?([eE][+-]?\d{1,3})?")


class FoundPicture(NamedTuple):
    """A picture that a source names, not opened yet."""

    path: str  # absolute
    bytes: int | None  # size of the file; None where only reading it tells
    mtime_ns: int | None  # see ``time_of``; None where the file is not there
    caption_file: str = ""
    rows: Sequence[int] = ()  # of the table that describe it


class Description(NamedTuple):
    """What a source knows of a picture."""

    caption: str | None = None
    columns: Mapping[str, Value] = {}
    fault: str = ""  # why its caption could not be read


@dataclass
class LeftOut:
    """What a source holds and an index does not: how much per reason, and the first
    few.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        self.counts[reason] += count
        self.examples[reason] = [*self.examples.get(reason, ()), example][:3]


class Collection:
    """A source of pictures; this one, of which nothing is there any more, has none."""

    def __init__(self, name: str, left_out: LeftOut) -> None:
        self.name = name  # an absolute path
        self.left_out = left_out
        # beginnings of paths that it could not list: what is known below them stays
        self.unlisted: list[str] = []

    def scan(self) -> Iterator[FoundPicture]:
        """What it names; what it leaves out is counted."""
        yield from ()

    def describe(self, found: FoundPicture) -> Description:
        """What else it knows of a picture; in any thread."""
        raise LookupError(found.path)


def source_name(spec: str | Path) -> str:
    """What an index calls a source: its absolute path."""
    text = str(spec)
    if is_remote(text):
        raise InputError(f"{text}: is an address; an index is of files of this machine")
    return os.path.abspath(Path(text).expanduser())  # noqa: PTH100


def open_collection(
    name: str,
    left_out: LeftOut,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Collection:
    """Opens a folder of pictures, a picture, or a table of pictures."""
    path = Path(name)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in TABLE_SUFFIXES:
        return Table(name, left_out, image_column or "filepath", caption_column)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir() and suffix not in IMAGE_SUFFIXES:
        raise InputError(
            f"{path}: is no folder, picture or table of pictures; unpack a tar or"
            " shards first"
        )
    if image_column or caption_column:
        raise InputError(
            f"{path}: is no table; --image-column and --caption-column are for tables"
        )
    return Folder(name, left_out)


def has_pictures(path: Path) -> bool:
    """Whether a folder has a picture in it or below it."""
    return any(True for _ in Folder(str(path), LeftOut()).scan())


class Folder(Collection):
    """All pictures below a folder, or one, with captions beside them."""

    def scan(self) -> Iterator[FoundPicture]:
        """The pictures in the folder and below it, or the source's only one."""
        if os.path.isfile(self.name):  # noqa: PTH113
            folder, name = os.path.split(self.name)
            captions = captions_by_stem(os.listdir(folder))  # noqa: PTH208
            yield from self._pictures(folder, [name], captions)
            return
        for folder, folders, names in walk(self.name, self._note_unlisted):
            if INDEX_FILE in names and is_index(Path(folder, INDEX_FILE)):
                if folders or any(map(_is_picture, names)):
                    self.left_out.add("folder with an index of its own", folder)
                folders.clear()
                continue
            folders[:] = [name for name in folders if self._is_followed(folder, name)]
            yield from self._pictures(folder, names, captions_by_stem(names))

    def _pictures(
        self, folder: str, names: Sequence[str], captions: Mapping[str, str]
    ) -> Iterator[FoundPicture]:
        """The pictures among the files of a folder; counts files of other kinds."""
        for name in names:
            if _is_picture(name):
                yield from self._found(folder, name, captions)
            elif not name.lower().endswith(CAPTION_SUFFIX):
                path = os.path.join(folder, name)  # noqa: PTH118
                self.left_out.add("file of another kind", path)

    def describe(self, found: FoundPicture) -> Description:
        """The caption in the file beside a picture."""
        if not found.caption_file:
            return Description()
        try:
            text = read_pair_file(found.caption_file, found.path, "caption")
            return Description(clean_caption(text, found.path))
        except BadSample as bad:
            is_fault = bad.reason != "empty caption"
            return Description(fault=bad.reason if is_fault else "")

    def _note_unlisted(self, error: OSError) -> None:
        self.unlisted.append(error.filename)
        example = f"{error.filename} ({error.strerror})"
        self.left_out.add("folder cannot be listed", example)

    def _is_followed(self, folder: str, name: str) -> bool:
        """Whether pictures of a sub-folder belong to the source; counts those that do
        not.
        """
        path = os.path.join(folder, name)  # noqa: PTH118
        if name in _NEVER:
            return False
        if os.path.islink(path):  # noqa: PTH114
            self.left_out.add("linked folder, not followed", path)
            return False
        return True

    def _found(
        self, folder: str, name: str, captions: Mapping[str, str]
    ) -> Iterator[FoundPicture]:
        """A picture with its size and time; none where it is no file of the source."""
        path = os.path.join(folder, name)  # noqa: PTH118
        beside = captions.get(name.rpartition(".")[0])
        caption = os.path.join(folder, beside) if beside else ""  # noqa: PTH118
        try:
            state = self._state(path)
            if state is not None:
                time = time_of(state, state_of(caption) if caption else None)
                yield FoundPicture(path, state.st_size, time, caption)
        except OSError:  # reading it reports why
            yield FoundPicture(path, None, None, caption)

    def _state(self, path: str) -> os.stat_result | None:
        """The state of a file, or of the one that a link leads to within the source;
        None of others, which are counted.
        """
        state = os.lstat(path)
        if stat.S_ISREG(state.st_mode):
            return state
        root = os.path.realpath(self.name)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            self.left_out.add("link that leads out of the folder, not followed", path)
            return None
        target = state_of(path)
        if target is None:
            self.left_out.add("pipe or device", path)
        return target


class Table(Collection):
    """A table whose rows describe pictures; several rows of one path are one
    picture.
    """

    def __init__(
        self, name: str, left_out: LeftOut, image: str, caption: str | None
    ) -> None:
        super().__init__(name, left_out)
        path = Path(name)
        self._state = path.stat()
        names = schema_of(path, [image, *([caption] if caption else [])]).names
        check_name(path, names, image, "image")
        if caption:
            check_name(path, names, caption, "caption")
        columns = _read(path, names)
        caption = caption or _usual_caption(columns)
        paths = [_text(cell).strip() for cell in columns.pop(image)]
        self._captions = columns.pop(caption, []) if caption else []
        if path.suffix.lower() in _UNTYPED:
            columns = {name: _typed(cells) for name, cells in columns.items()}
        self._columns = columns
        self._rows = self._rows_by_path(paths)
        for column in {*TEXTS, *NUMBERS}.intersection(columns) - {"date"}:
            reason = "from filters, a column of a name that all pictures have"
            left_out.add(reason, column)

    def _rows_by_path(self, paths: Sequence[str]) -> dict[str, list[int]]:
        """Rows by the absolute path of their picture."""
        rows: dict[str, list[int]] = {}
        for row, path in enumerate(paths):
            if not path or "\0" in path:
                self.left_out.add("row without a path", f"row {row + 1:,}")
                continue
            joined = os.path.join(self.name, "..", path)  # noqa: PTH118
            rows.setdefault(os.path.normpath(joined), []).append(row)
        return rows

    def scan(self) -> Iterator[FoundPicture]:
        """The pictures as they are now; of size 0 and no time where one is missing."""
        for path, rows in self._rows.items():
            try:
                state = state_of(path)
            except OSError:  # reading it reports why
                yield FoundPicture(path, None, None, rows=rows)
                continue
            size = state.st_size if state else 0
            time = time_of(state, self._state) if state else None
            yield FoundPicture(path, size, time, rows=rows)

    def describe(self, found: FoundPicture) -> Description:
        """All captions of a picture's rows, and the columns of the first."""
        captions = [
            _text(self._captions[row]).strip() for row in found.rows if self._captions
        ]
        caption = "\n".join(filter(None, dict.fromkeys(captions)))
        columns = {
            name: value_of(cells[found.rows[0]])
            for name, cells in self._columns.items()
        }
        columns = {name: value for name, value in columns.items() if value is not None}
        return Description(caption or None, columns)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _usual_caption(names: Container[str]) -> str | None:
    return next((name for name in CAPTION_COLUMNS if name in names), None)


def state_of(path: str) -> os.stat_result | None:
    """The state of a regular file, None where there is none; OSError where that cannot
    be known.
    """
    try:
        state = os.stat(path)  # noqa: PTH116
    except _NOT_THERE:
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def time_of(*files: os.stat_result | None) -> int:
    """When a picture and the files that describe it were changed, in nanoseconds since
    1970: the sum, so that a change of one shows.
    """
    total = sum(file.st_mtime_ns + file.st_size for file in files if file)
    return (total + 2**63) % 2**64 - 2**63  # as SQLite holds it


def _read(path: Path, names: Sequence[str]) -> dict[str, list[object]]:
    """The cells of a table by column; those of text tables are bytes."""
    if path.suffix.lower() == ".jsonl":
        rows = list(json_rows(path))
        every_name = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in every_name}
    names = list(filter(None, dict.fromkeys(names)))
    table = read_table(path, names)
    return {name: [_cell_of(cell) for cell in table[name]] for name in names}


def _cell_of(cell: pa.Scalar) -> object:
    """A cell for Python; None where that has no such value (a year above 9999, text
    that is not UTF-8).
    """
    try:
        return cell.as_py()
    except (ArithmeticError, ValueError, LookupError, pa.ArrowException):
        return None


def _typed(cells: Sequence[object]) -> list[object]:
    """A column of a text table: numbers where all of it are, else text."""
    texts = [as_text(cell) for cell in cells]
    filled = list(filter(None, texts))
    if not filled or not all(map(_NUMBER.fullmatch, filled)):
        return [*texts]
    kind = int if all(text.lstrip("+-").isdecimal() for text in filled) else float
    return [kind(text) if text else None for text in texts]


def _text(cell: object) -> str:
    """A cell as text; the different texts of a list on lines."""
    if isinstance(cell, list):
        texts = [as_text(entry).strip() for entry in cell]
        return "\n".join(filter(None, dict.fromkeys(texts)))
    return as_text(cell)


def value_of(cell: object) -> Value:
    """What an index holds of a cell: a text, a number, a date, or JSON of what is none
    of these; None of nothing, and of what it cannot hold.
    """
    if isinstance(cell, Decimal):
        cell = int(cell) if cell == cell.to_integral_value() else float(cell)
    if isinstance(cell, int) and -(2**63) <= cell < 2**63:
        return cell
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if cell is None or isinstance(cell, bytes):
        return None
    if hasattr(cell, "isoformat"):
        cell = cell.isoformat()
    text = cell if isinstance(cell, str) else json.dumps(cell, default=str)
    return text[:MAX_CAPTION_BYTES]
