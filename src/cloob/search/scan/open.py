"""From what a user writes to a collection of pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cloob.cache import Cache
from cloob.data.shards.spec import is_remote, local_path
from cloob.errors import InputError
from cloob.search.scan.collection import Collection
from cloob.search.scan.folder import Folder
from cloob.search.scan.rows import find_described


@dataclass(frozen=True)
class ScanOptions:
    """How sources are read.

    Attributes:
        exclude: Globs; what matches one, below its source or in a part of its path, is left out.
        image_column: Column of a table with the picture or its path; None: ``filepath``, or the only one of pictures.
        caption_column: Column with the caption; None: ``title``, ``caption`` or ``text``.
        cache: Where streamed shards are kept; None: ``Cache()``.
    """

    exclude: tuple[str, ...] = ()
    image_column: str | None = None
    caption_column: str | None = None
    cache: Cache | None = None


def source_name(spec: str | Path) -> str:
    """What an index calls a source: an absolute path, or an address as it is written."""
    text = str(spec)
    if is_remote(text):
        return text
    return os.path.abspath(local_path(text))  # noqa: PTH100 - links in it stay


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
    path = Path(source_name(spec))
    if path.is_dir():
        return Folder(path, options.exclude, find_described(path, options.caption_column))
    raise InputError(f"{spec}: no such file or folder")
