"""From what a user writes to a collection of pictures."""

from __future__ import annotations

import os
from pathlib import Path

from cloob.data.open import DEMO, DEMO_SPLITS, look_up
from cloob.data.shards.spec import is_pattern, is_remote, local_path
from cloob.data.source import IMAGE_SUFFIXES
from cloob.data.sources.tables import FILE_COLUMN, metadata_of
from cloob.errors import InputError
from cloob.search.scan.collection import Collection, ScanOptions
from cloob.search.scan.container import Containers
from cloob.search.scan.folder import Folder
from cloob.search.scan.table import Table


def source_name(spec: str | Path) -> str:
    """What an index calls a source: its absolute path."""
    text = str(spec)
    if is_remote(text):
        raise InputError(f"{text}: is an address; an index is of files of this machine")
    if text in DEMO_SPLITS:
        return str(DEMO / DEMO_SPLITS[text])
    return os.path.abspath(local_path(text))  # noqa: PTH100


def open_collection(spec: str | Path, options: ScanOptions | None = None) -> Collection:
    """Opens a folder of pictures, a picture, a table of pictures, or tars, Arrow or
    Parquet files with pictures inside, one or a folder of them.
    """
    options = options or ScanOptions()
    name = source_name(spec)
    path = Path(name)
    if is_pattern(name) and not path.exists():
        raise InputError(f"{name}: no such file; a pattern without quotes is expanded")
    image = options.image_column or "filepath"
    kind, files = "folder", [path]
    if not (_is_picture(path) or has_pictures(path, options)):
        kind, files = look_up(name, image)
    if kind == "table":
        return Table(path, image, options)
    if kind == "folder":
        return _open_folder(path, options)
    if kind == "tars":
        _refuse_columns(name, options, has_captions=False)
    return Containers(name, files, options)


def _is_picture(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(IMAGE_SUFFIXES)


def has_pictures(path: Path, options: ScanOptions | None = None) -> bool:
    """Whether a path is a folder with a picture in it or below it."""
    exclude = options.exclude if options else ()
    return path.is_dir() and any(True for _ in Folder(path, exclude).scan())


def _open_folder(path: Path, options: ScanOptions) -> Folder:
    """A folder of pictures, with the table of metadata if it has one."""
    metadata = metadata_of(path) if path.is_dir() else None
    _refuse_columns(str(path), options, has_captions=metadata is not None)
    table = None
    if metadata is not None:
        of_captions = ScanOptions(caption_column=options.caption_column)
        table = Table(metadata, FILE_COLUMN, of_captions)
    return Folder(path, options.exclude, table)


def _refuse_columns(name: str, options: ScanOptions, *, has_captions: bool) -> None:
    """Raises InputError for columns of a source that has none."""
    if options.image_column is not None:
        raise InputError(f"{name}: is no table; --image-column names nothing in it")
    if options.caption_column is not None and not has_captions:
        raise InputError(f"{name}: is no table; --caption-column names nothing in it")
