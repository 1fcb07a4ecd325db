"""Arrow and Parquet files with the pictures inside, such as Hugging Face ``datasets`` folders."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Collection as Paths
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cloob.data.batch import BadSample, Reason
from cloob.data.sources.arrow import check_pictures, is_image, picture_in
from cloob.data.sources.columns import READ_ERRORS, checked, map_arrow, open_parquet, read_schema, unpacked
from cloob.errors import InputError, first_of
from cloob.pictures import MAX_IMAGE_BYTES
from cloob.search.records import Value
from cloob.search.scan.collection import (
    NO_PICTURE,
    SEPARATOR,
    Found,
    LeftOut,
    ReadFailed,
    is_excluded,
    newest,
    read_fault,
    read_regular,
    stated,
    value,
)
from cloob.search.scan.rows import CAPTION_COLUMNS, plain

_MOST_OPEN = 4  # groups of rows of Parquet files, unpacked


class Inside:
    """The pictures in rows of Arrow or Parquet files; see ``Collection``. A path is the file's and a row's number.

    Args:
        name: What the index calls them.
        files: All ``.arrow``, or all ``.parquet``.
        image_column: Column with the pictures; None: the only one of these.
        caption_column: Column with the captions; None: the first of ``CAPTION_COLUMNS`` that is there.
        exclude: Globs of the files' names.
        any_column: Whether nobody knows the column by now: :meth:`read_again` finds it.

    Raises:
        InputError: No such column, or a file that cannot be read.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        exclude: tuple[str, ...] = (),
        *,
        any_column: bool = False,
    ) -> None:
        self.name = name
        self.left_out = LeftOut()
        self.unlisted: list[str] = []
        paths = {os.path.abspath(file): file for file in files}  # noqa: PTH100
        self._excluded = [path for path, file in paths.items() if is_excluded(file.name, exclude)]
        self._files = {path: file for path, file in paths.items() if path not in self._excluded}
        files = list(self._files.values()) or files
        with_schema = _schema(files[0])
        kinds = (is_image, _is_text) if any_column else ()
        single = [field for field in with_schema if with_schema.names.count(field.name) == 1] if any_column else []
        self._images = [field.name for kind in kinds for field in single if kind(field.type)]
        self._image = self._images[0] if self._images else image_column or _only_image(files[0], with_schema)
        names = with_schema.names
        self._caption = caption_column or next((column for column in CAPTION_COLUMNS if column in names), None)
        for file in files if not any_column else ():
            schema = _schema(file)
            missing = {self._image, self._caption or self._image} - set(schema.names)
            if missing:
                raise InputError(f"{file} has no column {min(missing)!r}; its columns: {first_of(schema.names)}")
            check_pictures(file, schema, self._image)
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._refused: dict[tuple[str, int], tuple[Reason, str]] = {}

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All rows, file by file."""
        self.left_out = LeftOut()
        for path in self._excluded:
            self.left_out.add("excluded", path)
        for path, file in self._files.items():
            mtime = file.stat().st_mtime_ns
            for group, (start, length) in enumerate(_groups(file)):
                names = self._names(path, group) or itertools.repeat(None, length)
                for row, name in enumerate(names):
                    found = Found(f"{path}{SEPARATOR}{start + row}", None, mtime, (path, group, row))
                    yield found if name is None else _stated(found, _beside(path, name), file)

    def read(self, found: Found) -> bytes:
        """The bytes of a row's picture."""
        return self._picture(found, self._image)

    def read_again(self, found: Found, content: str) -> bytes:
        """The bytes of a row's picture that has this SHA-256, whichever its column; of another one where none has."""
        data: bytes | None = None
        fault: BadSample | None = None
        for column in self._images:
            try:
                data = self._picture(found, column)
            except BadSample as bad:
                fault = fault or bad
                continue
            if hashlib.sha256(data).hexdigest() == content:
                return data
        if data is None:
            raise fault or BadSample("missing image", found.path, NO_PICTURE)
        return data

    def _picture(self, found: Found, column: str) -> bytes:
        path = found.place[0]
        table, row = self._row(found)
        data, name = picture_in(table.column(column)[row])
        if data is None:
            if not name:
                raise BadSample("missing image", found.path, NO_PICTURE)
            return read_regular(_beside(path, os.fsdecode(name)))
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample("image too large", found.path, f"{len(data):,} bytes")
        return data

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption, and the columns that are no pictures."""
        table, row = self._row(found)
        said = {
            field.name: value(plain(table.column(number)[row]))
            for number, field in enumerate(table.schema)
            if not is_image(field.type) and field.name != self._image
        }
        caption = said.pop(self._caption, None) if self._caption else None
        columns = {name: held for name, held in said.items() if held is not None}
        return (str(caption).strip() or None) if caption is not None else None, columns

    def find(self, path: str) -> Found | None:
        """A picture by its path."""
        container, _, number = path.rpartition(SEPARATOR)
        if container not in self._files or not number.isdecimal():
            return None
        row = int(number)
        try:
            groups = _groups(self._files[container])
        except READ_ERRORS as error:
            raise read_fault(path, error) from None
        for group, (start, length) in enumerate(groups):
            if start <= row < start + length:
                return Found(path, None, None, (container, group, row - start))
        return None

    def _names(self, path: str, group: int) -> list[str | None]:
        """Of each row that has no bytes the file that it names; [] where no row has a name or all have bytes."""
        kind = _schema(self._files[path]).field(self._image).type
        try:
            if _is_text(kind):
                column = self._column(path, group)
            elif pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and not self._has_bytes(path, group):
                both = self._column(path, group)
                column = pc.if_else(pc.is_null(pc.struct_field(both, "bytes")), pc.struct_field(both, "path"), None)
            else:
                return []
            return [os.fsdecode(name) if name else None for name in column.to_pylist()]
        except (OSError, ValueError, pa.ArrowException):  # reading a picture says why
            return []

    def _has_bytes(self, path: str, group: int) -> bool:
        """Whether a group of a Parquet file says that no row is without bytes, or says nothing: then none is read."""
        if not path.lower().endswith(".parquet"):
            return False
        with open_parquet(path) as file:
            about = file.metadata.row_group(group)
        columns = [about.column(i) for i in range(about.num_columns)]
        facts = [each.statistics for each in columns if each.path_in_schema == f"{self._image}.bytes"]
        return not any(each is not None and each.has_null_count and each.null_count for each in facts)

    def _column(self, path: str, group: int) -> pa.ChunkedArray:
        """The pictures of a group."""
        if path.lower().endswith(".parquet"):
            return _unpacked(path, group, [self._image]).column(self._image)
        return checked(map_arrow(self._files[path]).select([self._image])).column(self._image)

    def _row(self, found: Found) -> tuple[pa.Table, int]:
        """The table that a picture lies in, and its row there."""
        path, group, row = found.place
        table = self._table(path, group)
        if row >= len(table):
            raise BadSample("missing image", found.path, "the file has fewer rows by now")
        return table, row

    def _table(self, path: str, group: int) -> pa.Table:
        """The rows of a Parquet file's group, or of an Arrow file."""
        key = (path, group)
        with self._lock:
            if key in self._refused:  # by all its rows, of which there may be millions, once
                reason, said = self._refused[key]
                raise BadSample(reason, path, said)
            if key not in self._open:
                while len(self._open) >= _MOST_OPEN and path.lower().endswith(".parquet"):
                    self._open.popitem(last=False)
                try:
                    if path.lower().endswith(".parquet"):
                        self._open[key] = _unpacked(path, group)
                    else:
                        self._open[key] = checked(map_arrow(self._files[path]))
                except InputError as error:
                    self._refused[key] = ("image too large", str(error))
                    raise BadSample("image too large", path, str(error)) from None
                except READ_ERRORS as error:
                    bad = read_fault(path, error)
                    if not isinstance(bad, ReadFailed):
                        self._refused[key] = (bad.reason, bad.detail)
                    raise bad from None
            self._open.move_to_end(key)
            return self._open[key]


