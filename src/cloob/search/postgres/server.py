"""The connection to a PostgreSQL server: one line for each error, and the tables of an index.

Several indexers write at once: a transaction takes its rows in the order of their places and the one row of
``cloob_revisions`` last, so that none waits for another longer than it takes to commit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cloob.errors import InputError, require
from cloob.search.schema import TABLES

if TYPE_CHECKING:
    from psycopg import Connection

VERSION = 3
"""Of the tables below."""

_PGVECTOR = (0, 8)  # brought hnsw.iterative_scan
_CONNECT_SECONDS = 10
_LOCK = 0xC100B  # held while tables are made

# Vectors of up to 2,000 numbers lie in their rows (MAIN), where a scan reads them in place.
_TABLES = f"""
CREATE TABLE cloob_index (version int NOT NULL);
INSERT INTO cloob_index VALUES ({VERSION});
{TABLES};
ALTER TABLE cloob_vectors ALTER vector SET STORAGE MAIN;
INSERT INTO cloob_revisions VALUES (0, 0)""".format(
    int="bigint", id="bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY", json="jsonb", vector="vector", strict=""
)


class Server:
    """A connection that any number of threads share in turn; it is made anew when the server has dropped it."""

    def __init__(self, address: str, *, writable: bool, create: bool) -> None:
        """Connects; InputError where there is no server, no right, no pgvector, or no index.

        ``?options=-csearch_path%3DNAME,public`` in the address keeps several indices apart in one database, each in a
        schema. ``create`` makes the tables, and the extension, where they are missing.
        """
        self._psycopg = require("psycopg", "postgres")
        self._pgvector = require("pgvector.psycopg", "postgres")
        self._conninfo = address
        self.address = self._shown(address)
        self._writable = writable
        self._lock = threading.RLock()
        self._open: Connection[Any] | None = None
        try:
            if create:
                self._make()
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            if self._open is not None:
                self._open.close()
            self._open = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing, of what this thread runs inside."""
        with self._lock, self._one_line():
            self.rows("SELECT 1")  # by a connection that is there
            with self._connected().transaction():
                yield

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Runs one statement, with ``?`` for a value; what a dropped connection did not run is run again."""
        with self._lock, self._one_line():
            inside = self._open is not None and self._open.info.transaction_status.name != "IDLE"
            try:
                return self._run(statement, values)
            except self._psycopg.OperationalError:
                if inside or self._open is None or not self._open.closed:
                    raise
                return self._run(statement, values)

    def many(self, statement: str, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Runs a statement for each of some rows of values, without waiting for one before the next is sent."""
        found: list[Any] = []
        if not rows:
            return found
        with self._lock, self._one_line(), self._connected().cursor() as cursor:
            returning = "RETURNING" in statement
            cursor.executemany(_composed(statement), rows, returning=returning)
            while returning:
                found += cursor.fetchall()
                returning = bool(cursor.nextset())
        return found

    def copy(self, table: str, types: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Adds rows to a table."""
        statement = _composed(f"COPY {table} FROM STDIN (FORMAT BINARY)")
        with self._lock, self._one_line(), self._connected().cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    def _run(self, statement: str, values: Sequence[Any]) -> list[Any]:
        cursor = self._connected().execute(_composed(statement), values, binary=True)
        return [] if cursor.description is None else cursor.fetchall()

    def _connected(self) -> Connection[Any]:
        if self._open is None or self._open.closed:
            self._open = self._psycopg.connect(self._conninfo, connect_timeout=_CONNECT_SECONDS, autocommit=True)
            if not self._writable:
                self._open.execute("SET default_transaction_read_only = on")
            known = self._open.execute("SELECT to_regtype('vector')").fetchone()
            if known is not None and known[0] is not None:
                self._pgvector.register_vector(self._open)
        return self._open

    def _check(self) -> None:
        """That the tables are there, of this version."""
        if self.rows("SELECT to_regclass('cloob_index')") == [(None,)]:
            raise InputError(f"{self.address}: holds no index; `cloob index SRC --model M --out …` makes one")
        ((version,),) = self.rows("SELECT version FROM cloob_index")
        if version != VERSION:
            raise InputError(f"{self.address}: its tables are of version {version}, this cloob reads {VERSION}")

    def _make(self) -> None:
        """Makes the tables where they are missing."""
        with self.transaction():
            self.rows("SELECT pg_advisory_xact_lock(?)", (_LOCK,))
            if self.rows("SELECT to_regclass('cloob_index')") != [(None,)]:
                return
            available = self.rows(
                "SELECT coalesce(installed_version, default_version) FROM pg_available_extensions WHERE name = 'vector'"
            )
            if not available:
                raise InputError(f"{self.address}: the server has no pgvector (Debian: postgresql-NN-pgvector)")
            if tuple(int(part) for part in available[0][0].split(".")[:2]) < _PGVECTOR:
                needed = ".".join(map(str, _PGVECTOR))
                raise InputError(f"{self.address}: has pgvector {available[0][0]}, {needed} is needed")
            if self.rows("SELECT current_schema()") == [(None,)]:
                ((named,),) = self.rows("SELECT current_setting('search_path')")
                raise InputError(f"{self.address}: has no schema {named}; CREATE SCHEMA makes one")
            try:
                self._connected().execute("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public")
            except self._psycopg.errors.InsufficientPrivilege as error:
                said = f"{error.diag.message_primary}; ask its administrator for CREATE EXTENSION vector"
                raise InputError(f"{self.address}: {said}") from None
            for statement in _TABLES.split(";"):
                self.rows(statement)
        self._pgvector.register_vector(self._connected())

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as error:
            said = error.diag.message_primary or next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{self.address}: {said.replace(self._password, '…')}") from None

    def _shown(self, address: str) -> str:
        """The address without the password."""
        try:
            parts = self._psycopg.conninfo.conninfo_to_dict(address)
        except self._psycopg.ProgrammingError:
            raise InputError("--out: no address of a database; postgresql://USER@HOST:PORT/DATABASE is one") from None
        self._password = str(parts.get("password") or "\0")
        user = f"{quote(str(parts['user']), safe='')}@" if parts.get("user") else ""
        port = f":{parts['port']}" if parts.get("port") else ""
        options = f"?options={quote(str(parts['options']), safe=',')}" if parts.get("options") else ""
        return f"postgresql://{user}{parts.get('host') or ''}{port}/{parts.get('dbname') or ''}{options}"


def _composed(statement: str) -> Any:
    """A statement of this package as psycopg wants it."""
    return statement.replace("?", "%s")
