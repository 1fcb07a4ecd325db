"""An index in one folder: a SQLite file is the truth, matrices next to it are caches
for exact search.

A file from somebody else is data: its tables have to be exactly those that are made
    here, so that no view, trigger or
generated column in it is ever run, functions in its schema are not trusted, and no
extension is loaded.
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
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, message, require
from cloob.search.records import INDEX_FILE, Busy, IndexedModel
from cloob.search.store import (
    FORMAT,
    TABLES,
    Ids,
    Neighbours,
    Store,
    Vectors,
    VectorTable,
    anew,
    check_format,
)
from cloob.search.where import SQLITE, Filter

# for which a writer waits for another one; a batch takes a fraction of a second
PATIENCE_SECONDS = 60.0
_APPLICATION = 0x434C4F42  # "CLOB"
# seven vectors of width 512; of SQLite's default, 4,096, each would fill one, half of
# it empty
_PAGE_BYTES = 16_384
_PAGE = 4096
_BLOCK = 32_768  # rows that are scored again at once: 128 MB at D = 512
_FEW = 20_000  # vectors in memory: 40 MB at D = 512, and 10 ms of a search
_FEW_PART = 20  # or one in so many
_TABLES = TABLES.format(**SQLITE["types"])


class SqliteStore(Store):
    """Any number of processes may read while one writes; threads use one connection in
    turn.
    """

    _among = SQLITE["among"]

    def __init__(
        self,
        folder: Path,
        *,
        writable: bool = False,
        create: bool = False,
        table: Callable[[SqliteStore], VectorTable] | None = None,
    ) -> None:
        """Opens the index of a folder, or makes a missing one; ``table`` keeps its
        vectors in place of the database.
        """
        self.address, self.writable = str(folder), writable or create
        self.path, self._folder = folder / INDEX_FILE, os.path.abspath(folder)  # noqa: PTH100
        self._above = os.path.dirname(self._folder)  # noqa: PTH120
        quoted = self._above.translate({ord(sign): 2 * sign for sign in "'{}"})
        self._dialect = SQLITE | {
            "place": SQLITE["place_in"].replace("ABOVE", quoted),
            "above": self._above,
        }
        self._lock = threading.RLock()
        self._busy: Any = None  # the lock of updates
        self.table = (table or FlatVectors)(self)
        with _one_line(self.path):
            if create:
                folder.mkdir(parents=True, exist_ok=True)
            if create and not self.path.exists():  # made completely or not at all
                temporary = folder / f".tmp-{secrets.token_hex(8)}"
                with closing(
                    sqlite3.connect(temporary, isolation_level=None)
                ) as connection:
                    connection.executescript(
                        f"PRAGMA page_size = {_PAGE_BYTES}; PRAGMA application_id ="
                        f" {_APPLICATION};PRAGMA user_version = {FORMAT}; BEGIN;"
                        f" {_TABLES}; COMMIT; PRAGMA journal_mode = WAL"
                    )
                try:
                    os.link(temporary, self.path)
                except (
                    OSError
                ):  # another process has made it meanwhile, or this disk has no links
                    if not self.path.exists():
                        temporary.rename(self.path)
                temporary.unlink(missing_ok=True)
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

    def _open(self) -> None:
        """Connects; refuses what leads SQLite out of the folder: links, and a journal,
        which names files to delete.

        Refuses other formats too, and a database with more than our tables.
        """
        path = self.path.resolve()
        for file, suffix in (
            (path.with_name(path.name + suffix), suffix)
            for suffix in ("-journal", "-wal", "-shm")
        ):
            if file.is_symlink() or (suffix == "-journal" and file.exists()):
                raise InputError(
                    f"{file}: no index has a"
                    f" {'link' if file.is_symlink() else 'journal'}; remove it"
                )
        address = f"file:{quote(str(self.path.absolute()))}?mode={'rw' if self.writable else 'ro'}"
        self._unlocked: tuple[int, int, bool] | None = None
        try:
            self._connection = self._connect(address)
        except sqlite3.OperationalError:
            if self.writable or not os.access(self.path, os.R_OK) or self._state()[2]:
                raise
            self._connection, self._unlocked = (
                self._connect(f"{address}&immutable=1"),
                self._state(),
            )
        names = ("application_id", "user_version")
        application, version = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names
        )
        if application != _APPLICATION:
            raise InputError(f"{self.path}: is no index of cloob's")
        check_format(self.address, version)
        with closing(sqlite3.connect(":memory:")) as memory:
            memory.executescript(_TABLES)
            ours, theirs = (
                set(tables.execute(SQLITE["shape"]))
                for tables in (memory, self._connection)
            )
        for kind, name, *_ in sorted(ours ^ theirs, key=str):
            raise InputError(
                f"{self.path}: is no index of cloob's: {kind} {name!r} is not as it"
                " makes it"
            )
        for setting in (
            ("journal_mode = WAL", "synchronous = NORMAL") if self.writable else ()
        ):
            self._connection.execute(f"PRAGMA {setting}")

    def _connect(self, address: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            address,
            uri=True,
            timeout=PATIENCE_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        for setting in (
            "trusted_schema = OFF",
            "foreign_keys = ON",
            "cache_size = -65536",
            "schema_version",
        ):
            connection.execute(f"PRAGMA {setting}").fetchone()
        connection.create_function(
            "cloob_lower", 1, lambda text: text and text.lower(), deterministic=True
        )
        connection.create_function("cloob_place", 1, self._full, deterministic=True)
        return connection

    def _state(self) -> tuple[int, int, bool]:
        """Changes when the file is written."""
        file = self.path.stat()
        return (
            file.st_mtime_ns,
            file.st_size,
            self.path.with_name(f"{INDEX_FILE}-wal").exists(),
        )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._busy = self._busy or require("filelock", "train").FileLock(
            f"{self.path}.lock"
        )
        with _acquired(self._busy, self.path.parent):
            yield

    def _stored(self, source: str, path: str = "") -> tuple[str, str]:
        if not self._folder.startswith(f"{source}/"):
            return source, path
        up = "/".join([".."] * self._folder[len(source) :].count("/"))
        return up, (
            f"{up}{path[len(source) :]}" if path.startswith(f"{source}/") else path
        )

    def _full(self, stored: str) -> str:
        if stored.startswith("../") and not stored.startswith("../."):
            return f"{self._above}{stored[2:]}"
        folder, below = self._folder, stored
        while below == ".." or below.startswith("../"):
            folder, below = os.path.dirname(folder), below[3:]  # noqa: PTH120
        return stored if below is stored else f"{folder}/{below}".removesuffix("/")

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        values = [
            json.dumps(value) if isinstance(value, list) else value for value in values
        ]
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
            raise InputError(
                f"{self.path}: is damaged (a vector is not of width {dim});"
                f" {anew(self.address)}"
            )
        return np.frombuffer(b"".join(cells), "<f4").reshape(-1, dim)


class FlatVectors(VectorTable):
    """Vectors in SQLite, and a matrix of every model next to it."""

    store: SqliteStore

    def __init__(self, store: SqliteStore) -> None:
        super().__init__(store)
        self._matrices: dict[int, Matrix] = {}

    def nearest(
        self, model: IndexedModel, query: Vectors, top: int, where: Filter | None
    ) -> Neighbours:
        return self._matrix(model).nearest(
            query, top, None if where is None else self.store.ids(where)
        )

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


class RowBlock(NamedTuple):
    ids: Ids  # (n,) ascending
    rows: Vectors  # (n, D)
    live: npt.NDArray[np.bool_]  # (n,): the others have gone or changed


class _File(NamedTuple):
    revision: int
    stamp: int
    ids: Ids
    rows: Vectors


class Matrix:
    """One model's vectors, as the database has them, in a mapped file next to it.

    A file belongs to one revision of the index and has its random stamp in the name;
    what was written since is in memory. A float32 product of unit rows (width D) is off
    by at most about D·2⁻²⁴, so the k best are among the rows within twice that of the
    k-th best product. These are scored again one by one: equal rows tie exactly, the
    lower id first.
    """

    def __init__(self, store: Any, model: IndexedModel) -> None:
        self._store, self._model, self._dim = store, model.number, model.dim
        self._none = _File(
            0, 0, np.empty(0, np.int64), np.empty((0, model.dim), np.float32)
        )
        self._file = self._none
        self._parts: list[RowBlock] = []
        self._seen: tuple[int, int] | None = None

    def nearest(self, query: Vectors, top: int, allowed: Ids | None) -> Neighbours:
        """The rows nearest to a query (D,), of ascending ``allowed`` ids if these are
        given.
        """
        query, parts = np.asarray(query, np.float32), self.parts()
        kept = [
            part.live if allowed is None else part.live & _among(part.ids, allowed)
            for part in parts
        ]
        products = []
        for part, live in zip(parts, kept, strict=True):
            if live.sum() < len(live) // _FEW_PART:
                some = np.full(len(live), -np.inf, np.float32)
                some[live] = part.rows[live] @ query
            else:
                some = np.einsum(
                    "ij,j->i", part.rows, query
                )  # half of what OpenBLAS takes
            some[~live | np.isnan(some)] = -np.inf
            products.append(some)
        together, least = np.concatenate(products), -np.inf
        if len(together) > top:
            margin = 2 * self._dim * 2.0**-24 * max(1.0, float(np.linalg.norm(query)))
            least = float(np.partition(together, -top)[-top]) - margin
        ids, scores = [], []
        for part, some in zip(parts, products, strict=True):
            near = np.flatnonzero((some >= least) & (some > -np.inf))
            for start in range(0, len(near), _BLOCK):
                block = near[start : start + _BLOCK]
                ids.append(part.ids[block])
                scores.append(
                    (
                        part.rows[block].astype(np.float64) * query.astype(np.float64)
                    ).sum(1)
                )
        near, exact = (
            np.concatenate([self._none.ids, *ids]),
            np.concatenate([np.empty(0), *scores]).astype(np.float32),
        )
        order = np.lexsort((near, -exact))[:top]
        return Neighbours(
            near[order], exact[order], int(sum(live.sum() for live in kept))
        )

    def parts(self, few: int | None = None) -> list[RowBlock]:
        """The vectors of the newest revision; a file of them where more than ``few``,
        and a 20th, have changed.
        """
        with self._store.using() as connection, connection:
            connection.execute(
                "BEGIN"
            )  # one state of the database for all that is read
            now = connection.execute(
                "SELECT revision, stamp FROM cloob_revisions ORDER BY revision DESC"
            ).fetchone()
            if now == self._seen and few is None:
                return self._parts
            stamps = dict(
                connection.execute("SELECT revision, stamp FROM cloob_revisions")
            )
            files = (
                each
                for each in [self._file, *self._files()]
                if stamps.get(each.revision) == each.stamp
            )
            file = max(files, key=lambda each: each.revision, default=self._none)
            kept = self._ids(connection, "<=", file.revision)
            live = _among(file.ids, kept)
            if live.sum() != len(kept):  # the file is of something else
                file, live = self._none, np.empty(0, np.bool_)
            new = self._ids(connection, ">", file.revision)
            if len(new) + int((~live).sum()) > max(
                _FEW if few is None else few, len(file.ids) // _FEW_PART
            ):
                file, live, new = (
                    self._write(connection, now),
                    np.ones(len(kept) + len(new), np.bool_),
                    new[:0],
                )
            rows = np.concatenate(
                [self._none.rows, *self._pages(connection, file.revision)]
            )
            self._file, self._seen = file, now
            self._parts = [
                RowBlock(file.ids, file.rows, live),
                RowBlock(new, rows, np.ones(len(new), np.bool_)),
            ]
        return self._parts

    def _ids(self, connection: sqlite3.Connection, operator: str, revision: int) -> Ids:
        statement = (
            f"SELECT item FROM cloob_vectors WHERE model = ? AND revision {operator} ?"
            " ORDER BY item"
        )
        return np.fromiter(
            (row[0] for row in connection.execute(statement, (self._model, revision))),
            np.int64,
        )

    def _pages(self, connection: sqlite3.Connection, after: int) -> Iterator[Vectors]:
        """The vectors that were written after a revision, by item."""
        cells = connection.execute(
            "SELECT vector FROM cloob_vectors WHERE model = ? AND revision > ? ORDER BY"
            " item",
            (self._model, after),
        )
        while page := [cell for (cell,) in islice(cells, _PAGE)]:
            yield self._store._decode(page, self._dim)

    def _files(self) -> Iterator[_File]:
        """The complete files."""
        for path in self._store.path.parent.glob(f"vectors-{self._model}-*.f32"):
            with contextlib.suppress(OSError, ValueError):
                revision, stamp = map(int, path.stem.split("-")[2:])
                count, left = divmod(path.stat().st_size, 8 + 4 * self._dim)
                ids = np.fromfile(path, "<i8", count)
                rows = np.memmap(path, "<f4", "r", 8 * count, (count, self._dim))
                if not left and ids[0] > 0 and (np.diff(ids) > 0).all():
                    yield _File(revision, stamp, ids, np.asarray(rows))

    def _write(self, connection: sqlite3.Connection, now: tuple[int, int]) -> _File:
        """A file of everything, in the place of all others; in memory where none can be
        written.
        """
        ids, old = (
            self._ids(connection, ">", 0),
            [*self._store.path.parent.glob(f"vectors-{self._model}-*.f32")],
        )
        path = self._store.path.with_name(
            f"vectors-{self._model}-{now[0]}-{now[1]}.f32"
        )
        temporary = self._store.path.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            with temporary.open(
                "wb"
            ) as file:  # not by a writable map: on a full disk that ends the process
                file.write(ids.astype("<i8").tobytes())
                for page in self._pages(connection, 0):
                    file.write(page.tobytes())
            temporary.replace(path)
            for other in old:
                if other != path:  # which another process may have written too
                    other.unlink(missing_ok=True)
            return next(
                file for file in self._files() if (file.revision, file.stamp) == now
            )
        except (OSError, StopIteration):
            return _File(
                *now,
                ids,
                np.concatenate([self._none.rows, *self._pages(connection, 0)]),
            )
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _among(ids: Ids, allowed: Ids) -> npt.NDArray[np.bool_]:
    places = np.searchsorted(allowed, ids)
    matches = places < len(allowed)
    matches[matches] = allowed[places[matches]] == ids[matches]
    return matches


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
        code = getattr(error, "sqlite_errorname", "")
        why = next(
            (
                line
                for start, line in SQLITE["messages"].items()
                if code.startswith(start)
            ),
            message(error),
        )
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            why = f"is damaged{_what_is_left(path)}; {anew(str(path.parent))}"
        raise InputError(f"{path}: {why}") from None


def _what_is_left(path: Path) -> str:
    """How much of a damaged database can still be read."""
    counts = {"cloob_items": 0, "cloob_vectors": 0}
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error),
        closing(sqlite3.connect(address, uri=True)) as damaged,
    ):
        for setting in (
            "trusted_schema = OFF",
            "writable_schema = ON",
        ):  # which reads a file that is cut
            damaged.execute(f"PRAGMA {setting}")
        for table in counts:
            with contextlib.suppress(sqlite3.Error):
                for _ in damaged.execute(f"SELECT * FROM {table}"):
                    counts[table] += 1
    pictures, vectors = counts.values()
    return (
        f"; {pictures:,} pictures and {vectors:,} vectors of it can be read"
        if pictures or vectors
        else ""
    )
