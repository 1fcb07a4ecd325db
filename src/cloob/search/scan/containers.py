"""Pictures inside containers: tar shards, here or elsewhere, and the rows of Arrow and Parquet files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection as Paths
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cloob.cache import Cache
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, clean_caption, printable
from cloob.data.shards.remote import RemoteShardSource
from cloob.data.shards.tar import Member, TarReader, group_members
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.data.sources.arrow import ArrowFiles, check_column, is_image, the_column
from cloob.data.sources.files import FileSource
from cloob.data.sources.table import check_name
from cloob.errors import InputError, one_line
from cloob.pictures import MAX_IMAGE_BYTES
from cloob.search.records import Value
from cloob.search.scan.collection import (
    CAPTION_COLUMNS,
    SEPARATOR,
    Collection,
    Found,
    LeftOut,
    plain,
    read_fault,
    values,
)

_PARTS = (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS, ("json",))


class _Tar(NamedTuple):
    reader: TarReader
    pictures: dict[str, Found]  # by path; the place of each is its shard, picture, caption and JSON
    cut: str | None
    left_out: list[tuple[str, str]]


class Tars(Collection, FileSource[_Tar]):
    """The pictures in tars. A sample's ``.json`` gives its columns.

    A shard that lies elsewhere and of which all samples are known is not fetched again. ``exclude`` also takes names of
    tars.
    """

    max_open = 8  # with the places of all their pictures

    def __init__(self, name: str, shards: Sequence[Path] | RemoteShardSource, exclude: tuple[str, ...] = ()) -> None:
        Collection.__init__(self, name, exclude)
        self._remote = shards if isinstance(shards, RemoteShardSource) else None
        self._files = [] if isinstance(shards, RemoteShardSource) else shards
        self._names = [*(self._remote.shard_names if self._remote else map(str, self._files))]
        FileSource.__init__(self, name, self._remote.shard_sizes if self._remote else [0] * len(shards), streamed=True)

    def prepare(self, shard: int) -> Path:
        return self._remote.prepare(shard) if self._remote else self._files[shard]

    def load(self, shard: int, file: Path) -> _Tar:
        reader = TarReader((file,))
        members, cut = reader.listing(0)
        reader.read(0, 0, 0)  # stays open when the cache drops it
        tar = _Tar(reader, {}, cut, [])
        mtime = None if self._remote else file.stat().st_mtime_ns
        for key, (image, caption, about) in group_members(members, _PARTS).items():
            path = f"{self._names[shard]}{SEPARATOR}{image.name if image else key}"
            if image is None or self.excluded(image.name):
                tar.left_out.append(("excluded" if image else "sample without a picture", printable(path)))
            else:
                tar.pictures[path] = Found(path, image.size, mtime, (shard, image, caption, about))
        return tar

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures, shard by shard."""
        self.left_out, self.unlisted = LeftOut(), []
        held: dict[str, list[str]] = {}
        for path in known:
            held.setdefault(path.partition(SEPARATOR)[0], []).append(path)
        for shard, name in enumerate(self._names):
            if self.excluded(os.path.basename(name)):  # noqa: PTH119
                self.left_out.add("excluded", name)
            elif len(held.get(name, ())) == self.shard_sizes[shard] > 0:
                yield from (Found(path, None, None) for path in held[name])
            else:
                yield from self._scan(name, shard)

    def _scan(self, name: str, shard: int) -> Iterator[Found]:
        try:
            tar = self.opened(shard)
        except (OSError, InputError) as error:
            self.unlisted.append(name)
            self.left_out.add("shard cannot be read", one_line(error))
            return
        if tar.cut is not None:
            self.unlisted.append(name)
            self.left_out.add("truncated shard", f"{name}: {tar.cut}")
        for reason, example in tar.left_out:
            self.left_out.add(reason, example)
        yield from tar.pictures.values()

    def find(self, path: str) -> Found | None:
        name = path.partition(SEPARATOR)[0]
        try:
            return self.opened(self._names.index(name)).pictures.get(path) if name in self._names else None
        except (OSError, InputError) as error:
            raise read_fault(path, error) from None

    def read(self, found: Found, content: str | None = None) -> bytes:
        shard, image, _, _ = self._place(found)
        if image.size > MAX_IMAGE_BYTES:
            raise BadSample("image too large", found.path, f"{image.size:,} bytes")
        return self._bytes(shard, image)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption member, and what the JSON member says."""
        shard, _, *members = self._place(found)
        caption, about = (
            self._bytes(shard, member) if member and member.size <= MAX_CAPTION_BYTES else None for member in members
        )
        try:
            raw = json.loads(about or b"{}")
        except (ValueError, RecursionError):
            raw = {}
        columns = values(raw) if isinstance(raw, dict) else {}
        try:
            return clean_caption(caption, found.path), columns
        except BadSample:
            said = (columns.get(key) for key in CAPTION_COLUMNS)
            return next((each for each in said if isinstance(each, str)), None) or None, columns

    def _place(self, found: Found) -> tuple[int, Member, Member | None, Member | None]:
        """Where a picture lies; of one that was taken for known, by looking."""
        again = found if found.place else self.find(found.path)
        if again is None:
            raise BadSample("missing image", found.path, "not in the shard any more")
        place: tuple[int, Member, Member | None, Member | None] = again.place
        return place

    def _bytes(self, shard: int, member: Member) -> bytes:
        try:
            return self.opened(shard).reader.read(0, member.offset, member.size)
        except (OSError, InputError) as error:
            raise read_fault(f"{self._names[shard]}{SEPARATOR}{member.name}", error) from None


class Inside(Collection):
    """The pictures in rows of Arrow or Parquet files. A path is the file's and a row's number.

    ``image_column`` is looked up as in training. Where several columns hold pictures, it has to be given to ``scan``;
    a single picture is found by its content.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        image_column: str | None,
        caption_column: str | None,
        exclude: tuple[str, ...],
        cache: Cache | None,
    ) -> None:
        super().__init__(name, exclude)
        self._files = ArrowFiles(name, files, cache)
        self._paths = [os.path.abspath(file) for file in files]  # noqa: PTH100
        first = self._files.schemas[0]
        self._image = the_column(first, image_column or "filepath", is_image)
        there = image_column is not None or self._image in first.names
        self._columns = [self._image] if there else [field.name for field in first if is_image(field.type)]
        self._caption = caption_column or next((column for column in CAPTION_COLUMNS if column in first.names), None)
        for file, schema in zip(files, self._files.schemas, strict=True):
            for column in self._columns:
                check_column(file, schema, column, "image")
            if self._caption:
                check_name(file, schema.names, self._caption, "caption")

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All rows, file by file."""
        check_column(self._files.paths[0], self._files.schemas[0], self._image, "image")
        self.left_out = LeftOut()
        start = 0
        for path, size in zip(self._paths, self._files.shard_sizes, strict=True):
            if self.excluded(os.path.basename(path)):  # noqa: PTH119
                self.left_out.add("excluded", path)
            else:
                time = os.stat(path).st_mtime_ns  # noqa: PTH116
                yield from (Found(f"{path}{SEPARATOR}{row}", None, time, start + row) for row in range(size))
            start += size

    def find(self, path: str) -> Found | None:
        container, _, number = path.rpartition(SEPARATOR)
        if container in self._paths and number.isdecimal():
            shard = self._paths.index(container)
            if int(number) < self._files.shard_sizes[shard]:
                return Found(path, None, None, sum(self._files.shard_sizes[:shard]) + int(number))
        return None

    def read(self, found: Found, content: str | None = None) -> bytes:
        try:
            for column in self._columns[:-1]:
                with contextlib.suppress(BadSample):
                    data = self._files.picture(found.place, column)
                    if hashlib.sha256(data).hexdigest() == content:
                        return data
            return self._files.picture(found.place, self._columns[-1])
        except (OSError, InputError) as error:
            raise read_fault(found.path, error) from None

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption, and the columns that are no pictures."""
        shard, row = self._files.place(found.place)
        table = self._files.opened(shard)
        columns = values(
            {
                field.name: plain(table.column(number)[row])
                for number, field in enumerate(table.schema)
                if not is_image(field.type) and field.name != self._image
            }
        )
        caption = columns.pop(self._caption, None) if self._caption else None
        return (None if caption is None else str(caption).strip() or None), columns
