"""The SQLite file of an index, and how it is opened when nobody knows who wrote it.

A file that somebody hands over is data: its tables have to be exactly those that are made here, so that no view,
trigger or generated column in it is ever run, functions in its schema are not trusted, and no extension is loaded.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from cloob.errors import InputError
from cloob.search.schema import TABLES

FILE = "index.sqlite"
"""Of an index, in its folder."""

APPLICATION = 0x434C4F42
"""SQLite's ``application_id`` of an index, "CLOB"."""

VERSION = 4
"""Of the tables; kept as ``user_version``."""

PATIENCE_SECONDS = 60.0
"""So long a writer waits for another one; a batch takes a fraction of a second."""

_PAGE_BYTES = 16_384
"""Seven vectors of width 512 a page; of SQLite's own 4,096 each would fill one, half of it empty."""

_TABLES = TABLES.format(
    int="INTEGER", id="INTEGER PRIMARY KEY AUTOINCREMENT", json="TEXT", vector="BLOB", strict="STRICT"
)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """What SQLite complains of, as one line that names the file."""
    try:
        yield
    except sqlite3.Error as error:
        said = " ".join(str(error).split())
        code = getattr(error, "sqlite_errorname", "") or ""
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            said = f"another process has been writing for {PATIENCE_SECONDS:.0f} s; wait until it is done"
        elif code.startswith("SQLITE_NOTADB"):
            said = f"is no index of cloob's ({said})"
        elif code.startswith("SQLITE_CORRUPT"):
            raise damaged(path, said) from None
        elif code.startswith("SQLITE_READONLY"):
            raise not_writable(path.parent) from None
        elif code.startswith("SQLITE_FULL"):
            said = "the disk is full; what was written before stays"
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
        with one_line(path), closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.executescript(
                f"PRAGMA page_size = {_PAGE_BYTES}; PRAGMA application_id = {APPLICATION};"
                f"PRAGMA user_version = {VERSION}; BEGIN; {_TABLES}; COMMIT; PRAGMA journal_mode = WAL"
            )
            connection.execute("INSERT INTO cloob_revisions VALUES (1, ?)", (secrets.randbits(62),))
        if not path.exists():  # else another process was faster; its index is as empty as ours
            temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Opens the file of an index, in autocommit mode; for any thread, one at a time.

    Raises:
        InputError: No such file, no index, of another version, damaged, or with what no index has in it.
    """
    if not path.is_file():
        raise InputError(f"{path.parent}: holds no index ({path.name}); `cloob index` makes one")
    _check_beside(path.resolve())
    with one_line(path):
        connection = _open(path, writable)
        try:
            _check(connection, path)
            if writable:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
    return connection


def state(path: Path) -> tuple[int, int, bool]:
    """What is another one once the file was written to, and while it is."""
    file = path.stat()
    return file.st_mtime_ns, file.st_size, _log(path).exists()


def _open(path: Path, writable: bool) -> sqlite3.Connection:
    """A connection; where the folder cannot be written and nobody writes, one without locks."""
    address = f"file:{quote(str(path.absolute()))}?mode={'rw' if writable else 'ro'}"
    try:
        return _opened(address)
    except sqlite3.OperationalError:
        if writable or not os.access(path, os.R_OK):
            raise
        if _log(path).exists():
            raise InputError(f"{path}: is being written; try again") from None
        return _opened(f"{address}&immutable=1")


def _opened(address: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        address, uri=True, timeout=PATIENCE_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "foreign_keys = ON", "schema_version"):
            connection.execute(f"PRAGMA {setting}").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _log(path: Path) -> Path:
    """What has been written and is not yet in the file; there as long as a writer is."""
    return path.with_name(f"{path.name}-wal")


def _check_beside(path: Path) -> None:
    """Refuses what SQLite would follow out of the folder: links, and a journal, which may name files to delete."""
    for suffix in ("-journal", "-wal", "-shm"):
        beside = path.with_name(f"{path.name}{suffix}")
        if beside.is_symlink() or (suffix == "-journal" and beside.exists()):
            raise InputError(f"{beside}: no index has a {'link' if beside.is_symlink() else 'journal'}; remove it")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuses what is not exactly an index of this version."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise InputError(f"{path}: is no index of cloob's, but another program's database")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise InputError(f"{path}: was written by a newer cloob (version {version}, this one reads {VERSION})")
    if version != VERSION:
        raise InputError(f"{path}: has version {version}, {VERSION} is wanted; make it anew with `cloob index`")
    with closing(sqlite3.connect(":memory:")) as memory:
        memory.executescript(_TABLES)
        wanted, found = _objects(memory), _objects(connection)
    for kind, name, _ in sorted(found - wanted):
        raise InputError(f"{path}: has a {kind} {name!r} that no index has; it is not read")
    for kind, name, _ in sorted(wanted - found):
        raise InputError(f"{path}: has no {kind} {name!r}; make it anew with `cloob index`")


def _objects(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """Kind, name and SQL of everything that a database defines."""
    rows = connection.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_schema").fetchall()
    return {(str(kind), str(name), str(sql)) for kind, name, sql in rows}


def not_writable(folder: Path) -> InputError:
    """For an index that this user may only read."""
    return InputError(f"{folder}: this index may not be written; check the permissions of the folder and its files")


def damaged(path: Path, what: str) -> InputError:
    """For what no index has in it."""
    return InputError(f"{path}: is damaged ({what}); make it anew with `cloob index`")
