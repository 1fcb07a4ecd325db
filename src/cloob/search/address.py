"""Where the index of a folder lies."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from cloob.cache import cache_root
from cloob.search import database
from cloob.search.records import INDEX_FILE


def is_there(address: str | Path) -> bool:
    """Whether a folder holds an index."""
    return (Path(address) / INDEX_FILE).is_file()


def place_of(folder: Path) -> Path:
    """Where `cloob find` keeps the index of a folder: in it, or in the cache where that
    cannot be written.
    """
    place = folder / ".cloob"
    if is_there(place) or os.access(place if place.exists() else folder, os.W_OK):
        return place
    real = folder.resolve()
    name = re.sub(r"[^\w.-]", "_", real.name)[:200]
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    return cache_root() / "photos" / f"{name}-{digest}"


def find_index(typed: str) -> tuple[str, str | None]:
    """The address of an index that is typed, or kept by `cloob find` of a folder or of
    one above it, and its filter.
    """
    folder = Path(os.path.abspath(typed))  # noqa: PTH100
    if is_there(typed) or not folder.is_dir():
        return typed, None
    for above in (folder, *folder.parents):
        if is_there(place := place_of(above)):
            quoted = str(folder).replace("'", "''")
            return (
                str(place),
                None
                if above == folder
                else f"path >= '{quoted}/' and path < '{quoted}0'",
            )
    return typed, None


def remove(address: str) -> None:
    """Deletes an index, one that cannot be opened as well, and nothing else in its
    place.
    """
    database.remove(Path(address))
