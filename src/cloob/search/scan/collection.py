"""Sources of pictures that are files: folders and tables."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import threading
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Paths
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatch
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cloob.data.batch import (
    MAX_CAPTION_BYTES,
    BadSample,
    clean_caption,
    read_fault,
    read_pair_file,
)
from cloob.data.shards.spec import TAR_SUFFIXES
from cloob.data.source import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from cloob.data.sources.arrow import ARROW_SUFFIXES, ArrowSource, check_name, is_image
from cloob.data.sources.paths import (
    as_text,
    captions_by_stem,
    column_names,
    json_rows,
    read_table,
    walk,
)
from cloob.errors import InputError, one_line
from cloob.pictures import read_file
from cloob.search.database import is_index
from cloob.search.records import INDEX_FILE, SEPARATOR, Value
from cloob.search.where import NUMBERS, TEXTS

CAPTION_COLUMNS = ("title", "caption", "text")  # of captions, where no column is named

Globs = tuple[str, ...]  # of what is left out
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_CODE, _LONG = r"^[+-]?(0\d|\d{20})", r"\d{19}"
_NEVER = (
    "@eaDir",
    "#recycle",
    "System Volume Information",
    "node_modules",
)  # made by file servers, Windows and npm
_MOST_NS = 2**63 - 10**6  # of a time, nanoseconds: a little less than SQLite holds
_ADDING = threading.Lock()


class FoundPicture(NamedTuple):
    """A picture that a source names, not opened yet."""

    path: str  # as in :class:`cloob.search.records.Item`
    bytes: int | None  # size of the file; None where only reading it tells
    # when it, or what describes it, was changed last; None where that is not known
    mtime_ns: int | None
    place: Any = None  # where its source finds it


@dataclass
class LeftOut:
    """What a source holds and an index does not: how much per reason, and the first
    few.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        with _ADDING:  # threads that read pictures add, too
            self.counts[reason] += count
            self.examples[reason] = [*self.examples.get(reason, ()), example][:3]


class ReadFailed(BadSample):
    """A picture cannot be read now (a permission, a disk, a network); it need not be
    gone.
    """


class Collection:
    """A source of pictures; this one has none.

    Several threads may call ``read`` and ``describe``.
    """

    def __init__(self, name: str, exclude: Globs = ()) -> None:
        # what the index calls it: an absolute path, or the address as it was given
        self.name = name
        self.left_out = LeftOut()  # of its scans
        # beginnings of paths that it could not list: what is known below them stays
        self.unlisted: list[str] = []
        self._exclude = exclude

    def scan(self, known: Paths[str] = ()) -> Iterator[FoundPicture]:
        return iter(())

    def read(self, found: FoundPicture) -> bytes:
        """The bytes of a picture's file; ``ReadFailed`` if they cannot be read now,
        ``BadSample`` if there are none.
        """
        with self.reading(found.path):
            return read_file(found.path)

    def describe(self, found: FoundPicture) -> tuple[str | None, Mapping[str, Value]]:
        return None, {}

    @staticmethod
    @contextlib.contextmanager
    def reading(path: str) -> Iterator[None]:
        """Inside, what cannot be read is ``BadSample`` where it is not there, else
        ``ReadFailed``.
        """
        try:
            yield
        except LookupError:
            raise BadSample(
                "missing image", path, "not in its source any more"
            ) from None
        except (OSError, InputError) as error:
            why = getattr(error, "strerror", None) or one_line(error)
            kind = BadSample if isinstance(error, _NOT_THERE) else ReadFailed
            raise kind(read_fault(error, "missing image"), path, why) from None

    def excluded(self, path: str) -> bool:
        """Whether a path below the source, or a part of it, is one of the globs that
        leave pictures out.
        """
        inside = path.removeprefix(os.path.join(self.name, "")) if self._exclude else ""  # noqa: PTH118
        return any(
            fnmatch(name, glob)
            for glob in self._exclude
            for name in (inside, *inside.split("/"))
        )


