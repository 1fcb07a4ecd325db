"""Files with pictures inside: tars, and Arrow or Parquet files.

A picture's path is the file's and its name in it: ``SHARD::MEMBER``, ``FILE::ROW``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, as_utf8, clean_caption
from cloob.data.shards.headers import Member
from cloob.data.shards.spec import is_tar
from cloob.data.shards.tar import TarReader, group_members
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.data.sources.arrow import TableSource, is_image
from cloob.errors import InputError, one_line
from cloob.pictures import MAX_IMAGE_BYTES
from cloob.search.records import SEPARATOR
from cloob.search.scan.collection import (
    Collection,
    Description,
    FoundPicture,
    ScanOptions,
    caption_of,
    reading,
    state_of,
    values,
)
from cloob.search.scan.table import cell_of

_PARTS = (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS, ("json",))
_MAX_OPEN = 8  # with the places of all their pictures


class Container(Protocol):
    """An open file; a name that it does not have is a LookupError."""

    cut: str | None  # what it lacks at its end

    def sizes(self) -> Iterator[tuple[str, int | None]]:
        """The names of its pictures, and their bytes where that is known."""

    def picture(self, name: str) -> bytes: ...

    def describe(self, name: str, caption: str | None) -> Description:
        """``caption`` is the column that was named for it."""


class _Sample(NamedTuple):
    """Where its parts lie in a tar."""

    image: Member
    caption: Member | None
    about: Member | None  # its JSON


class TarFile:
    def __init__(self, path: Path) -> None:
        self._reader = TarReader((path,))
        members, self.cut = self._reader.listing(0)
        self._reader.read(0, 0, 0)  # stays open when the cache drops what it unpacked
        samples, _ = group_members(members, _PARTS)
        self._samples: dict[str, _Sample] = {}  # by the name of the picture
        self.without_picture: list[str] = []
        for key, (image, caption, about) in samples.items():
            if image is None:
                self.without_picture.append(key)
            else:
                self._samples[image.name] = _Sample(image, caption, about)

    def sizes(self) -> Iterator[tuple[str, int | None]]:
        for name, sample in self._samples.items():
            yield name, sample.image.size

    def picture(self, name: str) -> bytes:
        image = self._samples[name].image
        if image.size > MAX_IMAGE_BYTES:
            detail = f"more than {MAX_IMAGE_BYTES:,} bytes"
            raise BadSample("image too large", name, detail)
        return self._reader.read(0, image.offset, image.size)

    def describe(self, name: str, caption: str | None) -> Description:
        sample = self._samples[name]
        columns = self._columns(sample.about)
        with contextlib.suppress(BadSample):
            text = clean_caption(self._text(sample.caption), name)
            return Description(text, columns)
        stated = columns.get(caption_of(Path(), list(columns), None) or "")
        return Description(stated if isinstance(stated, str) else None, columns)

    def _text(self, member: Member | None) -> bytes | None:
        if member is None or member.size > MAX_CAPTION_BYTES:
            return None
        return self._reader.read(0, member.offset, member.size)

    def _columns(self, about: Member | None) -> Mapping[str, Any]:
        """The fields of a sample's JSON; none where it is no JSON, or no object."""
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            return values(json.loads(self._text(about) or b"{}"))
        return {}


class ArrowFile:
    """Rows of an Arrow or Parquet file, read as in training."""

    cut = None
    without_picture: Sequence[str] = ()

    def __init__(self, path: Path, image: str) -> None:
        self._rows = TableSource(str(path), (path,), image, None)
        self.columns = self._rows.schema.names

    def sizes(self) -> Iterator[tuple[str, int | None]]:
        for row in range(len(self._rows)):
            yield str(row), None

    def picture(self, name: str) -> bytes:
        return self._rows.picture(self._row(name))

    def describe(self, name: str, caption: str | None) -> Description:
        _, table, row = self._rows.row(self._row(name))
        cells = {
            field.name: cell_of(table[field.name][row])
            for field in table.schema
            if not is_image(field.type) and field.name != self._rows.image
        }
        columns = values(cells)
        column = caption_of(Path(), list(columns), None) if caption is None else caption
        text = str(columns.pop(column or "", None) or "").strip()
        return Description(text or None, columns)

    def _row(self, name: str) -> int:
        if not name.isdecimal() or int(name) >= len(self._rows):
            raise LookupError(name)
        return int(name)


class Containers(Collection):
    """The pictures in some files of one kind."""

    def __init__(self, name: str, files: Sequence[Path], options: ScanOptions) -> None:
        super().__init__(name, options.exclude)
        self._files = [os.path.abspath(file) for file in files]  # noqa: PTH100
        self._image = options.image_column or "filepath"
        self._caption = options.caption_column
        if not is_tar(files[0]):  # a mistake in a column's name is reported at once
            first = ArrowFile(files[0], self._image)
            caption_of(files[0], first.columns, self._caption)

    def scan(self) -> Iterator[FoundPicture]:
        for file in self._files:
            if self.excluded(os.path.basename(file)):  # noqa: PTH119
                self.left_out.add("excluded", file)
            else:
                yield from self._scan_file(file)

    def _scan_file(self, file: str) -> Iterator[FoundPicture]:
        """The pictures of one tar or Arrow file; what cannot be read is counted as left
        out.
        """
        try:
            container = open_container(file, self._image)
            time = os.stat(file).st_mtime_ns  # noqa: PTH116
        except (OSError, InputError) as error:
            self.unlisted.append(file)
            self.left_out.add("shard cannot be read", one_line(error))
            return
        if container.cut is not None:
            self.unlisted.append(file)
            self.left_out.add("truncated shard", f"{file}: {container.cut}")
        for key in container.without_picture:
            example = as_utf8(f"{file}{SEPARATOR}{key}")
            self.left_out.add("sample without a picture", example)
        for name, size in container.sizes():
            path = f"{file}{SEPARATOR}{name}"
            if self.excluded(name):
                self.left_out.add("excluded", as_utf8(path))
            else:
                yield FoundPicture(path, size, time)

    def read(self, found: FoundPicture) -> bytes:
        return read_inside(found.path, self._image)

    def describe(self, found: FoundPicture) -> Description:
        file, _, name = found.path.partition(SEPARATOR)
        with reading(found.path):
            return open_container(file, self._image).describe(name, self._caption)


def read_inside(path: str, image: str = "filepath") -> bytes:
    """The bytes of a picture in a container, see ``reading``."""
    file, _, name = path.partition(SEPARATOR)
    with reading(path):
        return open_container(file, image).picture(name)


def open_container(file: str, image: str) -> TarFile | ArrowFile:
    """An open file, one of the last few; opened anew where it was changed."""
    state = state_of(file)
    if state is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    return _opened(file, image, state.st_mtime_ns, state.st_size)


@lru_cache(_MAX_OPEN)
def _opened(file: str, image: str, _time: int, _size: int) -> TarFile | ArrowFile:
    path = Path(file)
    return TarFile(path) if is_tar(path) else ArrowFile(path, image)
