"""Which store keeps an index, by its address."""

from __future__ import annotations

import importlib
from pathlib import Path

from cloob.search.sqlite.file import FILE
from cloob.search.sqlite.store import SqliteStore
from cloob.search.store import Store

_POSTGRES = ("postgresql://", "postgres://")


def open_store(address: str | Path, *, writable: bool = False, create: bool = False) -> Store:
    """Opens what keeps an index.

    Args:
        address: A folder, or ``postgresql://…``.
        writable: Whether it is going to be changed.
        create: Make it; else it has to be there.

    Raises:
        InputError: There is none, or there is one where it is to be made, or it is not to be read.
    """
    if str(address).startswith(_POSTGRES):
        store: Store = importlib.import_module("cloob.search.postgres").PostgresStore(str(address), create=create)
        return store
    return SqliteStore.create(Path(address)) if create else SqliteStore(Path(address), writable=writable)


def is_there(address: str | Path) -> bool:
    """Whether an address names an index; of a database only that it is one."""
    return str(address).startswith(_POSTGRES) or (Path(address) / FILE).is_file()
