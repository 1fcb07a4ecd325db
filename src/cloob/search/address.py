"""From an address to the store of an index: a folder, or a database."""

from __future__ import annotations

import importlib
from pathlib import Path

from cloob.search.records import INDEX_FILE
from cloob.search.sqlite import SqliteStore
from cloob.search.store import Store


def is_database(address: str | Path) -> bool:
    return str(address).startswith(("postgresql://", "postgres://"))


def is_there(address: str | Path) -> bool:
    """Whether an address names an index; of a database only that it is one."""
    return is_database(address) or (Path(address) / INDEX_FILE).is_file()


def open_store(address: str | Path, *, writable: bool = False, create: bool = False) -> Store:
    if is_database(address):
        home = importlib.import_module("cloob.search.postgres")  # psycopg is an extra
        store: Store = home.PostgresStore(str(address), writable=writable, create=create)
        return store
    return SqliteStore.create(Path(address)) if create else SqliteStore(Path(address), writable=writable)
