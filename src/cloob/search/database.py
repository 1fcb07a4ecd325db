"""The SQLite file of an index, opened with care, as it may be a stranger's.

A file from somebody else is data: its tables have to be exactly those that are made
here, so that no view, trigger or generated column in it is ever run. Functions in its
schema are not trusted, and no extension is loaded.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cloob.errors import InputError, message, printable, require
from cloob.search.records import INDEX_FILE, Busy
from cloob.search.where import SCHEMA

FORMAT = 15  # the number of these tables
APPLICATION_ID = 0x434C4F42  # "CLOB"
PATIENCE_SECONDS = 60.0  # of a writer for another one; a batch takes a part of a second
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
_SHAPE = "SELECT type, name, sql FROM sqlite_schema"


class Database:
    """Any number of processes may read while one writes; threads use one connection in
    turn.
    """

    def __init__(
        self, folder: Path, *, writable: bool = False, create: bool = False
    ) -> None:
        """Opens the index of a folder, or makes a missing one."""
        self.address = str(folder)
        # where a moved index looks for its pictures
        self.around = os.path.dirname(os.path.abspath(folder))  # noqa: PTH100, PTH120
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
        """The connection, in one thread at a time."""
        with self._lock, _one_line(self.path):
            if self._unlocked and self._unlocked != self._state():
                self._connection.close()
                self._open()
            yield self._connection

    def rows(self, statement: str, values: Mapping[str, Any] | None = None) -> Any:
        """The rows of a statement; a list among its values is JSON for ``json_each``,
        and ``:around`` the folder around the index.
        """
        bound = {"around": self.around, **(values or {})}
        for name, value in bound.items():
            if isinstance(value, list):
                bound[name] = json.dumps(value)
        with self.using() as connection:
            return connection.execute(statement, bound).fetchall()

    def many(
        self, statement: str, rows: Iterable[Sequence[Any] | Mapping[str, Any]]
    ) -> None:
        """Runs a statement for every row of values."""
        with self.using() as connection:
            connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing, with a revision of its own; one writer at a time."""
        with self.using() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE cloob_state SET revision = revision + 1")
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
            self._update_lock = _lock_of(self.path.parent)
        with _acquired(self._update_lock, self.path.parent):
            yield

    def _open(self) -> None:
        """Connects; refuses other formats, and a database with other tables than ours.

        Who may read the file and not the folder has no locks: the file is read as it
        is, and opened anew when it was written.
        """
        self._unlocked: tuple[int, bool] | None = None
        _refuse_companions(self.path.resolve())
        try:
            self._connection = self._connect("rw" if self.writable else "ro")
        except sqlite3.OperationalError:
            written, has_log = self._state()
            if self.writable or has_log or not os.access(self.path, os.R_OK):
                raise
            self._connection = self._connect("ro&immutable=1")
            self._unlocked = written, has_log
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
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cache_size = -65536")
            connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _state(self) -> tuple[int, bool]:
        """Changes when the file is written."""
        has_log = self.path.with_name(f"{INDEX_FILE}-wal").exists()
        return self.path.stat().st_mtime_ns, has_log


def is_there(folder: str | Path) -> bool:
    """Whether a folder holds an index."""
    return (Path(folder) / INDEX_FILE).is_file()


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
    """What makes an index anew that cannot be read."""
    out = printable(shlex.quote(str(folder)))
    return f"make it again: cloob index SRC --model MODEL --out {out} --anew"


def remove(folder: Path) -> None:
    """Deletes an index's files, whatever is in them, and nothing else in its place."""
    if not folder.is_dir():
        return
    with _acquired(_lock_of(folder), folder):
        for file in [*folder.glob(f"{INDEX_FILE}*"), *folder.glob("vectors-*.f32")]:
            # while it is held: another process would take a new one
            if file.name != lock_file(folder).name:
                file.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Makes an empty database, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / INDEX_FILE
    temporary = folder / f".tmp-{secrets.token_hex(8)}"
    with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
        connection.executescript(
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
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (number,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise InputError(f"{path}: is no index of cloob's")
    if number != FORMAT:
        raise InputError(
            f"{path.parent}: is of format {number}, and this cloob reads {FORMAT};"
            f" {mend(path.parent)}"
        )
    with closing(sqlite3.connect(":memory:")) as memory:
        memory.executescript(SCHEMA)
        ours = set(memory.execute(_SHAPE))
    if connection.execute("SELECT count(*) FROM cloob_state").fetchone() != (1,):
        raise InputError(f"{path}: is damaged; {mend(path.parent)}")
    for kind, name, _ in sorted(ours ^ set(connection.execute(_SHAPE)), key=str):
        raise InputError(
            f"{path}: is no index of cloob's: {kind} {name!r} is not as it makes it"
        )


def lock_file(folder: Path) -> Path:
    """The file that who writes to an index locks."""
    return folder / f"{INDEX_FILE}.lock"


def _lock_of(folder: Path) -> Any:
    return require("filelock", "train").FileLock(lock_file(folder))


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
