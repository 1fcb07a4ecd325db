"""An index of several machines: PostgreSQL with pgvector; HNSW over float16 finds
candidates, float32 ranks them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from cloob.errors import InputError, require
from cloob.search.records import IndexedModel
from cloob.search.store import (
    FORMAT,
    TABLES,
    Neighbours,
    Store,
    Vectors,
    VectorTable,
    check_format,
)
from cloob.search.where import POSTGRESQL, Filter

if TYPE_CHECKING:
    from psycopg import Connection

# a model with more vectors gets an HNSW index; below, every search scans; not tuned
HNSW_ROWS = 10_000
_CONNECT_SECONDS = 10
_LOCK = 0xC100B  # while tables are made
_HNSW_DIM = 4_000  # halfvec's limit for an index
_ROWS = 1000  # of a statement, which takes 65,535 values
_CANDIDATES = 4  # times as many as requested are ranked again
_EF_SEARCH = (
    200,
    1000,
)  # the least (100 gave recall@10 0.938 at 100,000 vectors), and pgvector's most

_TABLES = f"""CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public;
CREATE TABLE cloob_index (version int NOT NULL); INSERT INTO cloob_index VALUES ({FORMAT});
{TABLES.format(**POSTGRESQL["types"])}"""


class PostgresStore(Store):
    """An index in one PostgreSQL schema, which ``?options=-csearch_path%3DNAME,public``
    in the address names.

    Any number of processes and machines read and write at once; threads share one
    connection in turn.
    """

    _dialect, _among = POSTGRESQL, POSTGRESQL["among"]

    def __init__(
        self, address: str, *, writable: bool = False, create: bool = False
    ) -> None:
        """Connects; ``create`` makes the tables, and the extension, where they are
        missing.
        """
        self._psycopg = require("psycopg", "postgres")
        self._pgvector = require("pgvector.psycopg", "postgres")
        self._conninfo, self.writable = address, writable or create
        password = r"(?<=//)([^:/@]*):[^/]*@|(?<=[?&])password=[^&]*&?"
        self.address = re.sub(
            password, lambda found: f"{found[1]}@" if found[1] else "", address
        )
        self._lock = threading.RLock()
        self._open: Connection[Any] | None = None
        self.table = HnswVectors(self)
        try:
            missing = "SELECT to_regclass('cloob_index') IS NULL"
            if create:
                with self._one_line(), self._connected().transaction():
                    self._rows("SELECT pg_advisory_xact_lock(?)", (_LOCK,))
                    new = self._rows(missing) == [(True,)]
                    for statement in _TABLES.split(";") if new else []:
                        self._rows(statement)
                self._pgvector.register_vector(self._connected())
            if self._rows(missing) == [(True,)]:
                raise InputError(
                    f"{self.address}: holds no index; `cloob index` makes one"
                )
            ((number,),) = self._rows("SELECT version FROM cloob_index")
            check_format(self.address, number)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.close()

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._one_line():
            composed: Any = statement.replace("?", "%s")
            connection = self._connected()
            alone = (
                connection.info.transaction_status
                == self._psycopg.pq.TransactionStatus.IDLE
            )
            try:
                cursor = connection.execute(composed, values, binary=True)
            except self._psycopg.OperationalError:
                if not (alone and connection.closed):
                    raise
                cursor = self._connected().execute(
                    composed, values, binary=True
                )  # the server had dropped it
            return [] if cursor.description is None else cursor.fetchall()

    def _many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Many rows a statement: the server plans every statement anew."""
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            one = f"({', '.join('?' * len(some[0]))})"
            several = statement.replace(
                f"VALUES {one}", f"VALUES {', '.join([one] * len(some))}"
            )
            self._rows(several, [value for row in some for value in row])

    def _decode(self, cells: list[Any], dim: int) -> Vectors:
        rows = [
            cell.to_numpy() if hasattr(cell, "to_numpy") else cell for cell in cells
        ]
        return np.array(rows, np.float32).reshape(-1, dim)

    @contextmanager
    def _transaction(self, *, writing: bool = True) -> Iterator[None]:
        with self._lock, self._one_line(), self._connected().transaction():
            if writing:
                self._rows(
                    "LOCK TABLE cloob_revisions IN EXCLUSIVE MODE"
                )  # which others may read
            yield

    def _connected(self) -> Connection[Any]:
        if self._open is None or self._open.closed:
            self._open = self._psycopg.connect(
                self._conninfo, connect_timeout=_CONNECT_SECONDS, autocommit=True
            )
            if not self.writable:
                self._open.execute("SET default_transaction_read_only = on")
            if self._open.execute("SELECT to_regtype('vector')").fetchone() != (None,):
                self._pgvector.register_vector(self._open)
        return self._open

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as error:
            why = error.diag.message_primary or next(
                iter(str(error).strip().splitlines()), type(error).__name__
            )
            raise InputError(f"{self.address}: {why}") from None