class Table(Collection):
    """A table whose rows describe pictures; several rows of one path are one
    picture.
    """

    def __init__(
        self, path: Path, image: str, caption: str | None, exclude: Globs = ()
    ) -> None:
        super().__init__(os.path.abspath(path), exclude)  # noqa: PTH100
        self.state = path.stat()
        is_json = path.suffix.lower() in (".jsonl", ".ndjson")
        objects = list(json_rows(path)) if is_json else []
        columns = column_names(path, (image, caption or image))
        names = list(filter(None, dict.fromkeys(chain(columns, *objects))))
        check_name(path, names, image, "image")
        self._caption = caption_of(path, names, caption)
        self._others = [name for name in names if name not in (image, self._caption)]
        self._hidden = 0  # rows
        self._cell: Callable[[int, str], Any]
        if objects:
            self._cell = lambda row, column: objects[row].get(column)
            images = [row.get(image) for row in objects]
        else:
            images = self._read_cells(path, names)[image].to_pylist()
        # paths as the table has them
        self._stored = [_text(item).strip() for item in images]
        self.by_path = self._rows_by_path()  # of every picture
        self._composed = {
            unicodedata.normalize("NFC", item): rows
            for item, rows in self.by_path.items()
        }

    def _read_cells(self, path: Path, names: Sequence[str]) -> pa.Table:
        table, stray = read_table(path, names)
        self._hidden = sum(stray.values())
        is_text = path.suffix.lower() != ".parquet"
        cells = {name: table[name] for name in names}
        cells |= {name: _typed(cells[name], is_text) for name in self._others}
        self._cell = lambda row, column: plain(cells[column][row])
        return table

    def _rows_by_path(self) -> dict[str, list[int]]:
        """Rows by the absolute path of their picture."""
        by_path: dict[str, list[int]] = {}
        for row, stored in enumerate(self._stored):
            if stored and "\0" not in stored:
                joined = os.path.join(self.name, "..", stored)  # noqa: PTH118
                by_path.setdefault(os.path.normpath(joined), []).append(row)
        return by_path

    def of(self, path: str) -> list[int]:
        """The rows that name a picture, letters with their accents in one character or
        in two.
        """
        return self.by_path.get(path) or self._composed.get(
            unicodedata.normalize("NFC", path), []
        )

    def scan(self, known: Paths[str] = ()) -> Iterator[FoundPicture]:
        self._note_left_out()
        for path, rows in self.by_path.items():
            if not self.excluded(self._stored[rows[0]]):
                yield self._found(path, rows)

    def _note_left_out(self) -> None:
        if self._hidden:
            self.left_out.add("row hidden by a stray quote", self.name, self._hidden)
        for column in {*TEXTS, *NUMBERS}.intersection(self._others) - {"date"}:
            self.left_out.add(
                "from filters, a column of a name that all pictures have", column
            )
        for row, stored in enumerate(self._stored):
            if self.excluded(stored):
                self.left_out.add("excluded", stored)
            elif not stored or "\0" in stored:
                self.left_out.add("row without a path", f"row {row + 1:,}")

    def _found(self, path: str, rows: list[int]) -> FoundPicture:
        """A picture as it is now; of size 0 and no time where it is missing."""
        try:
            state = _state(path)
        except OSError:  # reading it reports why
            return FoundPicture(path, None, None, rows)
        if state is None:
            return FoundPicture(path, 0, None, rows)
        return FoundPicture(path, state.st_size, _newest(state, self.state), rows)

    def describe(self, found: FoundPicture) -> tuple[str | None, Mapping[str, Value]]:
        """All captions of a picture's rows, and the columns of the first."""
        captions = [
            _text(self._cell(row, self._caption)).strip()
            for row in found.place
            if self._caption
        ]
        others = (
            {name: self._cell(found.place[0], name) for name in self._others}
            if found.place
            else {}
        )
        return "\n".join(filter(None, dict.fromkeys(captions))) or None, values(others)


