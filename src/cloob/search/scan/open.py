"""From what a user writes to a collection of pictures; and those inside tars, Arrow and
Parquet files.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Paths
from dataclasses import dataclass
from pathlib import Path

from cloob.cache import Cache
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, as_utf8, clean_caption
from cloob.data.open import DEMO_SPLITS, look_up
from cloob.data.shards.headers import Member
from cloob.data.shards.remote import RemoteShardSource, open_remote
from cloob.data.shards.spec import expand, is_pattern, is_remote, local_path
from cloob.data.shards.tar import TarReader, group_members
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, IMAGE_SUFFIXES
from cloob.data.sources.arrow import FileSource
from cloob.data.sources.paths import FILE_COLUMN, metadata_of
from cloob.errors import InputError, one_line
from cloob.pictures import MAX_IMAGE_BYTES, Unreadable, thumbnail
from cloob.search.models import was_typed
from cloob.search.records import SEPARATOR, Item, Value
from cloob.search.scan.collection import (
    Collection,
    Folder,
    FoundPicture,
    Inside,
    ReadFailed,
    Table,
    caption_of,
    values,
)
from cloob.search.store import Store

_PARTS = (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS, ("json",))


@dataclass(frozen=True)
class ScanOptions:
    """How sources are read.

    ``exclude`` are globs: what matches one, below its source or in a part of its path,
    is left out. An index remembers them with the source: none are those of before, an
    empty one clears them.
    """

    exclude: tuple[str, ...] = ()
    image_column: str | None = None  # ``filepath``, or the only one of pictures
    caption_column: str | None = None  # ``title``, ``caption`` or ``text``


# Its reader, where the picture, the caption and the JSON of every sample lie, by path,
# its time, and what is cut off.
_Tar = tuple[TarReader, dict[str, list[Member | None]], int | None, str | None]


class Tars(Collection, FileSource[_Tar]):
    """The pictures in tars.

    A shard that lies elsewhere and of which all samples are known is not fetched again.
    """

    max_open = 8  # with the places of all their pictures

    def __init__(
        self,
        name: str,
        shards: Sequence[Path] | RemoteShardSource,
        exclude: tuple[str, ...] = (),
    ) -> None:
        Collection.__init__(self, name, exclude)
        self._prepare: Callable[[int], Path]
        if isinstance(shards, RemoteShardSource):
            self._names, sizes, self._prepare = (
                [*shards.shard_names],
                shards.shard_sizes,
                shards.prepare,
            )
        else:
            self._names, sizes, self._prepare = (
                [*map(str, shards)],
                (0,) * len(shards),
                shards.__getitem__,
            )
        self._numbers = {name: shard for shard, name in enumerate(self._names)}
        FileSource.__init__(self, name, sizes, streamed=True)

    def prepare(self, shard: int) -> Path:
        return self._prepare(shard)

    def load(self, shard: int, file: Path) -> _Tar:
        reader, name = TarReader((file,)), self._names[shard]
        members, cut = reader.listing(0)
        reader.read(0, 0, 0)  # stays open when the cache drops it
        samples = group_members(members, _PARTS)[0].items()
        by_path = {
            f"{name}{SEPARATOR}{parts[0].name if parts[0] else key}": parts
            for key, parts in samples
        }
        return (
            reader,
            by_path,
            None if is_remote(self.name) else file.stat().st_mtime_ns,
            cut,
        )

    def scan(self, known: Paths[str] = ()) -> Iterator[FoundPicture]:
        by_shard: dict[str, list[str]] = {}
        for path in known:
            by_shard.setdefault(path.partition(SEPARATOR)[0], []).append(path)
        for shard, name in enumerate(self._names):
            if self.excluded(os.path.basename(name)):  # noqa: PTH119
                self.left_out.add("excluded", name)
                continue
            if len(by_shard.get(name, ())) == self.shard_sizes[shard] > 0:
                for path in by_shard[name]:
                    yield FoundPicture(path, None, None)
                continue
            yield from self._scan_shard(shard, name)

    def _scan_shard(self, shard: int, name: str) -> Iterator[FoundPicture]:
        try:
            _, samples, time, cut = self.opened(shard)
        except (OSError, InputError) as error:
            self.unlisted.append(name)
            self.left_out.add("shard cannot be read", one_line(error))
            return
        if cut is not None:
            self.unlisted.append(name)
            self.left_out.add("truncated shard", f"{name}: {cut}")
        for path, (image, *_) in samples.items():
            if image is None:
                self.left_out.add("sample without a picture", as_utf8(path))
            elif self.excluded(image.name):
                self.left_out.add("excluded", as_utf8(path))
            else:
                yield FoundPicture(path, image.size, time)

    def read(self, found: FoundPicture) -> bytes:
        (data,) = self._parts(found.path, slice(1), MAX_IMAGE_BYTES)
        if data is None:
            raise BadSample(
                "image too large", found.path, f"more than {MAX_IMAGE_BYTES:,} bytes"
            )
        return data

    def _parts(self, path: str, part: slice, most: int) -> list[bytes | None]:
        with self.reading(path):
            reader, samples, *_ = self.opened(
                self._numbers[path.partition(SEPARATOR)[0]]
            )
            members = (
                member if member and member.size <= most else None
                for member in samples[path][part]
            )
            return [
                member and reader.read(0, member.offset, member.size)
                for member in members
            ]

    def describe(self, found: FoundPicture) -> tuple[str | None, Mapping[str, Value]]:
        caption, about = self._parts(found.path, slice(1, 3), MAX_CAPTION_BYTES)
        columns: dict[str, Value] = {}
        with contextlib.suppress(
            ValueError, RecursionError, AttributeError
        ):  # no JSON, or no object
            columns = values(json.loads(about or b"{}"))
        with contextlib.suppress(BadSample):
            return clean_caption(caption, found.path), columns
        text = columns.get(caption_of(Path(), [*columns], None) or "")
        return text if text and isinstance(text, str) else None, columns


def source_name(spec: str | Path) -> str:
    text = str(spec)
    if is_remote(text) or text in DEMO_SPLITS:
        return text
    return os.path.abspath(local_path(text))  # noqa: PTH100


def is_gone(name: str, *, typed: bool = False) -> bool:
    """Whether nothing of a source is here any more; False of an address, and of a
    pattern that was never typed.
    """
    is_there = not os.path.isabs(name) or os.path.lexists(name)  # noqa: PTH117
    if is_there or (is_pattern(name) and not typed and not was_typed(name)):
        return False
    try:
        items = expand(name, escape=os.sep == "/")
    except InputError:  # a folder with a brace in its name
        return True
    return not any(
        os.path.isfile(match)
        for item in items
        for match in glob.iglob(item)  # noqa: PTH113, PTH207
    )


def open_collection(spec: str | Path, options: ScanOptions | None = None) -> Collection:
    """Opens what ``open_source`` takes, without captions too; and a single picture."""
    options = options or ScanOptions()
    name = source_name(spec)
    path = Path(name)
    image = options.image_column or "filepath"
    is_picture = path.is_file() and name.lower().endswith(IMAGE_SUFFIXES)
    kind, files = ("folder", [path])
    if not is_picture and not _has_pictures(path, options.exclude):
        kind, files = look_up(name, image)
    if kind == "rows":
        return Inside(name, files, image, options.caption_column, options.exclude)
    if kind == "table":
        return Table(path, image, options.caption_column, options.exclude)
    metadata = metadata_of(path) if kind == "folder" and not is_picture else None
    _refuse_columns(name, options, has_captions=metadata is not None)
    if kind == "elsewhere":
        return _open_remote(name, options.exclude)
    if kind == "tars":
        return Tars(name, files, options.exclude)
    table = None
    if metadata is not None:
        table = Table(metadata, FILE_COLUMN, options.caption_column)
    return Folder(path, options.exclude, table)


def _has_pictures(path: Path, exclude: tuple[str, ...]) -> bool:
    return path.is_dir() and next(Folder(path, exclude).scan(), None) is not None


def _refuse_columns(name: str, options: ScanOptions, *, has_captions: bool) -> None:
    """Raises InputError for columns of a source that has none."""
    if options.image_column is not None:
        raise InputError(f"{name}: is no table; --image-column names nothing in it")
    if options.caption_column is not None and not has_captions:
        raise InputError(f"{name}: is no table; --caption-column names nothing in it")


def _open_remote(name: str, exclude: tuple[str, ...]) -> Tars:
    remote = open_remote(name, Cache())
    twice, count = Counter(remote.shard_names).most_common(1)[0]
    if count > 1:  # pictures are called by these names
        raise InputError(
            f"{name}: {count:,} shards are called {twice}; index each folder by itself"
        )
    return Tars(name, remote, exclude)


def open_named(name: str, options: ScanOptions | None = None) -> Collection:
    """Opens a source that an index names; InputError for an address or a pattern never
    typed on this machine.
    """
    if (
        is_remote(name) or (is_pattern(name) and not Path(name).exists())
    ) and not was_typed(name):
        why = (
            "stands in the index and was never typed on this machine, so nothing is"
            " fetched or looked for"
        )
        raise InputError(
            f"{name}: {why}; if it is yours, type it once: cloob index 'ADDRESS' --out"
            " INDEX"
        )
    return open_collection(name, options)


class Pictures:
    """Reads single pictures of an index again, for several threads; a source that may
    have changed is opened anew.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[str, Collection] = {}
        self._lock = threading.Lock()

    def make(self, id: int, make: Callable[[bytes], bytes]) -> bytes:
        """What is made of the bytes of a picture; InputError where they cannot be read,
        or are others by now.
        """
        item = self._item(id)
        try:
            return make(self._read(item))
        except (BadSample, Unreadable) as bad:
            raise InputError(f"{item.path}: {bad.reason} ({bad.detail})") from None

    def thumbnail(self, id: int, size: int) -> bytes:
        """A JPEG within a square of ``size`` pixels; cached while the file stays."""
        cache, item = Cache(), self._item(id)
        name = f"{item.content} {size}" if _is_as_indexed(item) else None
        if name and (kept := cache.find("thumbnails", name)):
            with contextlib.suppress(OSError):  # removed meanwhile
                return kept.read_bytes()
        made = self.make(id, lambda data: thumbnail(data, size))
        with contextlib.suppress(InputError):  # a cache that cannot be written
            # now and then, of one content in 256, there is a look whether the cache has
            # room
            if name:
                cache.put("thumbnails", name, made, evict=item.content.startswith("00"))
        return made

    def _item(self, id: int) -> Item:
        for item in self._store.items([id]):
            return item
        raise InputError(f"{self._store.address}: has no item {id}")

    def _read(self, item: Item, stale: Collection | None = None) -> bytes:
        collection = Collection(item.source)  # of files
        if is_inside := SEPARATOR in item.path and not os.path.isfile(item.path):  # noqa: PTH113
            with self._lock:
                if self._open.get(item.source) is stale:
                    self._open[item.source] = open_named(item.source)
                collection = self._open[item.source]
        try:
            data = collection.read(FoundPicture(item.path, None, None))
            if hashlib.sha256(data).hexdigest() != item.content:
                raise InputError(
                    f"{item.path}: has changed since it was indexed; `cloob index`"
                    " looks again"
                )
            return data
        except (
            BadSample,
            InputError,
        ) as error:  # ReadFailed is no sign that the source has changed
            if stale is not None or not is_inside or isinstance(error, ReadFailed):
                raise
        return self._read(item, collection)


def _is_as_indexed(item: Item) -> bool:
    """Whether the file of a picture, or its container, is there and not newer."""
    for path in (item.path, item.path.partition(SEPARATOR)[0]):
        with contextlib.suppress(OSError, ValueError):
            time = os.stat(path).st_mtime_ns  # noqa: PTH116
            return item.mtime_ns is None or time // 10**6 <= item.mtime_ns // 10**6
    return item.mtime_ns is None  # elsewhere: nobody knows
