"""From what a user writes to a collection of pictures."""

from __future__ import annotations

import glob
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cloob.cache import Cache
from cloob.data.batch import BadSample
from cloob.data.open import DEMO, DEMO_SPLITS
from cloob.data.shards.paths import is_pattern, listed_shards, matching_files, tars_in
from cloob.data.shards.remote import open_remote
from cloob.data.shards.spec import expand, is_remote, local_path
from cloob.data.shards.tar import TAR_SUFFIXES, is_tar
from cloob.data.sources.arrow import ARROW_SUFFIXES, arrow_files, holds_images
from cloob.data.sources.table import TABLE_SUFFIXES
from cloob.errors import InputError
from cloob.search.scan.collection import SEPARATOR, Collection, ReadFailed, read_regular
from cloob.search.scan.folder import Folder
from cloob.search.scan.inside import Inside, holds_pictures
from cloob.search.scan.rows import find_described
from cloob.search.scan.shards import Shard, Shards
from cloob.search.scan.tables import Table
from cloob.search.trust import check_typed, was_typed


@dataclass(frozen=True)
class ScanOptions:
    """How sources are read.

    Attributes:
        exclude: Globs; what matches one, below its source or in a part of its path, is left out. An index remembers
            them with the source: none are those of before, an empty one clears them.
        image_column: Column of a table with the picture or its path; None: ``filepath``, or the only one of pictures.
        caption_column: Column with the caption; None: ``title``, ``caption`` or ``text``.
        cache: Where streamed shards are kept; None: ``Cache()``.
        any_column: Of Arrow and Parquet files: see :class:`cloob.search.scan.inside.Inside`.
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

    Args:
        name: The source.
        typed: Whether it was typed now. No file is looked for by a pattern that never was.
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

    Raises:
        InputError: There is no such thing, or it is none of these.
    """
    options = options or ScanOptions()
    text, name = str(spec), source_name(spec)
    if text in DEMO_SPLITS:
        return _shards(text, tars_in(DEMO / DEMO_SPLITS[text]), options)
    if is_remote(text):
        return _streamed(text, options)
    path = Path(name)
    if path.is_dir():
        return _folder(path, options)
    pattern = is_pattern(name) and not path.exists()
    if not pattern and not path.exists():
        raise InputError(f"{spec}: no such file or folder")
    suffix = path.suffix.lower()
    inside = suffix == ".parquet" and (options.any_column or holds_images(path, _image(options)))
    if not pattern and (suffix == ".arrow" or inside):
        return _inside(name, [path], options)
    if not pattern and suffix in TABLE_SUFFIXES:
        return Table(path, _image(options), options.caption_column, options.exclude)
    paths = listed_shards(path) if suffix == ".json" and not pattern else [path]
    paths = matching_files(name) if pattern else paths
    if all(file.suffix.lower() in ARROW_SUFFIXES for file in paths):
        return _inside(name, paths, options)
    if not all(is_tar(file) for file in paths):
        kinds = f"a table ({', '.join(TABLE_SUFFIXES)}) or a tar ({', '.join(TAR_SUFFIXES)})"
        raise InputError(f"{spec}: a folder of pictures, {kinds} is wanted")
    return _shards(name, paths, options)


def open_named(name: str, options: ScanOptions | None = None) -> Collection:
    """Opens a source that an index names and nobody has typed now; see ``open_collection``.

    Raises:
        InputError: As there, or it is an address or a pattern that was never typed on this machine.
    """
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
        """The bytes of a picture's file.

        Args:
            source: The item's.
            path: The item's.
            content: The item's.

        Raises:
            BadSample: It is not there any more, or cannot be read now.
            InputError: It holds something else by now, or its source cannot be opened.
        """
        if SEPARATOR not in path or os.path.isfile(path):  # noqa: PTH113
            return _as_indexed(read_regular(path), path, content)
        collection = self._opened(source)
        try:
            return _as_indexed(_read(collection, path, content), path, content)
        except ReadFailed:  # nothing says that it has changed
            raise
        except (BadSample, InputError):
            collection = self._opened(source, stale=collection)
        return _as_indexed(_read(collection, path, content), path, content)

    def _opened(self, source: str, stale: Collection | None = None) -> Collection:
        """A source, opened anew where it is not open or is the stale one."""
        with self._lock:
            if self._open.get(source) is stale:
                self._open[source] = open_named(source, ScanOptions(any_column=True))
            return self._open[source]


def _read(collection: Collection, path: str, content: str) -> bytes:
    found = collection.find(path) if isinstance(collection, Shards | Inside) else None
    if found is None:
        raise BadSample("missing image", path, f"not in {collection.name} any more")
    return collection.read_again(found, content) if isinstance(collection, Inside) else collection.read(found)


def _as_indexed(data: bytes, path: str, content: str) -> bytes:
    """Refuses what an index does not name, whatever lies there now."""
    if hashlib.sha256(data).hexdigest() != content:
        raise InputError(f"{path}: has changed since it was indexed; `cloob index` looks again")
    return data


def _image(options: ScanOptions) -> str:
    return options.image_column or "filepath"


def _folder(path: Path, options: ScanOptions) -> Collection:
    """A folder of pictures; of tars or Arrow files where no picture lies in it or below it."""
    pictures = next(Folder(path, options.exclude).scan(), None) is not None
    if not pictures and (tars := tars_in(path)):
        return _shards(str(path), tars, options)
    files = [] if pictures else arrow_files(path)
    if files and (options.any_column or holds_pictures(files[0], options.image_column)):
        return _inside(str(path), files, options)
    return Folder(path, options.exclude, find_described(path, options.caption_column))


def _inside(name: str, files: Sequence[Path], options: ScanOptions) -> Inside:
    columns = (options.image_column, options.caption_column)
    return Inside(name, files, *columns, options.exclude, any_column=options.any_column)


def _shards(name: str, paths: Sequence[Path], options: ScanOptions) -> Shards:
    shards = [Shard(str(path), partial(Path, path), local=True) for path in paths]
    return Shards(name, shards, options.exclude)


def _streamed(spec: str, options: ScanOptions) -> Shards:
    source = open_remote(spec, options.cache or Cache())
    names = source.shard_names
    for name, count in Counter(names).most_common(1):
        if count > 1:  # pictures are called by these names
            raise InputError(f"{spec}: {count:,} shards are called {name}; index each folder by itself")
    shards = [
        Shard(name, partial(source.fetch_shard, i), local=False, samples=count)
        for i, (name, count) in enumerate(zip(names, source.shard_sizes, strict=True))
    ]
    return Shards(spec, shards, options.exclude)
