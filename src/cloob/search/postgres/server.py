"""The connection to a PostgreSQL server: one line for each error, and the tables of an index.

Several indexers write at once: a transaction takes its rows in the order of their places and the one row of
``cloob_index`` last, so that none waits for another longer than it takes to commit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cloob.errors import InputError, require

if TYPE_CHECKING:
    from psycopg import Connection, Cursor

VERSION = 2
"""Of the tables below."""

_PGVECTOR = (0, 8)  # brought hnsw.iterative_scan
_CONNECT_SECONDS = 10
_LOCK = 0xC100B  # held while tables are made

# Vectors lie in a table a model, since an index over vectors is of one width: see `vectors_table`.
_TABLES = f"""
CREATE TABLE cloob_index (version int NOT NULL, revision bigint NOT NULL);
INSERT INTO cloob_index VALUES ({VERSION}, 0);
CREATE TABLE cloob_models (
  id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name text NOT NULL UNIQUE, spec text NOT NULL, fingerprint text NOT NULL, dim int NOT NULL);
CREATE TABLE cloob_items (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  source text NOT NULL, path text NOT NULL, content text NOT NULL, bytes bigint NOT NULL, mtime_ns bigint,
  width int NOT NULL, height int NOT NULL, date text, caption text, columns jsonb NOT NULL);
CREATE UNIQUE INDEX cloob_items_place ON cloob_items (md5(source), md5(path));
CREATE INDEX cloob_items_content ON cloob_items (content);
CREATE INDEX cloob_items_date ON cloob_items (date COLLATE "C");
CREATE TABLE cloob_faults (
  source text NOT NULL, path text NOT NULL, bytes bigint NOT NULL, mtime_ns bigint, fault text NOT NULL);
CREATE UNIQUE INDEX cloob_faults_place ON cloob_faults (md5(source), md5(path));
CREATE TABLE cloob_excludes (source text NOT NULL, glob text NOT NULL);
"""


def vectors_table(model: int) -> str:
    """The name of the table with a model's vectors."""
    return f"cloob_vectors_{int(model)}"


class Server:
    """A connection that any number of threads share in turn; it is made anew when the server has dropped it."""

    def __init__(self, address: str, *, writable: bool, create: bool) -> None:
        """Connects.

        Args:
            address: A URL as libpq takes it. ``?options=-csearch_path%3DNAME,public`` keeps several indices apart in
                one database, each in a schema of its own.
            writable: Else every transaction is read-only.
            create: Makes the tables, and the extension, where they are missing.

        Raises:
            InputError: No server, no right, no pgvector, or no index; one line.
        """
        self._psycopg = require("psycopg", "postgres")
        self._pgvector = require("pgvector.psycopg", "postgres")
        self._conninfo = address
        self.address = self._shown(address)
        self._writable = writable
        self._lock = threading.RLock()
        self._open: Connection[Any] | None = None
        try:
            with self.transaction(write=create) as cursor:
                self._check(cursor, create=create)
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
    def transaction(self, *, write: bool = False) -> Iterator[Cursor[Any]]:
        """All of it or nothing; of one that writes the index's revision grows.

        Raises:
            InputError: What the server says; of an index that was opened to be read, when it should write.
        """
        if write and not self._writable:
            raise InputError(f"{self.address}: was opened to be read")
        with self._lock, self._one_line():
            connection = self._connection()
            with connection.transaction(), connection.cursor() as cursor:
                yield cursor
                if write:
                    cursor.execute("UPDATE cloob_index SET revision = revision + 1")

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """All rows of one statement that reads."""
        with self._lock, self._one_line():
            return self._connection().execute(_composed(statement), values).fetchall()

    def build(self, statement: str) -> None:
        """Runs what may not stand in a transaction (``CREATE INDEX CONCURRENTLY``)."""
        with self._lock, self._one_line():
            self._connection().execute(_composed(statement))

    def _connection(self) -> Connection[Any]:
        if self._open is None or self._open.closed or not self._answers(self._open):
            self._open = self._psycopg.connect(self._conninfo, connect_timeout=_CONNECT_SECONDS, autocommit=True)
            if not self._writable:
                self._open.execute("SET default_transaction_read_only = on")
            known = self._open.execute("SELECT to_regtype('vector')").fetchone()
            if known is not None and known[0] is not None:
                self._pgvector.register_vector(self._open)
        return self._open

    def _answers(self, connection: Connection[Any]) -> bool:
        """Whether the server is still there; a dropped connection says so only when it is used."""
        if connection.info.transaction_status.name != "IDLE":
            return True
        try:
            connection.execute("SELECT 1")
        except self._psycopg.OperationalError:
            connection.close()
            return False
        return True

    def _check(self, cursor: Cursor[Any], *, create: bool) -> None:
        """That the tables are there, of this version, or makes them."""
        if create:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        there = cursor.execute("SELECT to_regclass('cloob_index')").fetchone()
        if there is None or there[0] is None:
            if not create:
                raise InputError(f"{self.address}: holds no index; `cloob index SRC --model M --out …` makes one")
            self._make(cursor)
        row = cursor.execute("SELECT version FROM cloob_index").fetchone()
        if row is None or row[0] != VERSION:
            raise InputError(f"{self.address}: its tables are of version {row and row[0]}, this cloob reads {VERSION}")

    def _make(self, cursor: Cursor[Any]) -> None:
        available = cursor.execute(
            "SELECT coalesce(installed_version, default_version) FROM pg_available_extensions WHERE name = 'vector'"
        ).fetchone()
        if available is None:
            raise InputError(f"{self.address}: the server has no pgvector (Debian: postgresql-NN-pgvector)")
        if tuple(int(part) for part in available[0].split(".")[:2]) < _PGVECTOR:
            raise InputError(f"{self.address}: has pgvector {available[0]}, {'.'.join(map(str, _PGVECTOR))} is needed")
        schema = cursor.execute("SELECT current_schema()").fetchone()
        if schema is None or schema[0] is None:
            named = cursor.execute("SELECT current_setting('search_path')").fetchone()
            raise InputError(f"{self.address}: has no schema {named and named[0]}; CREATE SCHEMA makes one")
        try:
            cursor.execute("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public")
        except self._psycopg.errors.InsufficientPrivilege as error:
            said = f"{error.diag.message_primary}; ask its administrator for CREATE EXTENSION vector"
            raise InputError(f"{self.address}: {said}") from None
        cursor.execute(_composed(_TABLES))
        self._pgvector.register_vector(cursor.connection)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as error:
            said = error.diag.message_primary or next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{self.address}: {self._without_password(said)}") from None

    def _shown(self, address: str) -> str:
        """The address without the password."""
        try:
            parts = self._psycopg.conninfo.conninfo_to_dict(address)
        except self._psycopg.ProgrammingError:
            raise InputError("--out: no address of a database; postgresql://USER@HOST:PORT/DATABASE is one") from None
        self._password = str(parts.get("password") or "")
        user = f"{quote(str(parts['user']), safe='')}@" if parts.get("user") else ""
        port = f":{parts['port']}" if parts.get("port") else ""
        options = f"?options={quote(str(parts['options']), safe=',')}" if parts.get("options") else ""
        return f"postgresql://{user}{parts.get('host') or ''}{port}/{parts.get('dbname') or ''}{options}"

    def _without_password(self, said: str) -> str:
        return said.replace(self._password, "…") if self._password else said


def _composed(statement: str) -> Any:
    """Text that this package wrote, values apart, as psycopg's types want it."""
    return statement