class Inside(Collection):
    """The pictures in rows of Arrow or Parquet files, read as in training.

    A path is the file's and a row's number.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        image: str,
        caption: str | None,
        exclude: Globs,
    ) -> None:
        super().__init__(name, exclude)
        self._files = ArrowSource(name, files, image, None)
        self._caption = caption_of(files[0], self._files.schemas[0].names, caption)
        self._paths = [os.path.abspath(file) for file in files]  # noqa: PTH100
        ends = [*accumulate(self._files.shard_sizes, initial=0)]
        self._rows = dict(zip(self._paths, map(range, ends, ends[1:]), strict=True))

    def scan(self, known: Paths[str] = ()) -> Iterator[FoundPicture]:
        for path, size in zip(self._paths, self._files.shard_sizes, strict=True):
            if self.excluded(os.path.basename(path)):  # noqa: PTH119
                self.left_out.add("excluded", path)
            else:
                time = os.stat(path).st_mtime_ns  # noqa: PTH116
                yield from (
                    FoundPicture(f"{path}{SEPARATOR}{row}", None, time)
                    for row in range(size)
                )

    def _row(self, path: str) -> int:
        file, _, row = path.rpartition(SEPARATOR)
        if not row.isdecimal():
            raise LookupError(path)
        return self._rows[file][int(row)]

    def read(self, found: FoundPicture) -> bytes:
        with self.reading(found.path):
            return self._files.picture(self._row(found.path))

    def describe(self, found: FoundPicture) -> tuple[str | None, Mapping[str, Value]]:
        _, table, row = self._files.row(self._row(found.path))
        fields = [
            field
            for field in table.schema
            if not is_image(field.type) and field.name != self._files.image
        ]
        return described(
            {field.name: plain(table[field.name][row]) for field in fields},
            self._caption,
        )


class Folder(Collection):
    """All pictures below a folder, or one; ``table`` describes some.

    Their places are the files of their captions.
    """

    def __init__(
        self, folder: Path, exclude: Globs = (), table: Table | None = None
    ) -> None:
        super().__init__(os.path.abspath(folder), exclude)  # noqa: PTH100
        self._table = table

    def scan(self, known: Paths[str] = ()) -> Iterator[FoundPicture]:
        if os.path.isfile(self.name):  # noqa: PTH113
            folder, name = os.path.split(self.name)
            found = self._found(folder, name, captions_by_stem(os.listdir(folder)))  # noqa: PTH208
            if found:
                yield found
            return
        strangers: Counter[str] = Counter()  # files of other kinds, by their ending
        described: set[int] = set()  # rows of the table
        for folder, folders, names in walk(self.name, self._note_unlisted):
            if INDEX_FILE in names and is_index(Path(folder, INDEX_FILE)):
                self._note_index(folder, folders, names)
                folders.clear()
                continue
            folders[:] = self._followed(folder, folders)
            captions = captions_by_stem(names)
            for name in names:
                found = self._picture(folder, name, captions, strangers)
                if found:
                    described.update(self._table.of(found.path) if self._table else ())
                    yield found
        self._note_strangers(strangers)
        self._note_rows(described)

    def _note_unlisted(self, error: OSError) -> None:
        self.unlisted.append(error.filename)
        self.left_out.add(
            "folder cannot be listed", f"{error.filename} ({error.strerror})"
        )

    def _note_index(
        self, folder: str, folders: Sequence[str], names: Sequence[str]
    ) -> None:
        """Counts a folder with an index of its own, unless nothing else is in it."""
        if folders or any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            self.left_out.add("folder with an index of its own", folder)

    def _followed(self, folder: str, folders: Sequence[str]) -> list[str]:
        """The sub-folders that are looked into."""
        followed = []
        for name in folders:
            path = os.path.join(folder, name)  # noqa: PTH118
            if name in _NEVER:
                continue
            if self.excluded(path):
                self.left_out.add("excluded", path)
            elif os.path.islink(path):  # noqa: PTH114
                self.left_out.add("linked folder, not followed", path)
            else:
                followed.append(name)
        return followed

    def _picture(
        self,
        folder: str,
        name: str,
        captions: Mapping[str, str],
        strangers: Counter[str],
    ) -> FoundPicture | None:
        """A file as a picture; what else it may be is counted."""
        path = os.path.join(folder, name)  # noqa: PTH118
        lower = name.lower()
        if lower.endswith(CAPTION_SUFFIXES):
            return None
        if self.excluded(path):
            self.left_out.add("excluded", path)
        elif lower.endswith(IMAGE_SUFFIXES):
            return self._found(folder, name, captions)
        elif lower.endswith((*TAR_SUFFIXES, *ARROW_SUFFIXES)):
            self.left_out.add("tar or Arrow file beside pictures", path)
        else:
            strangers[Path(path).suffix.lower() or name] += 1
        return None

    def _note_strangers(self, strangers: Counter[str]) -> None:
        if strangers:
            kinds = [f"{count:,} {kind}" for kind, count in strangers.most_common(3)]
            if len(strangers) > 3:
                kinds.append("…")
            self.left_out.add(
                "file of another kind", ", ".join(kinds), strangers.total()
            )

    def _note_rows(self, described: set[int]) -> None:
        """Counts rows of the folder's table that name none of its pictures."""
        for path, rows in self._table.by_path.items() if self._table else ():
            if described.isdisjoint(rows) and not self.excluded(path):
                self.left_out.add(
                    "row of the folder's table that names no picture of it", path
                )

    def describe(self, found: FoundPicture) -> tuple[str | None, Mapping[str, Value]]:
        caption: str | None = None
        columns: Mapping[str, Value] = {}
        if self._table:
            rows = self._table.of(found.path)
            caption, columns = self._table.describe(found._replace(place=rows))
        if found.place:
            try:
                text = read_pair_file(found.place, found.path, "caption")
                caption = clean_caption(text, found.path)
            except BadSample as bad:
                if bad.reason != "empty caption":
                    self.left_out.add(bad.reason, found.place)
        return caption, columns

    def _found(
        self, folder: str, name: str, captions: Mapping[str, str]
    ) -> FoundPicture | None:
        """A picture, whose time is also that of what describes it; None where it is no
        file of the source.
        """
        path = os.path.join(folder, name)  # noqa: PTH118
        beside = captions.get(name.rpartition(".")[0])
        caption = os.path.join(folder, beside) if beside else ""  # noqa: PTH118
        try:
            state = os.lstat(path)
            if not stat.S_ISREG(state.st_mode):
                target = self._target(path)
                if target is None:
                    return None
                state = target
            table = self._table.state if self._table else None
            time = _newest(state, _state(caption) if caption else None, table)
            return FoundPicture(path, state.st_size, time, caption)
        except OSError:  # reading it reports why
            return FoundPicture(path, None, None, caption)

    def _target(self, path: str) -> os.stat_result | None:
        """The file that a link leads to within the folder; counts what else it is."""
        root = os.path.realpath(self.name)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            self.left_out.add("link that leads out of the folder, not followed", path)
            return None
        target = _state(path)
        if target is None:
            self.left_out.add("pipe or device", path)
        return target


