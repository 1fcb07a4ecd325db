"""From what a user writes to a collection of pictures."""

from __future__ import annotations

import glob
import hashlib
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cloob.cache import Cache
from cloob.data.batch import BadSample
from cloob.data.open import DEMO_SPLITS, look_up
from cloob.data.shards.remote import open_remote
from cloob.data.shards.spec import expand, is_pattern, is_remote, local_path
from cloob.data.sources.folder import FILE_COLUMN, metadata_of
from cloob.errors import InputError
from cloob.search.scan.collection import SEPARATOR, Collection, Folder, ReadFailed, Rows, Table, read_regular
from cloob.search.scan.containers import Inside, Tars
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
    """

    exclude: tuple[str, ...] = ()
    image_column: str | None = None
    caption_column: str | None = None
    cache: Cache | None = None


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
            or Parquet files with the pictures inside, ``demo``. A folder is one of tars or Arrow files only where no
            picture lies in it or below it.
        options: How; None takes the defaults.
    """
    options = options or ScanOptions()
    name, exclude = source_name(spec), options.exclude
    path, image = Path(name), options.image_column or "filepath"
    has_pictures = path.is_dir() and next(Folder(path, exclude).scan(), None) is not None
    kind, files = ("folder", [path]) if has_pictures else look_up(name, image)
    match kind:
        case "elsewhere":
            remote = open_remote(name, options.cache or Cache())
            twice, count = Counter(remote.shard_names).most_common(1)[0]
            if count > 1:  # pictures are called by these names
                raise InputError(f"{name}: {count:,} shards are called {twice}; index each folder by itself")
            return Tars(name, remote, exclude)
        case "tars":
            return Tars(name, files, exclude)
        case "rows":
            return Inside(name, files, options.image_column, options.caption_column, exclude, options.cache)
        case "table":
            return Table(path, image, options.caption_column, exclude)
    metadata = metadata_of(path)
    return Folder(path, exclude, Rows(metadata[0], FILE_COLUMN, options.caption_column) if metadata else None)


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
                self._open[source] = open_named(source)
            return self._open[source]


def _read(collection: Collection, path: str, content: str) -> bytes:
    found = collection.find(path)
    if found is None:
        raise BadSample("missing image", path, f"not in {collection.name} any more")
    return _as_indexed(collection.read(found, content), path, content)


def _as_indexed(data: bytes, path: str, content: str) -> bytes:
    """Refuses what an index does not name, whatever lies there now."""
    if hashlib.sha256(data).hexdigest() != content:
        raise InputError(f"{path}: has changed since it was indexed; `cloob index` looks again")
    return data