class HnswVectors(VectorTable):
    """Vectors in PostgreSQL, with an index of HNSW where a model has many."""

    store: PostgresStore

    def __init__(self, store: PostgresStore) -> None:
        super().__init__(store)
        self._counts: dict[tuple[Any, ...], int] = {}

    def nearest(
        self, model: IndexedModel, query: Vectors, top: int, where: Filter | None
    ) -> Neighbours:
        """By HNSW where :meth:`optimise` made it, exactly ranked; else exact."""
        number = model.number
        condition, values = self.store._condition(where)
        among = f"cloob_vectors WHERE model = {number}"
        if where is not None:
            among = (
                f"cloob_vectors JOIN cloob_items ON id = item WHERE model = {number}"
                f" AND {condition}"
            )
        key = (self.store.revision(), among, *values)
        if key not in self._counts:  # once a revision: it reads all of them
            self._counts = {
                known: count
                for known, count in self._counts.items()
                if known[0] == key[0]
            }
            self._counts[key] = int(
                self.store._rows(f"SELECT count(*) FROM {among}", values)[0][0]
            )
        searched = self._counts[key]
        expected = min(top, searched)
        query = np.ascontiguousarray(query, np.float32)
        rows: list[Any] = []
        if expected and self._has_hnsw(number):
            candidates = expected * _CANDIDATES
            width = max(_EF_SEARCH[0], min(_EF_SEARCH[1], candidates))
            with self.store._transaction(writing=False):
                self.store._rows(POSTGRESQL["settings"], (str(width),))
                walk = POSTGRESQL["walk"].format(among, model.dim)
                rows = self.store._rows(
                    walk, (*values, query, candidates, query, expected)
                )
        if len(rows) < expected:  # the walk may come back with fewer than there are
            rows = self.store._rows(
                POSTGRESQL["exact"].format(among), (query, *values, expected)
            )
        ids, scores = (
            np.array([row[0] for row in rows], np.int64),
            np.array([row[1] for row in rows], np.float32),
        )
        return Neighbours(ids, scores, searched)

    def optimise(self) -> None:
        """Makes an HNSW index of every model's vectors once there are many, and counts
        for the planner.
        """
        for number, dim in self.store._rows("SELECT id, dim FROM cloob_models"):
            ((count,),) = self.store._rows(
                "SELECT count(*) FROM cloob_vectors WHERE model = ?", (number,)
            )
            if count > HNSW_ROWS and dim <= _HNSW_DIM and not self._has_hnsw(number):
                self.store._rows(
                    f"DROP INDEX CONCURRENTLY IF EXISTS {_hnsw(number)}"
                )  # of a build that broke off
                self.store._rows(POSTGRESQL["index"].format(_hnsw(number), dim, number))
        self.store._rows("ANALYZE cloob_vectors, cloob_items")

    def _has_hnsw(self, model: int) -> bool:
        statement = (
            "SELECT 1 FROM pg_index WHERE indexrelid = to_regclass(?) AND indisvalid"
        )
        return bool(self.store._rows(statement, (_hnsw(model),)))

    def drop(self, model: IndexedModel) -> None:
        self.store._rows(f"DROP INDEX IF EXISTS {_hnsw(model.number)}")


def _hnsw(model: int) -> str:
    return f"cloob_vectors_{model}_hnsw"


def remove(address: str) -> None:
    """Drops an index's tables, whatever is in them."""
    psycopg = require("psycopg", "postgres")
    with psycopg.connect(address, connect_timeout=_CONNECT_SECONDS) as connection:
        for (table,) in connection.execute(POSTGRESQL["ours"]).fetchall():
            connection.execute(f"DROP TABLE {table} CASCADE")
