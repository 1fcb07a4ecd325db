"""What keeps an index: paths that name contents, and vectors of contents.

Legend: n items, D the width of a model's vectors. Vectors are float32 unit rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cloob.errors import InputError, nearest, printable
from cloob.search.database import Database, mend
from cloob.search.matrix import Ids, Matrix, Neighbours, Vectors, decode
from cloob.search.records import FileState, IndexedModel, Item, Name, Value, valid
from cloob.search.where import MOST_COLUMNS, Filter, filterable, kinds, select_ids

Order = Literal["id", "newest", "chance"]
KEPT_DAYS = 30  # of what no path names any more
_PAGE = 10_000
_AMONG = "IN (SELECT value FROM json_each(?))"  # follows a column
_ORDERS = {
    "id": "id",
    "newest": "coalesce(date, '') DESC, id DESC",
    "chance": "content * 2654435761 % 4294967296, id",
}

_ADD_MODEL = """INSERT INTO cloob_models
  (name, spec, fingerprint, dim, inv_tau, replaces, place)
SELECT ?1, ?2, ?3, ?4, ?5, ?6,
  coalesce(max(CASE WHEN id = ?6 THEN place END), max(place) + 1, 1) FROM cloob_models
WHERE true ON CONFLICT (name, fingerprint) DO UPDATE SET
  spec = excluded.spec, inv_tau = excluded.inv_tau"""
# CROSS JOIN: SQLite reads the left table first, and does not scan all vectors.
_STATES = """SELECT i.path, i.bytes, i.mtime_ns, c.hash, i.id,
  EXISTS (SELECT 1 FROM cloob_vectors v WHERE v.content = i.content AND v.model = ?)
FROM cloob_items i CROSS JOIN cloob_contents c ON c.id = i.content
WHERE i.source = ? ORDER BY i.id"""
_FAULTS = """SELECT path, bytes, mtime_ns, fault FROM cloob_faults
WHERE source = ? ORDER BY path"""
_ITEMS = f"""SELECT i.columns, i.id, i.source, i.path, c.hash, i.bytes, i.mtime_ns,
  i.width, i.height, i.date, i.caption, i.date_from
FROM cloob_items i CROSS JOIN cloob_contents c ON c.id = i.content
WHERE i.id {_AMONG}"""
_WRITE_CONTENT = "INSERT INTO cloob_contents (hash) VALUES (?) ON CONFLICT DO NOTHING"
_WRITE_ITEM = """INSERT INTO cloob_items (source, path, content, bytes, mtime_ns, width,
  height, date, caption, columns, date_from)
