"""From what a user writes to a collection of pictures."""

from __future__ import annotations

import os
from pathlib import Path

from cloob.data.shards.spec import is_remote
from cloob.data.source import IMAGE_SUFFIXES
from cloob.data.sources.tables import TABLE_SUFFIXES, column_names
from cloob.errors import InputError
from cloob.search.scan.collection import Collection, ScanOptions
from cloob.search.scan.folder import Folder
from cloob.search.scan.table import Table

_FILE_COLUMN = "file_name"  # pictures in an imagefolder's table


def source_name(spec: str | Path) -> str:
    """What an index calls a source: its absolute path."""
    text = str(spec)
    if is_remote(text):
        raise InputError(f"{text}: is an address; an index is of files of this machine")
    return os.path.abspath(Path(text).expanduser())  # noqa: PTH100


def open_collection(spec: str | Path, options: ScanOptions | None = None) -> Collection:
    """Opens a folder of pictures, a picture, or a table of pictures."""
    options = options or ScanOptions()
    path = Path(source_name(spec))
    suffix = path.suffix.lower()
    if path.is_file() and suffix in TABLE_SUFFIXES:
        return Table(path, options.image_column or "filepath", options)
    if path.is_dir() or (path.is_file() and suffix in IMAGE_SUFFIXES):
        return _open_folder(path, options)
    why = "no such file or folder"
    if path.exists():
        why = "is no folder, picture or table of pictures; unpack a tar or shards first"
    raise InputError(f"{path}: {why}")


def has_pictures(path: Path) -> bool:
    """Whether a path is a folder with a picture in it or below it."""
    return path.is_dir() and any(True for _ in Folder(path).scan())


def _open_folder(path: Path, options: ScanOptions) -> Folder:
    """A folder of pictures, with the table of metadata if it has one."""
    metadata = _metadata_of(path) if path.is_dir() else None
    if options.image_column is not None:
        raise InputError(f"{path}: is no table; --image-column names nothing in it")
    if metadata is None:
        if options.caption_column is not None:
            raise InputError(
                f"{path}: is no table; --caption-column names nothing in it"
            )
        return Folder(path)
    return Folder(path, Table(metadata, _FILE_COLUMN, options))


def _metadata_of(folder: Path) -> Path | None:
    """The table of a Hugging Face imagefolder."""
    for path in (folder / "metadata.csv", folder / "metadata.jsonl"):
        if path.is_file() and _FILE_COLUMN in column_names(path, (_FILE_COLUMN,)):
            return path
    return None
