"""The SQLite file of an index, opened with care, as it may be a stranger's.

A file from somebody else is data: its tables have to be exactly those that are made
here, so that no view, trigger or generated column in it is ever run. Functions in its
schema are not trusted, and no extension is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cloob.errors import InputError, message, printable, require
from cloob.models.source import PHOTOS
from cloob.search.records import INDEX_FILE, Busy
from cloob.search.where import SCHEMA

FORMAT = 11  # the number of these tables
APPLICATION_ID = 0x434C4F42  # "CLOB"
PATIENCE_SECONDS = 60.0  # of a writer for another one; a batch takes a part of a second
# seven vectors of width 512; of SQLite's default, 4,096, each would fill one, half of
# it empty
_PAGE_BYTES = 16_384
_HEADER = b"SQLite format 3\0"
_ID_OFFSET = 68  # of the application id, in the header of a file
_MESSAGES = {
    "SQLITE_CANTOPEN": "holds no index, or one that may not be read",
    "SQLITE_BUSY": "another process has been writing for 60 s; wait until it is done",
    "SQLITE_READONLY": (
        "this index may not be written; check the permissions of the folder and its"
        " files"
    ),
    "SQLITE_FULL": "the disk is full; what was written before stays",
}
_SOURCE_COLUMNS = ("base", "path", "source")  # where formats have kept a source
_SETTINGS = ("trusted_schema = OFF", "cache_size = -65536")
# Tables, columns and indices of a database.
_SHAPE = """SELECT s.type, s.name, coalesce(a.name, b.name), a.type, a."notnull", a.pk,
a.hidden FROM sqlite_schema s
LEFT JOIN pragma_table_xinfo(s.name) a ON s.type = 'table'
LEFT JOIN pragma_index_xinfo(s.name) b ON s.type = 'index'"""


class Database:
    """Any number of processes may read while one writes; threads use one connection in
    turn.
    """

    def __init__(
        self, folder: Path, *, writable: bool = False, create: bool = False
    ) -> None:
        """Opens the index of a folder, or makes a missing one."""
        self.address = str(folder)
        self.around = _around(folder)  # where a moved index looks for its pictures
        self.writable = writable or create
        self.path = folder / INDEX_FILE
        self._lock = threading.RLock()
        self._update_lock: Any = None
        with _one_line(self.path):
            if create and not self.path.exists():
                _make(folder)
            self._open()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """The connection, in one thread at a time; a reader without locks does not see
        changes, and opens it anew.
        """
        with self._lock, _one_line(self.path):
            if self._unlocked is not None and self._unlocked != self._state():
                self._connection.close()
                self._open()
            yield self._connection

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Runs a statement; a list among its values is JSON for ``json_each``."""
        bound = [
            json.dumps(value) if isinstance(value, list) else value for value in values
        ]
        with self.using() as connection:
            return connection.execute(statement, bound).fetchall()

    def many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Runs a statement for every row of values."""
        with self.using() as connection:
            connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing; one writer at a time."""
        with self.using() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own that cannot write."""
        with _one_line(self.path):
            mode = "ro" if self._unlocked is None else "ro&immutable=1"
            with closing(self._connect(mode)) as connection:
                yield connection

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other process updates meanwhile, or ``Busy``."""
        if self._update_lock is None:
            self._update_lock = _lock_of(self.path)
        with _acquired(self._update_lock, self.path.parent):
            yield

    def _open(self) -> None:
        """Connects; refuses other formats, and a database with other tables than ours.

        Who may read the file and not the folder has no locks, and reads it as it is.
        """
        self._unlocked: tuple[int, int, bool] | None = None
        _refuse_companions(self.path.resolve())
        try:
            self._connection = self._connect("rw" if self.writable else "ro")
        except sqlite3.OperationalError:
            if self.writable or not os.access(self.path, os.R_OK) or self._state()[2]:
                raise
            self._connection = self._connect("ro&immutable=1")
            self._unlocked = self._state()
        _check(self._connection, self.path)
        if self.writable:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def _connect(self, mode: str) -> sqlite3.Connection:
        """A connection to the file that is known to be a database."""
        connection = sqlite3.connect(
            f"file:{quote(str(self.path.absolute()))}?mode={mode}",
            uri=True,
            timeout=PATIENCE_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            for setting in (*_SETTINGS, "schema_version"):
                connection.execute(f"PRAGMA {setting}").fetchone()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _state(self) -> tuple[int, int, bool]:
        """Changes when the file is written."""
        file = self.path.stat()
        has_log = self.path.with_name(f"{INDEX_FILE}-wal").exists()
        return file.st_mtime_ns, file.st_size, has_log


def is_index(file: Path) -> bool:
    """Whether a file is an index of cloob's, by its first bytes."""
    try:
        with file.open("rb") as opened:
            header = opened.read(_ID_OFFSET + 4)
    except OSError:
        return False
    mark = APPLICATION_ID.to_bytes(4, "big")
    return header.startswith(_HEADER) and header[_ID_OFFSET:] == mark


def mend(folder: Path) -> str:
    """The command that makes an index anew that cannot be read, as far as it says from
    what it was made.
    """
    sources, models = _salvage(folder)
    is_of_find = folder.name == ".cloob"
    if not sources and is_of_find:
        sources = [str(folder.parent)]
    if not models and is_of_find:
        models = [PHOTOS[0].name]
    words = ["cloob", "index", *(sources or ["SRC"])]
    words += ["--model", *(models[:1] or ["MODEL"]), "--out", str(folder), "--anew"]
    command = f"make it again: {printable(shlex.join(words))}"
    if sources and models:
        return command
    return f"{command} (it does not say any more of what it was made)"


def remove(folder: Path) -> None:
    """Deletes an index's files, whatever is in them, and nothing else in its place."""
    path = folder / INDEX_FILE
    if not folder.is_dir():
        return
    with _acquired(_lock_of(path), folder):
        for file in [*folder.glob(f"{INDEX_FILE}*"), *folder.glob("vectors-*.f32")]:
            if file.name != f"{INDEX_FILE}.lock":
                file.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Makes an empty database, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / INDEX_FILE
    temporary = folder / f".tmp-{secrets.token_hex(8)}"
    with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
        connection.executescript(
            f"PRAGMA page_size = {_PAGE_BYTES};"
            f"PRAGMA application_id = {APPLICATION_ID};"
            f"PRAGMA user_version = {FORMAT};"
            f"BEGIN; {SCHEMA}; COMMIT; PRAGMA journal_mode = WAL"
        )
    try:
        os.link(temporary, path)
    except OSError:  # another process has made it meanwhile, or the disk has no links
        if not path.exists():
            temporary.rename(path)
    temporary.unlink(missing_ok=True)


def _refuse_companions(path: Path) -> None:
    """Refuses what leads SQLite out of the folder: links, and a journal, which names
    files to delete.
    """
    for suffix in ("-journal", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        if file.is_symlink():
            raise InputError(f"{file}: no index has a link; remove it")
        if suffix == "-journal" and file.exists():
            raise InputError(f"{file}: no index has a journal; remove it")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuses a database that is no index of this format."""
    application, number = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise InputError(f"{path}: is no index of cloob's")
    if number > FORMAT:
        raise InputError(
            f"{path.parent}: is of format {number}, of a newer cloob; this one reads"
            f" {FORMAT}"
        )
    if number < FORMAT:
        raise InputError(
            f"{path.parent}: is of format {number}, which this cloob does not read;"
            f" {mend(path.parent)}"
        )
    with closing(sqlite3.connect(":memory:")) as memory:
        memory.executescript(SCHEMA)
        ours = set(memory.execute(_SHAPE))
    for kind, name, *_ in sorted(ours ^ set(connection.execute(_SHAPE)), key=str):
        raise InputError(
            f"{path}: is no index of cloob's: {kind} {name!r} is not as it makes it"
        )


def _salvage(folder: Path) -> tuple[list[str], list[str]]:
    """The sources and the models that a damaged or an old index still names."""
    sources: list[str] = []
    models: list[str] = []
    address = f"file:{quote(str((folder / INDEX_FILE).absolute()))}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error, OSError),
        closing(sqlite3.connect(address, uri=True)) as damaged,
    ):
        for setting in ("trusted_schema = OFF", "writable_schema = ON"):
            damaged.execute(f"PRAGMA {setting}")  # reads a file that is cut
        specs = damaged.execute("SELECT spec FROM cloob_models ORDER BY id")
        models += [str(spec) for (spec,) in specs]
        damaged.row_factory = sqlite3.Row
        for row in map(dict, damaged.execute("SELECT * FROM cloob_sources")):
            parts = [row[name] for name in _SOURCE_COLUMNS if row.get(name)]
            sources.append(os.path.join(_around(folder), *parts))  # noqa: PTH118
    return sources, models


def _around(folder: Path) -> str:
    """The folder that an index lies in."""
    return os.path.dirname(os.path.abspath(folder))  # noqa: PTH100, PTH120


def _lock_of(path: Path) -> Any:
    return require("filelock", "train").FileLock(f"{path}.lock")


@contextmanager
def _acquired(lock: Any, folder: Path) -> Iterator[None]:
    """While no other process updates the index of a folder."""
    try:
        acquired = lock.acquire(0)
    except require("filelock", "train").Timeout:
        raise Busy(
            f"another `cloob index` is at work on {folder}; wait until it is done"
        ) from None
    except OSError:
        raise InputError(
            f"{folder}: this index may not be written; check its permissions"
        ) from None
    with acquired:
        yield


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turns errors of SQLite and of the system into InputError, with the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise InputError(f"{path}: {_why(error, path)}") from None


def _why(error: Exception, path: Path) -> str:
    """What an error of SQLite means, in a sentence."""
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return f"is damaged; {mend(path.parent)}"
    for start, sentence in _MESSAGES.items():
        if code.startswith(start):
            return sentence
    return message(error)