def caption_of(path: Path, names: Sequence[str], column: str | None) -> str | None:
    """The column of captions among those of a table: the one that is named, else a
    usual one.
    """
    if column is not None:
        check_name(path, names, column, "caption")
    return column or next((name for name in CAPTION_COLUMNS if name in names), None)


def described(
    row: Mapping[str, Any], caption: str | None
) -> tuple[str | None, dict[str, Value]]:
    """The caption and the other columns of a row."""
    columns = values(row)
    text = str(columns.pop(caption or "", None) or "")
    return text.strip() or None, columns


def values(row: Mapping[Any, Any]) -> dict[str, Value]:
    """The columns of a row as an index holds them, without those that it cannot
    hold.
    """
    columns = {str(name): _value(raw) for name, raw in row.items()}
    return {name: value for name, value in columns.items() if value is not None}


def _value(raw: Any) -> Value:
    """What an index holds of a cell; None of nothing, and of what it cannot hold."""
    if isinstance(raw, Decimal) and raw.is_finite():
        raw = int(raw) if raw == raw.to_integral_value() else float(raw)
    if isinstance(raw, int) and -(2**63) <= raw < 2**63:
        return raw
    if isinstance(raw, float):
        return raw if math.isfinite(raw) else None
    return None if raw is None or isinstance(raw, bytes) else _shown(raw)


