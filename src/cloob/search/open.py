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
        create: Make it; else it has to be there. In a database one that is there is opened.

    Raises:
        InputError: There is none, or there is one where it is to be made, or it is not to be read.
    """
    if is_database(address):
        home = importlib.import_module("cloob.search.postgres.store")  # psycopg is an extra
        store: Store = home.PostgresStore(str(address), writable=writable, create=create)
        return store
    return SqliteStore.create(Path(address)) if create else SqliteStore(Path(address), writable=writable)


def is_database(address: str | Path) -> bool:
    """Whether an address is one of a PostgreSQL server."""
    return str(address).startswith(_POSTGRES)


def is_there(address: str | Path) -> bool:
    """Whether an address names an index; of a database only that it is one."""
    return is_database(address) or (Path(address) / FILE).is_file()
