"""Where the index of a folder lies."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from cloob.cache import cache_root
from cloob.search.database import is_there


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


def find_index(typed: str) -> str:
    """The folder of the index that is meant: typed, or kept by `cloob find` of the
    folder that is typed.
    """
    folder = Path(typed)
    if is_there(folder) or not folder.is_dir():
        return typed
    place = place_of(folder.absolute())
    return str(place) if is_there(place) else typed
