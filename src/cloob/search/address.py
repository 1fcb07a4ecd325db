"""From an address to the store of an index: a folder, or a database."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import re
from pathlib import Path

from cloob.cache import cache_root
from cloob.errors import InputError
from cloob.search import sqlite
from cloob.search.records import INDEX_FILE, file_of
from cloob.search.sqlite import SqliteStore
from cloob.search.store import Store

_OTHER = re.compile(
    r"([A-Za-z_][\w.]*):([A-Za-z_]\w*):(.+)"
)  # MODULE:FUNCTION:ADDRESS of a store from elsewhere
_COMPARED = (
    200  # files that tell whether a folder is one that was indexed under another name
)


def is_database(address: str | Path) -> bool:
    """Whether an address is anything but a folder."""
    return bool(_OTHER.fullmatch(str(address))) or str(address).startswith(
        ("postgresql://", "postgres://")
    )


def is_there(address: str | Path) -> bool:
    """Whether an address names an index; of a database only that it is one."""
    return is_database(address) or (Path(address) / INDEX_FILE).is_file()


def open_store(
    address: str | Path, *, writable: bool = False, create: bool = False
) -> Store:
    """Opens a folder, a database, or what ``FUNCTION(ADDRESS, writable=…, create=…)``
    of a module gives.
    """
    if not is_database(address):
        return SqliteStore(Path(address), writable=writable, create=create)
    other = _OTHER.fullmatch(str(address))
    module, function, place = (
        other.groups()
        if other
        else ("cloob.search.postgres", "PostgresStore", str(address))
    )
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{address}: {error}; PYTHONPATH has to have its folder"
        ) from None
    store: Store = make(place, writable=writable, create=create)
    return store


def place_of(folder: Path) -> Path:
    """Where `cloob find` keeps the index of a folder: in it, or in the cache where that
    cannot be written.
    """
    place = folder / ".cloob"
    if is_there(place) or os.access(place if place.exists() else folder, os.W_OK):
        return place
    real = folder.resolve()
    name, digest = (
        re.sub(r"[^\w.-]", "_", real.name)[:200],
        hashlib.sha256(os.fsencode(real)).hexdigest()[:16],
    )
    return cache_root() / "photos" / f"{name}-{digest}"


def new_place(folder: Path) -> Path:
    """Where to make an index of a folder; one in the cache, of these files at a place
    that is gone, goes there.
    """
    place, name = place_of(folder), os.path.abspath(folder)  # noqa: PTH100
    others = place.parent.glob(f"*/{INDEX_FILE}") if place != folder / ".cloob" else ()
    for old in sorted(other.parent for other in others):
        with contextlib.suppress(InputError, OSError):
            with contextlib.closing(SqliteStore(old, writable=True)) as store:
                sources, items = (
                    store.sources(),
                    store.items(store.ids(limit=_COMPARED, order="chance")),
                )
                moved = [
                    dataclasses.replace(
                        item, path=name + item.path.removeprefix(item.source)
                    )
                    for item in items
                ]
                gone = sources == (name,) or not any(
                    os.path.lexists(item.path) for item in items
                )
                if (
                    len(sources) != 1
                    or not gone
                    or 2 * sum(map(bool, map(file_of, moved))) <= len(items)
                ):
                    continue
                if sources != (name,):
                    store.move(sources[0], name)
            old.rename(place)
    return place


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
    if _OTHER.fullmatch(address):
        raise InputError(f"{address}: is a custom store; delete it where it lies")
    if is_database(address):
        importlib.import_module("cloob.search.postgres").remove(address)
    else:
        sqlite.remove(Path(address))