def _shown(raw: Any) -> str | None:
    """A text, a date, a list of texts, or JSON of what is none of these."""
    if hasattr(raw, "isoformat"):
        raw = raw.isoformat()
    elif isinstance(raw, list) and all(isinstance(item, str) for item in raw):
        raw = ", ".join(raw)
    elif not isinstance(raw, str):
        try:
            raw = json.dumps(raw, default=str)
        except (TypeError, ValueError, RecursionError):
            return None
    return str(raw)[:MAX_CAPTION_BYTES]


def _newest(file: os.stat_result, *others: os.stat_result | None) -> int:
    """The latest time in milliseconds, and below that a mark of all: a caption may go,
    or come with an older time. A time that SQLite cannot hold is the last that it can.
    """
    states = [(state.st_mtime_ns, state.st_size) for state in others if state]
    latest = max([file.st_mtime_ns, *(time for time, _ in states)])
    latest = max(-_MOST_NS, min(latest, _MOST_NS))
    if not states:
        return latest
    mark = zlib.crc32(repr(states).encode()) % 1_000_000
    return latest - latest % 1_000_000 + mark


def _state(path: str) -> os.stat_result | None:
    """The state of a regular file, None where there is none; OSError where that cannot
    be known.
    """
    try:
        state = os.stat(path)  # noqa: PTH116
    except _NOT_THERE:
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def plain(scalar: pa.Scalar) -> Any:
    """What Arrow holds, for Python; None where Python has no such value (a year above
    9999, text that is not UTF-8).
    """
    try:
        return scalar.as_py()
    except (ArithmeticError, ValueError, LookupError, pa.ArrowException):
        return None


def _text(raw: Any) -> str:
    if isinstance(raw, list):
        return "\n".join(
            filter(
                None,
                dict.fromkeys(
                    _text(item).strip() for item in raw if not isinstance(item, list)
                ),
            )
        )
    return as_text(raw)


def _typed(column: pa.ChunkedArray, is_text_table: bool) -> pa.ChunkedArray:
    """A column with bytes as text, and text as numbers where all are and none is a code
    (``007``) or too long.
    """
    column = _decoded(column, is_text_table)
    is_text = pa.types.is_large_string(column.type)
    if not is_text or pc.any(pc.match_substring_regex(column, _CODE)).as_py():
        return column
    filled = pc.if_else(pc.equal(column, ""), None, column)
    is_long = pc.any(pc.match_substring_regex(column, _LONG)).as_py()
    for kind in (pa.int64(),) if is_long else (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowException):
            return filled.cast(kind)
    return column


def _decoded(column: pa.ChunkedArray, is_text_table: bool) -> pa.ChunkedArray:
    """Bytes as text where they are; those of a text table in any case."""
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(
        column.type
    ):
        return column
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException:
        if not is_text_table:
            return column
    texts = [raw and raw.decode("utf-8", "replace") for raw in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.large_string())])
