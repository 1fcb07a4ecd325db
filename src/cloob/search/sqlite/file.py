"""The SQLite file of an index: its tables, and how it is opened when nobody knows who wrote it.

A file that somebody hands over is data. Its tables have to be exactly those that are made here, so that no view,
trigger or generated column of a stranger's is ever run; functions in it are not trusted; nothing in it may be larger
than ``MAX_BLOB`` whatever its length says; and no extension is loaded.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from cloob.errors import InputError
from cloob.files import open_regular

FILE = "index.sqlite"
"""Of an index, in its folder."""

APPLICATION = 0x434C4F42
"""SQLite's ``application_id`` of an index, "CLOB"."""

VERSION = 3
"""Of the tables; kept as ``user_version``."""

MAX_BLOB = 64 * 1024 * 1024
"""A value of more bytes is refused: far above the widest vector and the longest caption."""

PATIENCE_SECONDS = 60.0
"""So long a writer waits for another one; a batch takes a fraction of a second."""

_PAGE_BYTES = 16_384
"""Seven vectors of width 512 a page; of SQLite's own 4,096 each would fill one, half of it empty."""

SCHEMA = (
    "CREATE TABLE revisions(revision INTEGER PRIMARY KEY, stamp INTEGER NOT NULL) STRICT",
    "CREATE TABLE models(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,"
    " fingerprint TEXT NOT NULL, dim INTEGER NOT NULL) STRICT",
    "CREATE TABLE items(id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, path TEXT NOT NULL,"
    " content TEXT NOT NULL, bytes INTEGER NOT NULL, mtime_ns INTEGER, width INTEGER NOT NULL,"
    " height INTEGER NOT NULL, date TEXT, caption TEXT, columns TEXT NOT NULL, UNIQUE(source, path)) STRICT",
    "CREATE INDEX items_content ON items(content)",
    "CREATE TABLE vectors(item INTEGER NOT NULL, model INTEGER NOT NULL, revision INTEGER NOT NULL,"
    " vector BLOB NOT NULL, UNIQUE(item, model)) STRICT",
    "CREATE INDEX vectors_revision ON vectors(model, revision, item)",
    "CREATE TABLE faults(source TEXT NOT NULL, path TEXT NOT NULL, bytes INTEGER NOT NULL, mtime_ns INTEGER,"
    " fault TEXT NOT NULL, PRIMARY KEY(source, path)) STRICT, WITHOUT ROWID",
    "CREATE TABLE excludes(source TEXT NOT NULL, glob TEXT NOT NULL) STRICT",
)

_MAX_STATEMENT = 16_384
"""A value of more bytes is refused until the tables are known: no statement of ``SCHEMA`` is as long."""

_LOADING_SECONDS = 20.0
"""So long what a file defines may take to be looked at: SQLite itself reads some tables meanwhile."""

_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")
"""Ends a rollback journal that belongs to a journal over several files, which SQLite deletes wherever it lies."""


class BeingWritten(InputError):  # noqa: N818 - nothing is wrong with the file
    """Another process writes to a file that this one is not allowed to lock."""


class Connection(sqlite3.Connection):
    """A connection to the file of an index.

    Attributes:
        path: The file.
        seen: What the file was like when it was opened without locks, as one that nobody writes; None: it has locks.
    """

    path: Path
    seen: tuple[int, ...] | None = None

    def check(self) -> None:
        """Raises BeingWritten where what was read may be of two states of the file, as others write without waiting."""
        if self.seen is not None and _state(self.path) != self.seen:
            raise _being_written(self.path)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """What SQLite complains of, as one line that names the file."""
    try:
        yield
    except sqlite3.Error as error:
        said = " ".join(str(error).split())
        code = getattr(error, "sqlite_errorname", "") or ""
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise InputError(
                f"{path}: another process has been writing for {PATIENCE_SECONDS:.0f} s; wait until it is done"
            ) from None
        if code.startswith("SQLITE_NOTADB"):
            raise InputError(f"{path}: is no index of cloob's ({said})") from None
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_TOOBIG")) or "too big" in said:
            raise damaged(path, said) from None
        if code.startswith("SQLITE_INTERRUPT"):
            raise InputError(f"{path}: is no index of cloob's (what it defines takes too long to look at)") from None
        if code.startswith("SQLITE_READONLY"):
            raise not_writable(path.parent) from None
        if code.startswith("SQLITE_FULL"):
            raise InputError(f"{path}: the disk is full; what was written before stays") from None
        raise InputError(f"{path}: {said}") from None


def create(path: Path) -> None:
    """Makes the file of an empty index, whole or not at all.

    Raises:
        InputError: There is a file already, or it cannot be written.
    """
    if path.exists():
        raise InputError(f"{path}: is there already")
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_line(path):
            connection = sqlite3.connect(temporary, isolation_level=None)
            try:
                connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute("PRAGMA synchronous = OFF")  # a whole file is synced below
                connection.execute("BEGIN")
                for statement in SCHEMA:
                    connection.execute(statement)
                connection.execute("INSERT INTO revisions VALUES (1, ?)", (stamp(),))
                connection.execute("COMMIT")
            finally:
                connection.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():  # another process was faster; its index is as empty as ours
            return
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def stamp() -> int:
    """A random number that tells two revisions of one number apart."""
    return secrets.randbits(62)


