"""An index in PostgreSQL; see :class:`cloob.search.store.Store` for what each method does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cloob.errors import InputError, nearest
from cloob.search import where as filters
from cloob.search.postgres import ingest, neighbours
from cloob.search.postgres.rows import ITEM, PLACE, UPDATE, place_of, values_of
from cloob.search.postgres.server import Server, vectors_table
from cloob.search.records import IndexedModel, Item, as_text
from cloob.search.store import FileState, Ids, Neighbours, Vectors, column_kind
from cloob.search.where import Filter

MAX_DIM = 16_000
"""Of pgvector's ``vector``."""

_INLINE_DIM = 2_000  # up to here a vector fits into its row's page, and a scan reads it in place
_PAGE = 10_000


class PostgresStore:
    """An index in the tables of one PostgreSQL schema; any number of processes and machines read and write at once."""

    def __init__(self, address: str, *, writable: bool = False, create: bool = False) -> None:
        """Opens an index.

        Args:
            address: ``postgresql://USER@HOST:PORT/DATABASE``, see :class:`cloob.search.postgres.server.Server`.
            writable: Whether it is going to be changed.
            create: Makes an empty one where there is none.

        Raises:
            InputError: No server, no pgvector, or no index; one line.
        """
        self._server = Server(address, writable=writable or create, create=create)
        self._counts = neighbours.Counts()

    @property
    def address(self) -> str:
        """The address without the password."""
        return self._server.address

    def close(self) -> None:
        """Ends the connection."""
        self._server.close()

    def revision(self) -> int:
        """Grows with each transaction that writes."""
        return int(self._server.rows("SELECT revision FROM cloob_index")[0][0])

    def models(self) -> tuple[IndexedModel, ...]:
        """All models, in the order in which they came."""
        rows = self._server.rows("SELECT name, spec, fingerprint, dim FROM cloob_models ORDER BY id")
        return tuple(IndexedModel(*row) for row in rows)

    def add_model(self, model: IndexedModel) -> None:
        """Adds a model without vectors; one of the same weights gets the new place that it is loaded from."""
        if not 1 <= model.dim <= MAX_DIM:
            raise InputError(f"{model.name}: vectors of width {model.dim:,}; pgvector takes 1 to {MAX_DIM:,}")
        with self._server.transaction(write=True) as cursor:
            cursor.execute("LOCK TABLE cloob_models IN EXCLUSIVE MODE")
            row = cursor.execute("SELECT fingerprint FROM cloob_models WHERE name = %s", (model.name,)).fetchone()
            if row is None:
                added = cursor.execute(
                    "INSERT INTO cloob_models (name, spec, fingerprint, dim) VALUES (%s, %s, %s, %s) RETURNING id",
                    (model.name, model.spec, model.fingerprint, model.dim),
                ).fetchone()
                assert added is not None
                table = vectors_table(added[0])
                key = "item bigint PRIMARY KEY REFERENCES cloob_items ON DELETE CASCADE"
                cursor.execute(f"CREATE TABLE {table} ({key}, vector vector({model.dim}) NOT NULL)")
                if model.dim <= _INLINE_DIM:
                    cursor.execute(f"ALTER TABLE {table} ALTER vector SET STORAGE PLAIN")
            elif row[0] != model.fingerprint:
                raise InputError(f"{model.name}: {self.address} holds vectors of another model of this name")
            else:
                cursor.execute("UPDATE cloob_models SET spec = %s WHERE name = %s", (model.spec, model.name))

    def remove_model(self, name: str) -> None:
        """Removes a model and its vectors."""
        number, _ = self._model(name)
        with self._server.transaction(write=True) as cursor:
            cursor.execute("DELETE FROM cloob_models WHERE id = %s", (number,))
            cursor.execute(f"DROP TABLE {vectors_table(number)}")

    def states(self, source: str) -> Iterator[FileState]:
        """What is known of a source's files, in pages: writing in between is fine."""
        models = self._server.rows("SELECT id, name FROM cloob_models ORDER BY id")
        held = "".join(f", EXISTS (SELECT 1 FROM {vectors_table(number)} WHERE item = id)" for number, _ in models)
        last = 0
        while True:
            rows = self._server.rows(
                f"SELECT id, path, bytes, mtime_ns, content{held} FROM cloob_items"
                " WHERE md5(source) = md5(%s) AND id > %s ORDER BY id LIMIT %s",
                (as_text(source), last, _PAGE),
            )
            for number, path, size, mtime, content, *there in rows:
                names = tuple(name for (_, name), has in zip(models, there, strict=True) if has)
                yield FileState(number, path, size, mtime, content, None, names)
            if len(rows) < _PAGE:
                break
            last = rows[-1][0]
        for path, size, mtime, fault in self._server.rows(
            "SELECT path, bytes, mtime_ns, fault FROM cloob_faults WHERE md5(source) = md5(%s) ORDER BY path",
            (as_text(source),),
        ):
            yield FileState(None, path, size, mtime, "", fault, ())

    def write(self, items: Sequence[Item], model: str, vectors: Vectors) -> None:
        """Adds or replaces items with their vectors."""
        number, dim = self._model(model)
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.shape != (len(items), dim) or not np.isfinite(vectors).all():
            raise ValueError(f"vectors: {vectors.shape} found, finite ({len(items)}, {dim}) wanted")
        others = [other for other in self._numbers() if other != number]
        ingest.write(self._server, number, others, items, vectors)

    def update_items(self, items: Sequence[Item]) -> None:
        """Writes anew what is known of items; vectors stay."""
        with self._server.transaction(write=True) as cursor:
            cursor.execute("SELECT 1 FROM cloob_items WHERE id = ANY(%s) ORDER BY id FOR UPDATE", (_ids(items),))
            # Two items may exchange their paths: first all leave their places, then each takes its new one.
            cursor.execute(
                "UPDATE cloob_items SET path = 'moving ' || id || ' ' || path WHERE id = ANY(%s)", (_ids(items),)
            )
            for item in items:
                place = place_of(item)
                cursor.execute(f"DELETE FROM cloob_items WHERE {PLACE}", place)
                cursor.execute(UPDATE, (*values_of(item), item.id))
                cursor.execute(f"DELETE FROM cloob_faults WHERE {PLACE}", place)

    def remove(self, ids: Sequence[int]) -> None:
        """Removes items; their vectors go with them."""
        with self._server.transaction(write=True) as cursor:
            cursor.execute("DELETE FROM cloob_items WHERE id = ANY(%s)", ([int(number) for number in ids],))

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of them."""
        with self._server.transaction(write=True) as cursor:
            for fault in sorted(faults, key=lambda fault: fault.path):
                place = (as_text(source), as_text(fault.path))
                cursor.execute(f"DELETE FROM cloob_items WHERE {PLACE}", place)
                cursor.execute(
                    "INSERT INTO cloob_faults VALUES (%s, %s, %s, %s, %s) ON CONFLICT (md5(source), md5(path))"
                    " DO UPDATE SET bytes = EXCLUDED.bytes, mtime_ns = EXCLUDED.mtime_ns, fault = EXCLUDED.fault",
                    (*place, fault.bytes, fault.mtime_ns, as_text(fault.fault or "")),
                )

    def clear_faults(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that could not be read."""
        with self._server.transaction(write=True) as cursor:
            for path in sorted(paths):
                cursor.execute(f"DELETE FROM cloob_faults WHERE {PLACE}", (as_text(source), as_text(path)))

    def sources(self) -> tuple[str, ...]:
        """All sources, sorted."""
        rows = self._server.rows("SELECT source FROM cloob_items UNION SELECT source FROM cloob_faults")
        return tuple(sorted(row[0] for row in rows))

    def exclude(self, source: str) -> tuple[str, ...]:
        """The globs that an update leaves out of a source."""
        rows = self._server.rows("SELECT glob FROM cloob_excludes WHERE source = %s", (as_text(source),))
        return tuple(row[0] for row in rows)

    def set_exclude(self, source: str, globs: Sequence[str]) -> None:
        """Replaces them."""
        with self._server.transaction(write=True) as cursor:
            cursor.execute("DELETE FROM cloob_excludes WHERE source = %s", (as_text(source),))
            rows = [(as_text(source), as_text(glob)) for glob in globs]
            cursor.executemany("INSERT INTO cloob_excludes VALUES (%s, %s)", rows)

    def columns(self) -> dict[str, str]:
        """The metadata columns and their kinds; reads all items that have any."""
        rows = self._server.rows(
            "SELECT key, bool_or(jsonb_typeof(value) = 'string'), bool_or(jsonb_typeof(value) = 'number'),"
            " bool_or(jsonb_typeof(value) = 'boolean') FROM cloob_items, jsonb_each(columns) GROUP BY key"
        )
        return {name: column_kind(*map(bool, kinds)) for name, *kinds in sorted(rows)}

    def find(self, contents: Sequence[str]) -> dict[str, list[int]]:
        """Ids of the items with these bytes."""
        ids: dict[str, list[int]] = {}
        for content, number in self._server.rows(
            "SELECT content, id FROM cloob_items WHERE content = ANY(%s) ORDER BY id", (list(contents),)
        ):
            ids.setdefault(content, []).append(number)
        return ids

    def count(self, where: Filter | None = None) -> int:
        """How many items there are, or match."""
        condition, values = _condition(where)
        return int(self._server.rows(f"SELECT count(*) FROM cloob_items WHERE {condition}", values)[0][0])

    def ids(self, where: Filter | None = None, *, after: int = 0, limit: int | None = None) -> Ids:
        """Ids of the items that match, ascending."""
        condition, values = _condition(where)
        rows = self._server.rows(
            f"SELECT id FROM cloob_items WHERE {condition} AND id > %s ORDER BY id LIMIT %s", (*values, after, limit)
        )
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def last_id(self) -> int:
        """The largest id; 0 where there is none."""
        return int(self._server.rows("SELECT max(id) FROM cloob_items")[0][0] or 0)

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for."""
        wanted = [int(number) for number in ids]
        rows = self._server.rows(f"SELECT {ITEM} FROM cloob_items WHERE id = ANY(%s)", (wanted,))
        items = {row[0]: Item(*row) for row in rows}
        return [items[number] for number in wanted if number in items]

    def vectors(self, model: str, ids: Sequence[int]) -> Vectors:
        """Vectors in the order asked for, NaN where there is none."""
        number, dim = self._model(model)
        wanted = [int(item) for item in ids]
        table = vectors_table(number)
        rows = dict(self._server.rows(f"SELECT item, vector FROM {table} WHERE item = ANY(%s)", (wanted,)))
        missing = np.full(dim, np.nan, np.float32)
        vectors = [neighbours.to_numpy(rows[item]) if item in rows else missing for item in wanted]
        return np.stack(vectors) if vectors else np.empty((0, dim), np.float32)

    def nearest(self, model: str, queries: Vectors, top: int, where: Filter | None = None) -> Neighbours:
        """The items nearest to each query: by HNSW where :meth:`optimise` made it, exactly ranked; else exact."""
        number, dim = self._model(model)
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries: {queries.shape} found, (Q, {dim}) wanted")
        return neighbours.nearest(self._server, self._counts, number, queries, top, _condition(where))

    def optimise(self) -> None:
        """Makes an HNSW index of each model's vectors once there are many, and counts for the planner."""
        for model in self.models():
            neighbours.build(self._server, *self._model(model.name))

    def _numbers(self) -> list[int]:
        """The numbers of all models."""
        return [int(row[0]) for row in self._server.rows("SELECT id FROM cloob_models")]

    def _model(self, name: str) -> tuple[int, int]:
        """A model's number and the width of its vectors."""
        rows = self._server.rows("SELECT id, dim FROM cloob_models WHERE name = %s", (name,))
        if not rows:
            names = [model.name for model in self.models()]
            raise InputError(f"{self.address}: has no vectors of a model {name!r}; {nearest(name, names)}")
        return int(rows[0][0]), int(rows[0][1])


def _condition(where: Filter | None) -> tuple[str, list[Any]]:
    if where is None:
        return "true", []
    condition, values = filters.sql(where, "postgresql")
    return condition, list(values)


def _ids(items: Sequence[Item]) -> list[int]:
    return [item.id for item in items]