VALUES (?, ?, (SELECT id FROM cloob_contents WHERE hash = ?), ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (source, path) DO UPDATE SET
  content = excluded.content, bytes = excluded.bytes, mtime_ns = excluded.mtime_ns,
  width = excluded.width, height = excluded.height, date = excluded.date,
  caption = excluded.caption, columns = excluded.columns,
  date_from = excluded.date_from"""
_WRITE_VECTOR = """INSERT INTO cloob_vectors (content, model, vector)
SELECT id, ?, ? FROM cloob_contents WHERE hash = ? ON CONFLICT DO NOTHING"""
_VECTORS = f"""SELECT i.id, v.vector FROM cloob_items i CROSS JOIN cloob_vectors v
ON v.content = i.content AND v.model = ? WHERE i.id {_AMONG}"""
_HAVING = f"""SELECT c.hash FROM cloob_contents c CROSS JOIN cloob_vectors v
ON v.content = c.id AND v.model = ? WHERE c.hash {_AMONG}"""
_NAME_CONTENTS = """UPDATE cloob_contents SET unnamed_since =
  CASE WHEN unnamed_since IS NULL THEN ? END
WHERE (unnamed_since IS NULL) != (id IN (SELECT content FROM cloob_items))"""


class Store(Database):
    """Items, metadata and vectors of one index.

    Every call that writes is one transaction: all of it or nothing.
    """

    def __init__(
        self, folder: Path, *, writable: bool = False, create: bool = False
    ) -> None:
        super().__init__(folder, writable=writable, create=create)
        self._matrices: dict[int, Matrix] = {}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, with a revision of its own."""
        with self.transaction():
            statement = (
                "INSERT INTO cloob_revisions SELECT max(revision) + 1, ? FROM"
                " cloob_revisions"
            )
            self.rows(statement, (secrets.randbits(62),))
            yield

    def revision(self) -> int:
        """Grows with every committed change: caches and servers look here whether to
        read again.
        """
        return int(self.rows("SELECT max(revision) FROM cloob_revisions")[0][0])

    # Models

    def models(self, *, unfinished: bool = False) -> tuple[IndexedModel, ...]:
        """The models in order; an unfinished one has the name of the one that it is to
        replace.
        """
        statement = (
            "SELECT name, spec, fingerprint, dim, id, replaces, inv_tau FROM"
            " cloob_models ORDER BY place, id"
        )
        models = [IndexedModel(*row) for row in self.rows(statement)]
        return tuple(model for model in models if unfinished or model.replaces is None)

    def model(self, name: Name = None) -> IndexedModel:
        """A model by its name; one that has other weights by now is not there any more.

        None: the first.
        """
        if isinstance(name, IndexedModel):
            for model in self.models(unfinished=True):
                if model == dataclasses.replace(name, spec=model.spec):
                    return model
            name = name.name
        else:
            for model in self.models():
                if name in (None, model.name):
                    return model
        names = [model.name for model in self.models()]
        if not names:
            raise InputError(f"{self.address}: is empty; `cloob index` fills it")
        raise InputError(
            f"{self.address}: has no vectors of a model {name!r} (any more);"
            f" {nearest(str(name), names)}"
        )

    def add_model(self, model: IndexedModel, *, replace: bool = False) -> IndexedModel:
        """Adds a model without vectors; one of the same weights gets the new place that
        it is loaded from.

        Where its name is that of other weights, InputError; or with ``replace`` it is
        added as unfinished, and these stay until :meth:`finish`.
        """
        with self._writing():
            for old in self.models():
                if old.name == model.name and old.fingerprint != model.fingerprint:
                    if not replace:
                        old.check("", self.address)
                    model = dataclasses.replace(model, replaces=old.number)
                    self._drop_unfinished(model)
            fields = (model.name, model.spec, model.fingerprint, model.dim)
            self.rows(_ADD_MODEL, (*fields, model.inv_tau, model.replaces))
            return self.model(model)

    def _drop_unfinished(self, model: IndexedModel) -> None:
        """Drops what was to replace the same model."""
        for other in self.models(unfinished=True):
            is_same = other.fingerprint == model.fingerprint
            if other.replaces == model.replaces and not is_same:
                self._drop(other)

    def finish(self, model: IndexedModel) -> None:
        """Puts a model in the place of the one that it replaces, whose vectors go."""
        for old in self.models():
            if old.number == model.replaces:
                with self._writing():
                    self._drop(old)
                    self.rows(
                        "UPDATE cloob_models SET replaces = NULL WHERE id = ?",
                        (self.model(model).number,),
                    )

    def remove_model(self, name: str | IndexedModel) -> None:
        with self._writing():
            self._drop(self.model(name))

    def _drop(self, model: IndexedModel) -> None:
        self.rows("DELETE FROM cloob_vectors WHERE model = ?", (model.number,))
        self.rows("DELETE FROM cloob_models WHERE id = ?", (model.number,))
        self._matrices.pop(model.number, None)
        for path in self.path.parent.glob(f"vectors-{model.number}-*"):
            path.unlink(missing_ok=True)

    # Sources

    def _names(self) -> dict[int, str]:
        """The sources by their number."""
        rows = self.rows("SELECT id, path FROM cloob_sources")
        return {id_: path or self.around for id_, path in rows}

    def _number(self, source: str) -> int | None:
        """The number of a source; None of one that it does not know."""
        statement = "SELECT id FROM cloob_sources WHERE path = ?"
        for row in self.rows(statement, (self._stored_source(source),)):
            return int(row[0])
        return None

    def _added_number(self, source: str) -> int:
        """The number of a source, which is added where it is missing."""
        statement = "INSERT INTO cloob_sources (path) VALUES (?) ON CONFLICT DO NOTHING"
        self.rows(statement, (self._stored_source(source),))
        number = self._number(source)
        assert number is not None
        return number

    def _stored_source(self, source: str) -> str:
        return "" if source == self.around else source

    def _stored(self, source: str, path: str) -> str:
        """A path as the tables have it: of the folder around the index without that."""
        return path.removeprefix(f"{source}/") if source == self.around else path

    def _full(self, stored: str) -> str:
        return stored if stored.startswith("/") else f"{self.around}/{stored}"

    def sources(self) -> tuple[str, ...]:
        """The sources of which it knows a file."""
        used = """SELECT id FROM cloob_sources s
        WHERE EXISTS (SELECT 1 FROM cloob_items WHERE source = s.id)
        OR EXISTS (SELECT 1 FROM cloob_faults WHERE source = s.id)"""
        names = self._names()
        return tuple(sorted(names[row[0]] for row in self.rows(used)))

    def excludes(self) -> dict[str, tuple[str, ...]]:
        """The globs that an update of a source leaves out unless it is given others."""
        names = self._names()
        rows = self.rows("SELECT id, exclude FROM cloob_sources WHERE exclude != ''")
        return {names[id_]: tuple(text.split("\n")) for id_, text in rows}

    def set_exclude(self, source: str, exclude: Sequence[str]) -> None:
        with self._writing():
            statement = "UPDATE cloob_sources SET exclude = ? WHERE id = ?"
            self.rows(statement, ("\n".join(exclude), self._added_number(source)))

    def states(self, source: str, model: int = 0) -> Iterator[FileState]:
        """What is known of the files of a source, and whether their bytes have a vector
        of a model, by its number; then those that could not be read.
        """
        number = self._number(source)
        for path, size, time_ns, content, id_, has_vector in self.rows(
            _STATES, (model, number)
        ):
            full = self._full(path)
            is_embedded = bool(has_vector)
            yield FileState(full, size, time_ns, content, id_, None, is_embedded)
        for path, size, time_ns, fault in self.rows(_FAULTS, (number,)):
            yield FileState(self._full(path), size, time_ns, fault=fault)

    # Writing

    def write(
        self,
        items: Sequence[Item],
        model: str | IndexedModel,
        vectors: Mapping[str, Vectors],
    ) -> None:
        """Adds items, or replaces those of the same source and path, and vectors (D,)
        of one model by content; a content that has one keeps it.

        A replaced item keeps its id.
        """
        with self._writing():
            # in the transaction, so that vectors of other weights never come under its
            # name
            number = self.model(model).number
            sources = {item.source for item in items}
            numbers = {source: self._added_number(source) for source in sources}
            files = [
                (numbers[item.source], self._stored(item.source, item.path))
                for item in items
            ]
            rows = [
                (*file, *_values(item)) for file, item in zip(files, items, strict=True)
            ]
            cells = [
                (number, _encode(vector), content)
                for content, vector in vectors.items()
            ]
            self.many(_WRITE_CONTENT, [(item.content,) for item in items])
            self.many(_WRITE_ITEM, rows)
            self.many(_WRITE_VECTOR, cells)
            self._forget_faults([path for _, path in files])
            self._note_columns(items)

    def _forget_faults(self, paths: list[str]) -> None:
        self.rows(f"DELETE FROM cloob_faults WHERE path {_AMONG}", (paths,))

    def _note_columns(self, items: Iterable[Item]) -> None:
        found = {
            (valid(name), _kind_of(value))
            for item in items
            for name, value in item.columns.items()
        }
        named = [(name, kind) for name, kind in found if kind and filterable(name)]
        self.many("INSERT OR IGNORE INTO cloob_columns VALUES (?, ?)", named)

    def remove(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that are gone, readable or not; the contents and vectors of
        theirs stay for ``KEPT_DAYS``.
        """
        if paths:
            with self._writing():
                self._forget(source, paths)

    def _forget(self, source: str, paths: Sequence[str]) -> int:
        """Forgets files; the number of their source."""
        number = self._added_number(source)
        files = [(number, self._stored(source, path)) for path in paths]
        self.many("DELETE FROM cloob_items WHERE source = ? AND path = ?", files)
        self._forget_faults([path for _, path in files])
        return number

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of
        them.
        """
        with self._writing():
            number = self._forget(source, [state.path for state in faults])
            rows = [
                (
                    number,
                    self._stored(source, state.path),
                    state.bytes,
                    state.mtime_ns,
                    valid(state.fault or ""),
                )
                for state in faults
            ]
            self.many("INSERT INTO cloob_faults VALUES (?, ?, ?, ?, ?)", rows)

    def prune(self, now: float | None = None) -> int:
        """Forgets contents that no path has named for ``KEPT_DAYS``, with their
        vectors; returns how many.
        """
        limit = (time.time() if now is None else now) - KEPT_DAYS * 86_400
        old = f"cloob_contents WHERE unnamed_since < {limit}"
        vectors = f"cloob_vectors WHERE content IN (SELECT id FROM {old})"
        with self._writing():
            self._name_contents()
            self.rows(f"DELETE FROM {vectors}")
            return len(self.rows(f"DELETE FROM {old} RETURNING id"))

    def _name_contents(self) -> None:
        """Notes of contents whether a path names them, and since when none does."""
        self.rows(_NAME_CONTENTS, (int(time.time()),))

    def optimise(self) -> None:
        """Prepares for searches, at the end of an update."""
        with self.transaction():
            self._name_contents()
        for model in self.models():
            self._matrix(model).save()

    # Reading

    def having(self, model: IndexedModel, contents: Sequence[str]) -> set[str]:
        """Those of some contents that have a vector of a model."""
        values = (model.number, list(contents))
        return {row[0] for row in self.rows(_HAVING, values)}

    def columns(self) -> dict[str, str]:
        """The sources' columns by name, sorted: ``text``, ``number``, ``boolean`` or
        ``mixed``.
        """
        stored = self.rows("SELECT name, kind FROM cloob_columns ORDER BY name")
        return dict(list(kinds(stored).items())[:MOST_COLUMNS])

    def count(self, where: Filter | None = None) -> int:
        if where is None:
            return int(self.rows("SELECT count(*) FROM cloob_items")[0][0])
        return len(self.ids(where))

    def ids(
        self, where: Filter | None = None, *, limit: int = -1, order: Order = "id"
    ) -> Ids:
        """Ids of the items that match: ascending, by date (those without one last), or
        by chance, which is the same each time.
        """
        if where is None:
            statement = f"SELECT id FROM cloob_items ORDER BY {_ORDERS[order]} LIMIT ?"
            ids = [row[0] for row in self.rows(statement, (limit,))]
        else:
            columns = self.columns()
            with self.reader() as connection:
                ids = select_ids(
                    connection, where, columns, self.around, _ORDERS[order], limit
                )
        return np.array(ids, np.int64)

    def check(self, where: Filter) -> None:
        """Raises InputError for a filter that names what is not there."""
        self.ids(where, limit=0)

    def ids_of(self, path: str) -> list[int]:
        """The ids of the items of a path: one a source that has it."""
        stored = [path, self._stored(self.around, path)]
        statement = f"SELECT id FROM cloob_items WHERE path {_AMONG} ORDER BY id"
        return [row[0] for row in self.rows(statement, (stored,))]

    def months(self, where: Filter | None = None) -> list[tuple[str | None, int]]:
        """How many of the items that match each month has, ``2024-05``, newest first.

        A date without a month is its own, and items without a date come last: the order
        of ``ids(order="newest")``.
        """
        statement = "SELECT substr(date, 1, 7) AS month, count(*) FROM cloob_items"
        values: tuple[list[int], ...] = ()
        if where is not None:
            statement += f" WHERE id {_AMONG}"
            values = (self.ids(where).tolist(),)
        statement += " GROUP BY month ORDER BY coalesce(month, '') DESC"
        return [(month, int(count)) for month, count in self.rows(statement, values)]

    def pages(self, where: Filter | None = None) -> Iterator[list[int]]:
        """The ids of the items that match, ascending, some thousands at a time."""
        ids = self.ids(where)
        for start in range(0, len(ids), _PAGE):
            yield ids[start : start + _PAGE].tolist()

    def items(self, ids: Sequence[int] | Ids) -> list[Item]:
        """Items in the order of the ids; those that are not there are left out."""
        order = list(map(int, ids))
        names = self._names()
        items = {}
        for columns, id_, source, path, *fields in self.rows(_ITEMS, (order,)):
            full = self._full(path)
            read = self._read_columns(columns, full)
            items[id_] = Item(*[id_, names[source], full, *fields, read])
        return [items[id_] for id_ in order if id_ in items]

    def _read_columns(self, text: str, path: str) -> dict[str, Value]:
        try:
            columns: dict[str, Value] = json.loads(text)
        except ValueError:
            raise InputError(
                f"{self.address}: is damaged at {printable(path)};"
                f" {mend(self.path.parent)}"
            ) from None
        return columns

    def vectors(self, model: str | IndexedModel, ids: Sequence[int] | Ids) -> Vectors:
        """(n, D) in the order of the ids; rows of NaN where there is no vector."""
        indexed = self.model(model)
        result = np.full((len(ids), indexed.dim), np.nan, np.float32)
        for start in range(0, len(ids), _PAGE):
            page = list(map(int, ids[start : start + _PAGE]))
            rows = self.rows(_VECTORS, (indexed.number, page))
            vectors = decode(self.path, [row[1] for row in rows], indexed.dim)
            found = {row[0]: place for place, row in enumerate(rows)}
            for place, id_ in enumerate(page, start):
                if id_ in found:
                    result[place] = vectors[found[id_]]
        return result

    def nearest(
        self,
        model: str | IndexedModel,
        query: Vectors,
        top: int,
        where: Filter | None = None,
    ) -> Neighbours:
        """The ``top`` items nearest to a query (D,), equal ones by id."""
        allowed = None if where is None else self.ids(where)
        return self._matrix(self.model(model)).nearest(query, top, allowed)

    def _matrix(self, model: IndexedModel) -> Matrix:
        return self._matrices.setdefault(model.number, Matrix(self, model))


def _values(item: Item) -> tuple[Any, ...]:
    """The fields of an item after its source and path, in the order of
    ``_WRITE_ITEM``.
    """
    columns = {
        valid(name): valid(value) if isinstance(value, str) else value
        for name, value in item.columns.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
    return (
        item.content,
        item.bytes,
        item.mtime_ns,
        item.width,
        item.height,
        item.date and valid(item.date),
        item.caption and valid(item.caption),
        json.dumps(columns, ensure_ascii=False),
        item.date_from,
    )


def _kind_of(value: Value) -> str:
    """What a filter finds in a column; nothing is of no kind."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number" if math.isfinite(value) else ""
    return "text" if isinstance(value, str) else ""


def _encode(vector: Vectors) -> bytes:
    return np.ascontiguousarray(vector, "<f4").tobytes()