def holds_pictures(file: Path, image_column: str | None) -> bool:
    """Whether a file of a folder has its pictures inside."""
    schema = _schema(file)
    return image_column in schema.names if image_column else any(is_image(field.type) for field in schema)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _beside(path: str, name: str) -> str:
    """The file that a row names."""
    return os.path.join(os.path.dirname(path), name)  # noqa: PTH118, PTH120


def _stated(found: Found, path: str, container: Path) -> Found:
    """A picture of a row without bytes: its size and time are those of the file that the row names."""
    try:
        state = stated(path)
    except OSError:  # reading it says why
        return found._replace(mtime_ns=None)
    if state is None:
        return found._replace(bytes=0, mtime_ns=None)
    return found._replace(bytes=state.st_size, mtime_ns=newest(state, container.stat()))


def _unpacked(path: str, group: int, columns: Sequence[str] | None = None) -> pa.Table:
    """A group of a Parquet file."""
    return pa.Table.from_batches(list(unpacked(Path(path), columns, [group])))


def _schema(file: Path) -> pa.Schema:
    try:
        return read_schema(file) if file.suffix.lower() == ".parquet" else map_arrow(file).schema
    except READ_ERRORS as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _groups(file: Path) -> list[tuple[int, int]]:
    """First row and number of rows of what is unpacked at once."""
    if file.suffix.lower() != ".parquet":
        return [(0, map_arrow(file).num_rows)]
    groups, start = [], 0
    with open_parquet(file) as opened:
        about = opened.metadata
    for group in range(about.num_row_groups):
        length = about.row_group(group).num_rows
        groups.append((start, length))
        start += length
    return groups


def _only_image(file: Path, schema: pa.Schema) -> str:
    names: list[Any] = [field.name for field in schema if is_image(field.type)]
    if len(names) != 1:
        said = f"the columns {first_of(names)} hold pictures" if names else "no column holds pictures"
        raise InputError(f"{file}: {said}; its columns: {first_of(schema.names)} (--image-column names one)")
    return str(names[0])
