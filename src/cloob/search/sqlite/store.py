"""The store of one machine: SQLite for everything, and matrices of it for searching."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from cloob.errors import InputError, nearest
from cloob.search import where as filters
from cloob.search.records import IndexedModel, Item, valid
from cloob.search.sqlite.connections import Connections
from cloob.search.sqlite.file import FILE, Connection, create, damaged, one_line, stamp
from cloob.search.sqlite.matrix import MatrixCache, read_vectors
from cloob.search.sqlite.rows import (
    FORGET,
    INSERT,
    ITEM,
    ITEM_KINDS,
    UPDATE,
    as_bytes,
    delete,
    item_of,
    read_rows,
    values_of,
)
from cloob.search.store import FileState, Ids, Neighbours, Vectors, column_kind
from cloob.search.where import Filter

MAX_DIM = 65_536

_PAGE = 10_000


class SqliteStore:
    """An index in a folder; see :class:`cloob.search.store.Store` for what each method does.

    Any number of threads and processes may read while one writes; a second writer waits for the first one's batch.
    """

    def __init__(self, folder: Path, *, writable: bool = False, approximate: bool | None = None) -> None:
        """Opens an index.

        Args:
            folder: Holds ``index.sqlite``.
            writable: Whether it is going to be changed.
            approximate: Whether a search may ask a faiss index, where there is one that fits: see
                ``cloob.search.sqlite.matrix``.

        Raises:
            InputError: There is none, or it is not to be read; one line.
        """
        self._path = folder / FILE
        self._writable = writable
        self._connections = Connections(self._path, writable=writable)
        self._lock = threading.RLock()  # of writing, and of the caches
        self._caches: dict[int, MatrixCache] = {}
        self._approximate = approximate

    @classmethod
    def create(cls, folder: Path) -> SqliteStore:
        """An empty index in a folder, which is made where it is missing."""
        create(folder / FILE)
        return cls(folder, writable=True)

    @property
    def address(self) -> str:
        """The folder."""
        return str(self._path.parent)

    def close(self) -> None:
        """Ends the connections of all threads."""
        with self._lock:
            self._connections.close()
            self._caches.clear()

    def revision(self) -> int:
        """Grows with each transaction."""
        return int(self._rows("SELECT max(revision) FROM revisions")[0][0] or 0)

    def models(self) -> tuple[IndexedModel, ...]:
        """All models, in the order in which they came."""
        rows = self._read("SELECT name, spec, fingerprint, dim FROM models ORDER BY id", (), (str, str, str, int))
        for row in rows:
            if any(valid(text) != text for text in row[:3]):
                raise damaged(self._path, f"the model {valid(row[0])!r} has letters that are not UTF-8")
        return tuple(IndexedModel(*row) for row in rows)

    def add_model(self, model: IndexedModel) -> None:
        """Adds a model without vectors; one of the same weights gets the new place that it is loaded from."""
        if not 1 <= model.dim <= MAX_DIM:
            raise InputError(f"{model.name}: vectors of width {model.dim:,}; 1 to {MAX_DIM:,} is possible")
        with self._writing() as connection:
            rows = connection.execute("SELECT fingerprint FROM models WHERE name = ?", (model.name,)).fetchall()
            if rows and rows[0][0] != model.fingerprint:
                raise InputError(f"{model.name}: {self.address} holds vectors of another model of this name")
            if rows:
                connection.execute("UPDATE models SET spec = ? WHERE name = ?", (model.spec, model.name))
            else:
                values = (model.name, model.spec, model.fingerprint, model.dim)
                connection.execute("INSERT INTO models(name, spec, fingerprint, dim) VALUES (?, ?, ?, ?)", values)

    def remove_model(self, name: str) -> None:
        """Removes a model and its vectors."""
        number, dim = self._model(name)
        with self._writing() as connection:
            connection.execute("DELETE FROM vectors WHERE model = ?", (number,))
            connection.execute("DELETE FROM models WHERE id = ?", (number,))
        with self._lock:
            self._cache(number, dim).remove()
            del self._caches[number]

    def states(self, source: str) -> Iterator[FileState]:
        """What is known of a source's files, in pages: writing in between is fine."""
        names = dict(self._read("SELECT id, name FROM models", (), (int, str)))
        last = 0
        while True:
            rows = self._read(
                "SELECT id, path, bytes, mtime_ns, content, (SELECT group_concat(model) FROM vectors WHERE item = id)"
                " FROM items WHERE source = CAST(? AS TEXT) AND id > ? ORDER BY id LIMIT ?",
                (as_bytes(source), last, _PAGE),
                (int, str, int, int | None, str, str | None),
            )
            for number, path, size, mtime, content, models in rows:
                held = tuple(names[int(model)] for model in models.split(",") if int(model) in names) if models else ()
                yield FileState(number, path, size, mtime, content, None, held)
            if len(rows) < _PAGE:
                break
            last = rows[-1][0]
        for path, size, mtime, fault in self._read(
            "SELECT path, bytes, mtime_ns, fault FROM faults WHERE source = CAST(? AS TEXT)",
            (as_bytes(source),),
            (str, int, int | None, str),
        ):
            yield FileState(None, path, size, mtime, "", fault, ())

    def write(self, items: Sequence[Item], model: str, vectors: Vectors) -> None:
        """Adds or replaces items with their vectors."""
        number, dim = self._model(model)
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.shape != (len(items), dim) or not np.isfinite(vectors).all():
            raise ValueError(f"vectors: {vectors.shape} found, finite ({len(items)}, {dim}) wanted")
        with self._writing() as connection:
            revision = connection.execute("SELECT max(revision) FROM revisions").fetchone()[0]
            for item, vector in zip(items, vectors, strict=True):
                place = (as_bytes(item.source), as_bytes(item.path))
                there = connection.execute(
                    "SELECT id, content FROM items WHERE source = CAST(? AS TEXT) AND path = CAST(? AS TEXT)", place
                ).fetchone()
                if there is None:
                    identity = connection.execute(INSERT, values_of(item)).lastrowid
                else:
                    identity = there[0]
                    if there[1] != item.content:
                        connection.execute("DELETE FROM vectors WHERE item = ?", (identity,))
                    connection.execute(UPDATE, (*values_of(item), identity))
                connection.execute(
                    "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)",
                    (identity, number, revision, vector.astype("<f4").tobytes()),
                )
                connection.execute(FORGET, place)

    def update_items(self, items: Sequence[Item]) -> None:
        """Writes anew what is known of items; vectors stay."""
        with self._writing() as connection:
            for item in items:
                place = (as_bytes(item.source), as_bytes(item.path))
                delete(
                    connection,
                    "SELECT id FROM items WHERE source = CAST(? AS TEXT) AND path = CAST(? AS TEXT) AND id != ?",
                    (*place, item.id),
                )
                connection.execute(UPDATE, (*values_of(item), item.id))
                connection.execute(FORGET, place)

    def remove(self, ids: Sequence[int]) -> None:
        """Removes items with their vectors."""
        with self._writing() as connection:
            delete(connection, "SELECT value FROM json_each(?)", (json.dumps([int(each) for each in ids]),))

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of them."""
        with self._writing() as connection:
            for fault in faults:
                place = (as_bytes(source), as_bytes(fault.path))
                delete(
                    connection,
                    "SELECT id FROM items WHERE source = CAST(? AS TEXT) AND path = CAST(? AS TEXT)",
                    place,
                )
                connection.execute(
                    "INSERT OR REPLACE INTO faults VALUES (CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, ?)",
                    (*place, fault.bytes, fault.mtime_ns, valid(fault.fault or "")),
                )

    def clear_faults(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that could not be read."""
        with self._writing() as connection:
            connection.executemany(FORGET, [(as_bytes(source), as_bytes(path)) for path in paths])

    def sources(self) -> tuple[str, ...]:
        """All sources, sorted."""
        rows = self._read("SELECT source FROM items UNION SELECT source FROM faults ORDER BY 1", (), (str,))
        if any("\0" in row[0] for row in rows):
            raise damaged(self._path, "the name of a source has a NUL in it")
        return tuple(row[0] for row in rows)

    def exclude(self, source: str) -> tuple[str, ...]:
        """The globs that an update leaves out of a source."""
        values = (as_bytes(source),)
        rows = self._read("SELECT glob FROM excludes WHERE source = CAST(? AS TEXT)", values, (str,))
        return tuple(row[0] for row in rows)

    def set_exclude(self, source: str, globs: Sequence[str]) -> None:
        """Replaces them."""
        with self._writing() as connection:
            connection.execute("DELETE FROM excludes WHERE source = CAST(? AS TEXT)", (as_bytes(source),))
            rows = [(as_bytes(source), as_bytes(glob)) for glob in globs]
            connection.executemany("INSERT INTO excludes VALUES (CAST(? AS TEXT), CAST(? AS TEXT))", rows)

    def columns(self) -> dict[str, str]:
        """The metadata columns and their kinds; reads all items that have any."""
        rows = self._read(
            "SELECT key, max(json_each.type = 'text'), max(json_each.type IN ('integer', 'real')),"
            " max(json_each.type IN ('true', 'false'))"
            " FROM items, json_each(items.columns) WHERE items.columns != '{}' AND typeof(key) = 'text'"
            " GROUP BY key ORDER BY key",
            (),
            (str, int, int, int),
        )
        return {valid(name): column_kind(*kinds) for name, *kinds in rows}

    def find(self, contents: Sequence[str]) -> dict[str, list[int]]:
        """Ids of the items with these bytes."""
        found: dict[str, list[int]] = {}
        for content, number in self._read(
            "SELECT content, id FROM items WHERE content IN (SELECT value FROM json_each(?)) ORDER BY id",
            (json.dumps(list(contents)),),
            (str, int),
        ):
            found.setdefault(content, []).append(number)
        return found

    def count(self, where: Filter | None = None) -> int:
        """How many items there are, or match."""
        condition, values = _condition(where)
        return int(self._rows(f"SELECT count(*) FROM items WHERE {condition}", values)[0][0])

    def ids(self, where: Filter | None = None, *, after: int = 0, limit: int | None = None) -> Ids:
        """Ids of the items that match, ascending."""
        condition, values = _condition(where)
        rows = self._rows(
            f"SELECT id FROM items WHERE ({condition}) AND id > ? ORDER BY id LIMIT ?",
            (*values, after, -1 if limit is None else limit),
        )
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def last_id(self) -> int:
        """The largest id; 0 where there is none."""
        return int(self._rows("SELECT max(id) FROM items")[0][0] or 0)

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for."""
        wanted = [int(each) for each in ids]
        rows = self._read(
            f"SELECT {ITEM} FROM items WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(wanted),), ITEM_KINDS
        )
        found = {row[0]: item_of(row) for row in rows}
        return [found[each] for each in wanted if each in found]

    def vectors(self, model: str, ids: Sequence[int]) -> Vectors:
        """Vectors in the order asked for, NaN where there is none."""
        number, dim = self._model(model)
        wanted = np.asarray(ids, np.int64).reshape(-1)
        result = np.full((len(wanted), dim), np.nan, np.float32)
        for start in range(0, len(wanted), _PAGE):
            part = wanted[start : start + _PAGE]
            found, vectors = self._connections.look(partial(_some, model=number, ids=part, dim=dim))
            order = np.argsort(found)
            found, vectors = found[order], vectors[order]
            places = np.searchsorted(found, part)
            there = places < len(found)
            there[there] = found[places[there]] == part[there]
            result[start : start + _PAGE][there] = vectors[places[there]]
        return result

    def nearest(self, model: str, queries: Vectors, top: int, where: Filter | None = None) -> Neighbours:
        """The items nearest to each query: exact, or by faiss where the collection is large."""
        number, dim = self._model(model)
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries: {queries.shape} found, (Q, {dim}) wanted")
        allowed = None if where is None else self.ids(where)
        cache = self._cache(number, dim)
        return self._connections.look(lambda connection: cache.nearest(connection, queries, top, allowed))

    def optimise(self) -> None:
        """Writes anew the matrices that do not fit, and faiss indices where these are worthwhile."""
        for number, dim in self._rows("SELECT id, dim FROM models"):
            self._connections.look(self._cache(number, dim).refresh)

    def _cache(self, model: int, dim: int) -> MatrixCache:
        with self._lock:
            if model not in self._caches:
                self._caches[model] = MatrixCache(self._path, model, dim, self._approximate)
            return self._caches[model]

    def _model(self, name: str) -> tuple[int, int]:
        """A model's number and the width of its vectors."""
        rows = self._read("SELECT id, dim FROM models WHERE name = CAST(? AS TEXT)", (as_bytes(name),), (int, int))
        if not rows:
            names = [model.name for model in self.models()]
            raise InputError(f"{self.address}: has no vectors of a model {name!r}; {nearest(name, names)}")
        number, dim = rows[0]
        if not 1 <= dim <= MAX_DIM:
            raise damaged(self._path, f"vectors of width {dim}")
        return number, dim

    def _read(self, statement: str, values: Sequence[Any], kinds: Sequence[type | UnionType]) -> list[Any]:
        return self._connections.look(lambda connection: read_rows(connection, statement, values, kinds))

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """What has numbers alone; :func:`read_rows` is for text."""
        return self._connections.look(lambda connection: connection.execute(statement, values).fetchall())

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """One transaction, which makes a new revision."""
        if not self._writable:
            raise InputError(f"{self.address}: was opened to be read")
        with self._lock, one_line(self._path):
            connection = self._connections.own()
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute(
                    "INSERT INTO revisions SELECT coalesce(max(revision), 0) + 1, ? FROM revisions", (stamp(),)
                )
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself may have ended it
                    connection.execute("ROLLBACK")
                raise


def _some(connection: Connection, model: int, ids: Ids, dim: int) -> tuple[Ids, Vectors]:
    """The vectors that there are of some items."""
    rows = connection.execute(
        "SELECT item, vector FROM vectors WHERE model = ? AND item IN (SELECT value FROM json_each(?))",
        (model, json.dumps(ids.tolist())),
    )
    return read_vectors(connection, rows, dim)


def _condition(where: Filter | None) -> tuple[str, list[Any]]:
    return ("1", []) if where is None else filters.sql(where, "sqlite")
