"""Pictures inside containers: tar shards, here or elsewhere, and the rows of Arrow and Parquet files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from collections.abc import Collection as Paths
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cloob.cache import Cache
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, clean_caption, printable
from cloob.data.shards.index import group_members
from cloob.data.shards.tar import Member, TarReader
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.data.sources.arrow import ArrowFiles, check_pictures, is_image, is_text, picture_in
from cloob.errors import InputError, first_of
from cloob.pictures import MAX_IMAGE_BYTES
from cloob.search.records import Value
from cloob.search.scan.collection import (
    NO_PICTURE,
    SEPARATOR,
    Collection,
    Found,
    LeftOut,
    named,
    read_fault,
    read_regular,
    values,
)
from cloob.search.scan.files import CAPTION_COLUMNS, plain

T = TypeVar("T")

_PARTS = (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS, ("json",))
_MAX_OPEN_TARS = 8
_FAILED_SECONDS = 60.0


class _Once:
    """Remembers for a minute what could not be opened, so that not each of its pictures waits for it."""

    def __init__(self) -> None:
        self._failed: dict[Hashable, tuple[float, str]] = {}

    def __call__(self, key: Hashable, work: Callable[[], T]) -> T:
        when, why = self._failed.get(key, (0.0, ""))
        if why and time.monotonic() - when < _FAILED_SECONDS:
            raise InputError(why)
        try:
            return work()
        except (OSError, InputError) as error:
            self._failed[key] = time.monotonic(), str(error)
            raise


class Shard(NamedTuple):
    """A tar.

    Attributes:
        path: What items call it: the file, or its name where it lies elsewhere.
        fetch: Gives the file on this machine.
        local: Whether it lies there for good: then its time says whether it changed.
        samples: In it, where that is known before it is fetched.
    """

    path: str
    fetch: Callable[[], Path]
    local: bool
    samples: int | None = None


class _Tar:
    """An open tar; ``pictures`` are by path, once they have been listed."""

    def __init__(self, file: Path) -> None:
        self.reader = TarReader((file,))
        self.reader.read(0, 0, 0)  # stays open when the cache drops it
        self.pictures: dict[str, Found] | None = None


class _Place(NamedTuple):
    shard: Shard
    image: Member
    caption: Member | None
    about: Member | None


class Tars(Collection):
    """The pictures in tars. A sample's ``.json`` gives its columns.

    A shard that lies elsewhere and of which all samples are known is not fetched again. ``exclude`` also takes names of
    tars.
    """

    def __init__(self, name: str, shards: Sequence[Shard], exclude: tuple[str, ...] = ()) -> None:
        super().__init__(name, exclude)
        self._shards = {shard.path: shard for shard in shards}
        self._open: OrderedDict[str, _Tar] = OrderedDict()
        self._once = _Once()
        self._lock = threading.RLock()

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures, shard by shard."""
        self.left_out, self.unlisted = LeftOut(), []
        by_shard: dict[str, list[str]] = {}
        for path in known:
            by_shard.setdefault(path.partition(SEPARATOR)[0], []).append(path)
        for shard in self._shards.values():
            held = by_shard.get(shard.path, [])
            if self.excluded(os.path.basename(shard.path)):  # noqa: PTH119
                self.left_out.add("excluded", shard.path)
            elif shard.samples is not None and len(held) == shard.samples:
                yield from (Found(path, None, None) for path in held)
            else:
                try:
                    listed = self._list(shard)
                except (OSError, InputError) as error:
                    self.unlisted.append(shard.path)
                    self.left_out.add("shard cannot be read", " ".join(str(error).split()))
                else:
                    yield from listed.values()

    def find(self, path: str) -> Found | None:
        """A picture by its path."""
        shard = self._shards.get(path.partition(SEPARATOR)[0])
        try:
            return self._list(shard).get(path) if shard else None
        except (OSError, InputError) as error:
            raise read_fault(path, error) from None

    def read(self, found: Found) -> bytes:
        """The bytes of a member."""
        place = self._place(found)
        if place.image.size > MAX_IMAGE_BYTES:
            raise BadSample("image too large", found.path, f"{place.image.size:,} bytes")
        return self._bytes(place.shard, place.image)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption member, and what the JSON member says."""
        place = self._place(found)
        caption, about = (
            self._bytes(place.shard, member) if member and member.size <= MAX_CAPTION_BYTES else None
            for member in (place.caption, place.about)
        )
        try:
            raw = json.loads(about or b"{}")
        except (ValueError, RecursionError):
            raw = {}
        columns = values(raw) if isinstance(raw, dict) else {}
        try:
            return clean_caption(caption, found.path), columns
        except BadSample:
            said = (columns.get(key) for key in ("caption", "text", "title"))
            return next((each for each in said if isinstance(each, str)), None) or None, columns

    def _place(self, found: Found) -> _Place:
        """Where a member lies; of one that was taken for known, by looking."""
        again = found if found.place else self.find(found.path)
        if again is None:
            raise BadSample("missing image", found.path, "not in the shard any more")
        place: _Place = again.place
        return place

    def _bytes(self, shard: Shard, member: Member) -> bytes:
        try:
            return self._opened(shard).reader.read(0, member.offset, member.size)
        except (OSError, InputError) as error:
            raise read_fault(f"{shard.path}{SEPARATOR}{member.name}", error) from None

    def _opened(self, shard: Shard) -> _Tar:
        """A shard, fetched, unpacked and opened once whatever the number of threads."""
        with self._lock:
            if shard.path not in self._open:
                self._open[shard.path] = self._once(shard.path, lambda: _Tar(shard.fetch()))
                if len(self._open) > _MAX_OPEN_TARS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard.path)
            return self._open[shard.path]

    def _list(self, shard: Shard) -> dict[str, Found]:
        """The pictures of a shard by their paths; OSError or InputError if it cannot be read."""
        with self._lock:
            tar = self._opened(shard)
            if tar.pictures is None:
                tar.pictures = self._pictures(shard, *tar.reader.listing(0))
            return tar.pictures

    def _pictures(self, shard: Shard, members: list[Member], cut: str | None) -> dict[str, Found]:
        mtime = shard.fetch().stat().st_mtime_ns if shard.local else None
        if cut is not None:
            self.unlisted.append(shard.path)
            self.left_out.add("truncated shard", f"{shard.path}: {cut}")
        found: dict[str, Found] = {}
        for key, (image, caption, about) in group_members(members, _PARTS).items():
            if image is None:
                self.left_out.add("sample without a picture", f"{shard.path}{SEPARATOR}{printable(key)}")
            elif self.excluded(image.name):
                self.left_out.add("excluded", f"{shard.path}{SEPARATOR}{printable(image.name)}")
            else:
                path = f"{shard.path}{SEPARATOR}{image.name}"
                found[path] = Found(path, image.size, mtime, _Place(shard, image, caption, about))
        return found


class Inside(Collection):
    """The pictures in rows of Arrow or Parquet files. A path is the file's and a row's number.

    ``any_column``: nobody knows the column of the pictures by now, and :meth:`read_again` finds it.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        image_column: str | None,
        caption_column: str | None,
        exclude: tuple[str, ...],
        cache: Cache | None,
        *,
        any_column: bool,
    ) -> None:
        super().__init__(name, exclude)
        self._files = ArrowFiles(name, files, cache)
        self._paths = [os.path.abspath(file) for file in files]  # noqa: PTH100
        self._once = _Once()
        first = self._files.schemas[0]
        pictures = [field.name for field in first if is_image(field.type)]
        if image_column is None and len(pictures) != 1 and not any_column:
            said = f"the columns {first_of(pictures)} hold pictures" if pictures else "no column holds pictures"
            raise InputError(f"{files[0]}: {said}; its columns: {first_of(first.names)} (--image-column names one)")
        self._columns = [image_column or next(iter(pictures), first.names[0])]
        self._caption = caption_column or next((column for column in CAPTION_COLUMNS if column in first.names), None)
        if any_column:
            self._columns = pictures + [field.name for field in first if is_text(field.type)]
            return
        for file, schema in zip(files, self._files.schemas, strict=True):
            missing = {self._columns[0], self._caption or self._columns[0]} - {*schema.names}
            if missing:
                raise InputError(f"{file} has no column {min(missing)!r}; its columns: {first_of(schema.names)}")
            check_pictures(file, schema, self._columns[0])

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All rows, file by file."""
        self.left_out = LeftOut()
        start = 0
        for shard, (path, size) in enumerate(zip(self._paths, self._files.shard_sizes, strict=True)):
            if self.excluded(os.path.basename(path)):  # noqa: PTH119
                self.left_out.add("excluded", path)
            else:
                state = os.stat(path)  # noqa: PTH116
                for row, name in enumerate(self._named(shard) or repeat(None, size)):
                    called = f"{path}{SEPARATOR}{row}"
                    if name is None:
                        yield Found(called, None, state.st_mtime_ns, start + row)
                    else:
                        yield named(_beside(path, name), state, start + row, called=called)
            start += size

    def find(self, path: str) -> Found | None:
        """A picture by its path."""
        container, _, number = path.rpartition(SEPARATOR)
        if container in self._paths and number.isdecimal():
            shard = self._paths.index(container)
            if int(number) < self._files.shard_sizes[shard]:
                return Found(path, None, None, sum(self._files.shard_sizes[:shard]) + int(number))
        return None

    def read(self, found: Found) -> bytes:
        """The bytes of a row's picture."""
        return self._picture(found, self._columns[0])

    def read_again(self, found: Found, content: str) -> bytes:
        """The bytes of a row's picture that has this SHA-256, whichever its column; of another one where none has."""
        data, fault = b"", BadSample("missing image", found.path, NO_PICTURE)
        for column in self._columns:
            try:
                data = self._picture(found, column)
            except BadSample as bad:
                fault = bad
                continue
            if hashlib.sha256(data).hexdigest() == content:
                return data
        if not data:
            raise fault
        return data

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption, and the columns that are no pictures."""
        table, row, _ = self._row(found)
        columns = values(
            {
                field.name: plain(table.column(number)[row])
                for number, field in enumerate(table.schema)
                if not is_image(field.type) and field.name != self._columns[0]
            }
        )
        caption = columns.pop(self._caption, None) if self._caption else None
        return (None if caption is None else str(caption).strip() or None), columns

    def _picture(self, found: Found, column: str) -> bytes:
        table, row, path = self._row(found)
        data, name = picture_in(table.column(column)[row])
        if data is None:
            if not name:
                raise BadSample("missing image", found.path, NO_PICTURE)
            return read_regular(_beside(path, os.fsdecode(name)))
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample("image too large", found.path, f"{len(data):,} bytes")
        return data

    def _row(self, found: Found) -> tuple[pa.Table, int, str]:
        """The table that a picture lies in, its row there, and the file."""
        shard, row = self._files.place(found.place)
        try:
            return self._once(shard, lambda: self._files.opened(shard)), row, self._paths[shard]
        except (OSError, InputError) as error:
            raise read_fault(found.path, error) from None

    def _named(self, shard: int) -> list[str | None]:
        """By row the file that a row without bytes names; [] where no row has a name or all have bytes."""
        column, path = self._columns[0], self._paths[shard]
        kind = self._files.schemas[shard].field(column).type
        has_names = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        if not is_text(kind) and (not has_names or _all_have_bytes(path, column)):
            return []
        try:
            names = self._once(shard, lambda: self._files.opened(shard)).column(column)
            if has_names:
                names = pc.if_else(pc.is_null(pc.struct_field(names, "bytes")), pc.struct_field(names, "path"), None)
            return [os.fsdecode(name) if name else None for name in names.to_pylist()]
        except (OSError, ValueError, pa.ArrowException):  # reading a picture says why
            return []


def _all_have_bytes(path: str, column: str) -> bool:
    """Whether a Parquet file says that no row is without bytes, or says nothing: then it need not be unpacked."""
    if not path.lower().endswith(".parquet"):
        return False
    about = parquet.read_metadata(path)
    groups = map(about.row_group, range(about.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    facts = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{column}.bytes"]
    return not any(each is not None and each.has_null_count and each.null_count for each in facts)


def _beside(path: str, name: str) -> str:
    """The file that a row names."""
    return os.path.join(os.path.dirname(path), name)  # noqa: PTH118, PTH120
