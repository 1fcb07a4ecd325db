"""An index in one folder: a SQLite file is the truth, matrices next to it are caches for searching.

A file from somebody else is data: its tables have to be exactly those that are made here, so that no view, trigger or
generated column in it is ever run, functions in its schema are not trusted, and no extension is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from cloob.errors import InputError, message, require
from cloob.search.matrix import Matrix
from cloob.search.records import INDEX_FILE, Busy, IndexedModel
from cloob.search.store import FORMAT, TABLES, Neighbours, Store, Vectors, VectorTable, anew, check_format
from cloob.search.where import SQLITE, Filter

PATIENCE_SECONDS = 60.0  # for which a writer waits for another one; a batch takes a fraction of a second
_APPLICATION = 0x434C4F42  # "CLOB"
_PAGE_BYTES = 16_384  # seven vectors of width 512; of SQLite's default, 4,096, each would fill one, half of it empty
_TABLES = TABLES.format(**SQLITE["types"])


class SqliteStore(Store):
    """Any number of processes may read while one writes; threads use one connection in turn."""

    _among = SQLITE["among"]

    def __init__(
        self,
        folder: Path,
        *,
        writable: bool = False,
        create: bool = False,
        table: Callable[[SqliteStore], VectorTable] | None = None,
    ) -> None:
        """Opens the index of a folder, or makes a missing one; ``table`` keeps its vectors in place of the database."""
        self.address, self.writable = str(folder), writable or create
        self.path, self._folder = folder / INDEX_FILE, os.path.abspath(folder)  # noqa: PTH100 - links in it stay
        self._above = os.path.dirname(self._folder)  # noqa: PTH120
        quoted = self._above.translate({ord(sign): 2 * sign for sign in "'{}"})
        self._dialect = SQLITE | {"place": SQLITE["place_in"].replace("ABOVE", quoted), "above": self._above}
        self._lock = threading.RLock()
        self._busy: Any = None  # the lock of updates
        self.table = (table or FlatVectors)(self)
        with _one_line(self.path):
            if create:
                folder.mkdir(parents=True, exist_ok=True)
                if not self.path.exists():
                    self._create(folder / f".tmp-{secrets.token_hex(8)}")
            self._open()

    def _create(self, temporary: Path) -> None:
        """Makes an empty index, completely or not at all."""
        with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.executescript(
                f"PRAGMA page_size = {_PAGE_BYTES}; PRAGMA application_id = {_APPLICATION};"
                f"PRAGMA user_version = {FORMAT}; BEGIN; {_TABLES}; COMMIT; PRAGMA journal_mode = WAL"
            )
        try:
            os.link(temporary, self.path)
        except OSError:  # another process has made it meanwhile, or this disk has no links
            if not self.path.exists():
                temporary.rename(self.path)
        temporary.unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """The connection, in one thread at a time; a reader without locks does not see changes, and opens it anew."""
        with self._lock, _one_line(self.path):
            if self._unlocked is not None and self._unlocked != self._state():
                self._connection.close()
                self._open()
            yield self._connection

    def _open(self) -> None:
        """Connects; refuses what leads SQLite out of the folder: links, and a journal, which names files to delete."""
        path = self.path.resolve()
        for file, suffix in ((path.with_name(path.name + suffix), suffix) for suffix in ("-journal", "-wal", "-shm")):
            if file.is_symlink() or (suffix == "-journal" and file.exists()):
                raise InputError(f"{file}: no index has a {'link' if file.is_symlink() else 'journal'}; remove it")
        address = f"file:{quote(str(self.path.absolute()))}?mode={'rw' if self.writable else 'ro'}"
        self._unlocked: tuple[int, int, bool] | None = None
        try:
            self._connection = self._connect(address)
        except sqlite3.OperationalError:
            if self.writable or not os.access(self.path, os.R_OK) or self._state()[2]:
                raise
            self._connection, self._unlocked = self._connect(f"{address}&immutable=1"), self._state()
        self._check()
        for setting in ("journal_mode = WAL", "synchronous = NORMAL") if self.writable else ():
            self._connection.execute(f"PRAGMA {setting}")

    def _connect(self, address: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            address, uri=True, timeout=PATIENCE_SECONDS, isolation_level=None, check_same_thread=False
        )
        for setting in ("trusted_schema = OFF", "foreign_keys = ON", "cache_size = -65536", "schema_version"):
            connection.execute(f"PRAGMA {setting}").fetchone()
        connection.create_function("cloob_lower", 1, lambda text: text and text.lower(), deterministic=True)
        connection.create_function("cloob_place", 1, self._full, deterministic=True)
        return connection

    def _check(self) -> None:
        """Refuses other formats, and a database with more than our tables."""
        path, connection = self.path, self._connection
        names = ("application_id", "user_version")
        application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        if application != _APPLICATION:
            raise InputError(f"{path}: is no index of cloob's")
        check_format(self.address, version)
        with closing(sqlite3.connect(":memory:")) as memory:
            memory.executescript(_TABLES)
            odd = sorted(set(memory.execute(SQLITE["shape"])) ^ set(connection.execute(SQLITE["shape"])), key=str)
        if odd:
            raise InputError(f"{path}: is no index of cloob's: {odd[0][0]} {odd[0][1]!r} is not as it makes it")

    def _state(self) -> tuple[int, int, bool]:
        """Changes when the file is written."""
        file = self.path.stat()
        return file.st_mtime_ns, file.st_size, self.path.with_name(f"{INDEX_FILE}-wal").exists()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._busy = self._busy or require("filelock", "train").FileLock(f"{self.path}.lock")
        with _acquired(self._busy, self.path.parent):
            yield

    def _stored(self, source: str, path: str = "") -> tuple[str, str]:
        if not self._folder.startswith(f"{source}/"):
            return source, path
        up = "/".join([".."] * self._folder[len(source) :].count("/"))
        return up, f"{up}{path[len(source) :]}" if path.startswith(f"{source}/") else path

    def _full(self, stored: str) -> str:
        if stored.startswith("../") and not stored.startswith("../."):
            return f"{self._above}{stored[2:]}"
        folder, below = self._folder, stored
        while below == ".." or below.startswith("../"):
            folder, below = os.path.dirname(folder), below[3:]  # noqa: PTH120
        return stored if below is stored else f"{folder}/{below}".removesuffix("/")

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        values = [json.dumps(value) if isinstance(value, list) else value for value in values]
        with self.using() as connection:
            return connection.execute(statement, values).fetchall()

    def _many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        with self.using() as connection:
            connection.executemany(statement, rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self.using() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield

    def _decode(self, cells: list[Any], dim: int) -> Vectors:
        if any(len(cell) != 4 * dim for cell in cells):
            raise InputError(f"{self.path}: is damaged (a vector is not of width {dim}); {anew(self.address)}")
        return np.frombuffer(b"".join(cells), "<f4").reshape(-1, dim)


class FlatVectors(VectorTable):
    """Vectors in SQLite, and a matrix of every model next to it."""

    store: SqliteStore

    def __init__(self, store: SqliteStore) -> None:
        super().__init__(store)
        self._matrices: dict[int, Matrix] = {}

    def nearest(self, model: IndexedModel, query: Vectors, top: int, where: Filter | None) -> Neighbours:
        return self._matrix(model).nearest(query, top, None if where is None else self.store.ids(where))

    def optimise(self) -> None:
        """Writes anew the matrices that do not fit."""
        for model in self.store.models():
            self._matrix(model).parts(few=0)

    def drop(self, model: IndexedModel) -> None:
        self._matrices.pop(model.number, None)
        for path in self.store.path.parent.glob(f"vectors-{model.number}-*"):
            path.unlink(missing_ok=True)

    def _matrix(self, model: IndexedModel) -> Matrix:
        return self._matrices.setdefault(model.number, Matrix(self.store, model))


def remove(folder: Path) -> None:
    """Deletes an index's files, whatever is in them."""
    path = folder / INDEX_FILE
    if folder.is_dir():
        with _acquired(require("filelock", "train").FileLock(f"{path}.lock"), folder):
            for file in [*folder.glob(f"{INDEX_FILE}*"), *folder.glob("vectors-*.f32")]:
                if file.name != f"{INDEX_FILE}.lock":
                    file.unlink(missing_ok=True)


