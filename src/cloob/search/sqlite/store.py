"""The store of one machine: SQLite for everything, and matrices of it for searching."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.search.sqlite.file import FILE, connect, create, damaged, one_line, state
from cloob.search.sqlite.matrix import Matrix, decode
from cloob.search.store import Neighbours, Store, Vectors
from cloob.search.where import SQLITE, Filter


class SqliteStore(Store):
    """An index in a folder. Any number of processes may read while one writes; threads use one connection in turn."""

    _dialect = SQLITE
    _max_dim = 65_536
    _each = "key, json_each.type FROM cloob_items, json_each(columns) WHERE columns != '{}'"

    def __init__(self, folder: Path, *, writable: bool = False, approximate: bool | None = None) -> None:
        """Opens an index; InputError where there is none, or it is not to be read.

        ``approximate`` says whether a search may ask a faiss index; None: above a million vectors.
        """
        self.address = str(folder)
        self._path = folder / FILE
        self._writable, self._approximate = writable, approximate
        self._lock = threading.RLock()
        self._matrices: dict[int, Matrix] = {}
        self._open()

    @classmethod
    def create(cls, folder: Path) -> SqliteStore:
        """Makes an empty index in a folder, which is made where it is missing."""
        create(folder / FILE)
        return cls(folder, writable=True)

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            self._connection.close()
            self._matrices.clear()

    def sources(self) -> tuple[str, ...]:
        """All sources, sorted."""
        sources = super().sources()
        if any("\0" in source for source in sources):
            raise damaged(self._path, "the name of a source has a NUL in it")
        return sources

    def nearest(self, model: str, queries: Vectors, top: int, where: Filter | None = None) -> Neighbours:
        """The items nearest to each query: exact, or by faiss where the collection is large."""
        number, dim = self._asked(model, queries)
        allowed = None if where is None else self.ids(where)
        with self._lock, one_line(self._path):
            matrix = self._matrix(number, dim)
            parts = matrix.parts(self._own())
        return matrix.nearest(parts, queries, top, allowed)

    def optimise(self) -> None:
        """Writes anew the matrices that do not fit, and faiss indices where these are worthwhile."""
        for number, dim in self._rows("SELECT id, dim FROM cloob_models"):
            with self._lock, one_line(self._path):
                self._matrix(number, dim).optimise(self._own())

    def _open(self) -> None:
        self._connection = connect(self._path, writable=self._writable)
        self._seen = state(self._path)

    def _own(self) -> Any:
        """The connection; a reader who may not write the folder is not told of changes, and opens it anew."""
        if not self._writable and self._seen != state(self._path):
            self._connection.close()
            self._open()
        return self._connection

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, one_line(self._path):
            return self._own().execute(statement, values).fetchall()  # type: ignore[no-any-return]

    def _many(self, statement: str, rows: Sequence[Sequence[Any]]) -> list[Any]:
        with self._lock, one_line(self._path):
            execute = self._own().execute
            return [row for values in rows for row in execute(statement, values)]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if not self._writable:
            raise InputError(f"{self.address}: was opened to be read")
        with self._lock, one_line(self._path), self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "INSERT INTO cloob_revisions SELECT max(revision) + 1, ? FROM cloob_revisions", (secrets.randbits(62),)
            )
            yield

    def _among(self, values: Sequence[Any]) -> tuple[str, Any]:
        return "IN (SELECT value FROM json_each(?))", json.dumps(values)

    def _put(self, model: int, ids: Sequence[int], vectors: Vectors) -> None:
        statement = "INSERT OR REPLACE INTO cloob_vectors SELECT ?, ?, max(revision), ? FROM cloob_revisions"
        rows = zip(ids, vectors.astype("<f4"), strict=True)
        self._connection.executemany(statement, ((item, model, row.tobytes()) for item, row in rows))

    def _decode(self, cells: Sequence[Any], ids: Sequence[int], dim: int) -> Vectors:
        return decode(self._path, cells, ids, dim)

    def _let_go(self, model: int) -> None:
        self._matrix(model, 1).remove()
        del self._matrices[model]

    def _matrix(self, model: int, dim: int) -> Matrix:
        if model not in self._matrices:
            self._matrices[model] = Matrix(self._path, model, dim, self._approximate)
        return self._matrices[model]
