"""From what a user writes to a collection of pictures."""

from __future__ import annotations

import glob
import hashlib
import os
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cloob.cache import Cache
from cloob.data.batch import BadSample
from cloob.data.open import DEMO_SPLITS, Kind, look_up
from cloob.data.shards.paths import is_pattern, tars_in
from cloob.data.shards.remote import open_remote
from cloob.data.shards.spec import expand, is_remote, local_path
from cloob.data.sources.arrow import arrow_files, holds_images
from cloob.errors import InputError
from cloob.search.scan.collection import SEPARATOR, Collection, ReadFailed, read_regular
from cloob.search.scan.containers import Inside, Shard, Tars
from cloob.search.scan.files import Folder, Table, find_table
from cloob.search.trust import check_typed, was_typed


@dataclass(frozen=True)
class ScanOptions:
    """How sources are read.

    Attributes:
        exclude: Globs; what matches one, below its source or in a part of its path, is left out. An index remembers
            them with the source: none are those of before, an empty one clears them.
        image_column: Column of a table with the picture or its path; None: ``filepath``, or the only one of pictures.
        caption_column: Column with the caption; None: ``title``, ``caption`` or ``text``.
        cache: Where streamed shards and unpacked Parquet are kept; None: ``Cache()``.
        any_column: Of Arrow and Parquet files: see :class:`cloob.search.scan.containers.Inside`.
    """

    exclude: tuple[str, ...] = ()
    image_column: str | None = None
    caption_column: str | None = None
    cache: Cache | None = None
    any_column: bool = False


def source_name(spec: str | Path) -> str:
    """What an index calls a source: an absolute path, or an address as it is written."""
    text = str(spec)
    if is_remote(text) or text in DEMO_SPLITS:
        return text
    return os.path.abspath(local_path(text))  # noqa: PTH100 - links in it stay


def is_gone(name: str, *, typed: bool = False) -> bool:
    """Whether nothing of a source is on this machine any more; of an address nobody knows that.

    No file is looked for by a pattern that was typed neither now nor before.
    """
    if not os.path.isabs(name) or os.path.lexists(name):  # noqa: PTH117
        return False
    if is_pattern(name) and not typed and not was_typed(name):
        return False
    try:
        items = expand(name, escape=os.sep == "/") if is_pattern(name) else []
    except InputError:  # a folder with a brace in its name
        return True
    return not any(os.path.isfile(match) for item in items for match in glob.iglob(item))  # noqa: PTH113, PTH207


def open_collection(spec: str | Path, options: ScanOptions | None = None) -> Collection:
    """Opens a source of pictures, which need no captions.

    Args:
        spec: A folder of pictures, or whatever ``open_source`` takes: a table, shards, a Hugging Face data set, Arrow
            or Parquet files with the pictures inside, ``demo``.
        options: How; None takes the defaults.
    """
    options = options or ScanOptions()
    name, exclude = source_name(spec), options.exclude
    path, image = Path(name), options.image_column or "filepath"
    kind, files = _in_folder(path, options) if path.is_dir() else look_up(name, image)
    if kind == "table" and options.any_column and path.suffix.lower() == ".parquet":
        kind = "rows"
    match kind:
        case "elsewhere":
            return _streamed(name, options)
        case "tars":
            return Tars(name, [Shard(str(file), partial(Path, file), local=True) for file in files], exclude)
        case "rows":
            columns = (options.image_column, options.caption_column)
            return Inside(name, files, *columns, exclude, options.cache, any_column=options.any_column)
        case "table":
            return Table(path, image, options.caption_column, exclude)
    return Folder(path, exclude, find_table(path, options.caption_column))


def _in_folder(path: Path, options: ScanOptions) -> tuple[Kind, list[Path]]:
    """What a folder is: one of tars or Arrow files only where no picture lies in it or below it."""
    if next(Folder(path, options.exclude).scan(), None) is not None:
        return "folder", [path]
    if tars := tars_in(path):
        return "tars", tars
    files = arrow_files(path)
    inside = files and (files[0].suffix.lower() == ".arrow" or options.any_column or options.image_column)
    return ("rows", files) if inside or (files and holds_images(files[0], "filepath")) else ("folder", [path])


def _streamed(spec: str, options: ScanOptions) -> Tars:
    source = open_remote(spec, options.cache or Cache())
    names = source.shard_names
    for name, count in Counter(names).most_common(1):
        if count > 1:  # pictures are called by these names
            raise InputError(f"{spec}: {count:,} shards are called {name}; index each folder by itself")
    shards = [
        Shard(name, partial(source.prepare, i), local=False, samples=count)
        for i, (name, count) in enumerate(zip(names, source.shard_sizes, strict=True))
    ]
    return Tars(spec, shards, options.exclude)


def open_named(name: str, options: ScanOptions | None = None) -> Collection:
    """Opens a source that an index names; InputError for an address or a pattern never typed on this machine."""
    if is_remote(name) or (is_pattern(name) and not Path(name).exists()):
        check_typed(name)
    return open_collection(name, options)


class Pictures:
    """Reads single pictures of an index again from where they lie; for several threads.

    Sources stay open. One in which a picture cannot be found, or is another one, is opened anew: it may have changed.
    """

    def __init__(self) -> None:
        self._open: dict[str, Collection] = {}
        self._lock = threading.Lock()

    def read(self, source: str, path: str, content: str) -> bytes:
        """The bytes of a picture's file, by the item's source, path and content.

        Raises:
            BadSample: It is not there any more, or cannot be read now.
            InputError: It holds something else by now, or its source cannot be opened.
        """
        if SEPARATOR not in path or os.path.isfile(path):  # noqa: PTH113
            return _as_indexed(read_regular(path), path, content)
        collection = self._opened(source)
        try:
            return _read(collection, path, content)
        except ReadFailed:  # nothing says that it has changed
            raise
        except (BadSample, InputError):
            return _read(self._opened(source, stale=collection), path, content)

    def _opened(self, source: str, stale: Collection | None = None) -> Collection:
        """A source, opened anew where it is not open or is the stale one."""
        with self._lock:
            if self._open.get(source) is stale:
                self._open[source] = open_named(source, ScanOptions(any_column=True))
            return self._open[source]


def _read(collection: Collection, path: str, content: str) -> bytes:
    found = collection.find(path)
    if found is None:
        raise BadSample("missing image", path, f"not in {collection.name} any more")
    return _as_indexed(collection.read_again(found, content), path, content)


def _as_indexed(data: bytes, path: str, content: str) -> bytes:
    """Refuses what an index does not name, whatever lies there now."""
    if hashlib.sha256(data).hexdigest() != content:
        raise InputError(f"{path}: has changed since it was indexed; `cloob index` looks again")
    return data