@contextmanager
def _acquired(lock: Any, folder: Path) -> Iterator[None]:
    """While no other process updates the index of a folder."""
    locks = require("filelock", "train")
    try:
        acquired = lock.acquire(0)
    except locks.Timeout:
        raise Busy(f"another `cloob index` is at work on {folder}; wait until it is done") from None
    except OSError:
        raise InputError(f"{folder}: this index may not be written; check its permissions") from None
    with acquired:
        yield


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turns errors of SQLite and of the system into InputError, with the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        code = getattr(error, "sqlite_errorname", "")
        why = next((line for start, line in SQLITE["messages"].items() if code.startswith(start)), message(error))
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            why = f"is damaged{_what_is_left(path)}; {anew(str(path.parent))}"
        raise InputError(f"{path}: {why}") from None


def _what_is_left(path: Path) -> str:
    """How much of a damaged database can still be read."""
    counts = {"cloob_items": 0, "cloob_vectors": 0}
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(address, uri=True)) as damaged:
        for setting in ("trusted_schema = OFF", "writable_schema = ON"):  # which reads a file that is cut
            damaged.execute(f"PRAGMA {setting}")
        for table in counts:
            with contextlib.suppress(sqlite3.Error):
                for _ in damaged.execute(f"SELECT * FROM {table}"):
                    counts[table] += 1
    pictures, vectors = counts.values()
    return f"; {pictures:,} pictures and {vectors:,} vectors of it can be read" if pictures or vectors else ""