def connect(path: Path, *, writable: bool) -> Connection:
    """Opens the file of an index.

    Args:
        path: The file.
        writable: Else nothing is written, and a folder that cannot be written is fine.

    Returns:
        A connection in autocommit mode; text that is not UTF-8 (names of files) has surrogates.

    Raises:
        InputError: No such file, no index, of a newer cloob, damaged, or with what no index has in it.
        BeingWritten: It cannot be locked, and another process writes to it.
    """
    if not path.is_file():
        raise InputError(f"{path.parent}: holds no index ({path.name}); `cloob index` makes one")
    _check_beside(path)
    with one_line(path):
        connection = _open(path, writable)
        try:
            _check(connection, path)
            _protect(connection)
            if writable:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            connection.check()  # it may be sound, and half written when it was read
            raise
    return connection


def _open(path: Path, writable: bool) -> Connection:
    """A connection; to a file in a folder that cannot be written, one that looks for no other writer."""
    address = f"file:{quote(str(path.absolute()))}"

    def opened(options: str) -> Connection:
        connection = sqlite3.connect(
            f"{address}?{options}",
            uri=True,
            timeout=PATIENCE_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )
        connection.path = path
        connection.text_factory = _text
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_STATEMENT)
        end = time.monotonic() + _LOADING_SECONDS
        connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA schema_version").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    if writable:
        return opened("mode=rw")
    try:
        return opened("mode=ro")
    except sqlite3.OperationalError:
        if not os.access(path, os.R_OK):
            raise
        if _log(path).exists():
            raise _being_written(path) from None
        seen = _state(path)
        connection = opened("mode=ro&immutable=1")
        connection.seen = seen
        return connection


def _log(path: Path) -> Path:
    """What has been written and is not yet in the file; there as long as a writer is."""
    return path.with_name(f"{path.name}-wal")


def _state(path: Path) -> tuple[int, ...]:
    """What is another one after the file was written to, and while it is."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, _log(path).exists()


def _being_written(path: Path) -> BeingWritten:
    return BeingWritten(
        f"{path}: is being written by another process, and its folder cannot be written to wait for that; try again"
    )


def _check_beside(path: Path) -> None:
    """Refuses what SQLite would follow out of the folder, or wait for: it takes files beside its own for its own."""
    real = path.resolve()
    for suffix in ("-journal", "-wal", "-shm"):
        beside = real.with_name(f"{real.name}{suffix}")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(beside.lstat().st_mode):
                raise InputError(f"{beside}: is no file, but a link, a pipe or a device; remove it")
            if suffix == "-journal" and _ends_with(beside, _NAMES_ANOTHER):
                raise InputError(f"{beside}: names another file, which SQLite would delete; remove it")


def _ends_with(path: Path, end: bytes) -> bool:
    with open_regular(path) as file:
        file.seek(-min(len(end), os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read() == end


def _protect(connection: sqlite3.Connection) -> None:
    """What holds for a file whose tables are known."""
    connection.set_progress_handler(None, 0)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BLOB)
    for setting in ("cell_size_check = ON", "mmap_size = 0", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {setting}")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuses what is not exactly an index of this version."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise InputError(f"{path}: is no index of cloob's, but another program's database")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise InputError(f"{path}: was written by a newer cloob (version {version}, this one reads {VERSION})")
    if version != VERSION:
        raise InputError(f"{path}: has version {version}, {VERSION} is wanted; make it anew with `cloob index`")
    found = _objects(connection)
    memory = sqlite3.connect(":memory:")
    try:
        for statement in SCHEMA:
            memory.execute(statement)
        wanted = _objects(memory)
    finally:
        memory.close()
    for kind, name, _ in sorted(found - wanted):
        raise InputError(f"{path}: has a {kind} {name!r} that no index has; it is not read")
    for kind, name, _ in sorted(wanted - found):
        raise InputError(f"{path}: has no {kind} {name!r}; make it anew with `cloob index`")


def _objects(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """Kind, name and SQL of everything that a database defines."""
    rows = connection.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_schema").fetchall()
    return {(str(kind), str(name), str(sql)) for kind, name, sql in rows}


def size_of(connection: sqlite3.Connection) -> int:
    """Bytes of a database as a connection sees it; what it holds is no more, unless it refers to some of it twice."""
    (pages,), (size,) = (connection.execute(f"PRAGMA {what}").fetchone() for what in ("page_count", "page_size"))
    return int(pages) * int(size)


def not_writable(folder: Path) -> InputError:
    """For an index that this user may only read."""
    return InputError(f"{folder}: this index may not be written; check the permissions of the folder and its files")


def damaged(path: Path, what: str) -> InputError:
    """For what no index has in it."""
    return InputError(f"{path}: is damaged ({what}); make it anew with `cloob index`")
