"""What keeps an index: paths that name contents, and vectors of contents.

Legend: n items, D the width of a model's vectors. Vectors are float32 unit rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cloob.errors import InputError, nearest, printable
from cloob.search.database import Database, mend
from cloob.search.matrix import Ids, Matrix, Neighbours, Vectors, map_rows, write_rows
from cloob.search.records import FileState, IndexedModel, Item, Name, Value, valid
from cloob.search.where import (
    MOST_COLUMNS,
    PATH,
    SOURCE,
    Filter,
    filterable,
    kinds,
    select_ids,
)

Order = Literal["id", "newest", "chance"]
KEPT_DAYS = 30  # of what no path names any more
_ORDERS = {
    "id": "id",
    "newest": "coalesce(date, '') DESC, id DESC",
    "chance": "content * 2654435761 % 4294967296, id",
}

_MODELS = "SELECT name, spec, fingerprint, dim, id, inv_tau FROM cloob_models"
# ON CONFLICT: one that is replaced, whose vectors are gone, or loaded from elsewhere
_ADD_MODEL = """INSERT INTO cloob_models (name, spec, fingerprint, dim, inv_tau)
VALUES (:name, :spec, :fingerprint, :dim, :inv_tau) ON CONFLICT (name) DO UPDATE SET
  spec = excluded.spec, fingerprint = excluded.fingerprint, dim = excluded.dim,
  inv_tau = excluded.inv_tau"""
_STATES = f"""SELECT {PATH}, i.bytes, i.mtime_ns, coalesce(c.hash, ''),
  iif(i.content IS NULL, NULL, i.id), i.fault,
  EXISTS (SELECT 1 FROM cloob_vectors WHERE model = :model AND content = i.content)
FROM cloob_items i LEFT JOIN cloob_contents c ON c.id = i.content
WHERE i.source = (SELECT id FROM cloob_sources WHERE path = :source) ORDER BY i.id"""
# CROSS JOIN: SQLite reads the left table first.
_ITEMS = f"""SELECT i.id, {SOURCE}, {PATH}, c.hash, i.bytes, i.mtime_ns,
  i.width, i.height, i.date, i.caption, i.date_from, i.columns
FROM cloob_items i CROSS JOIN cloob_contents c ON c.id = i.content
WHERE i.id IN (SELECT value FROM json_each(:ids))"""
_WRITE_ITEM = """INSERT INTO cloob_items (source, path, content, bytes, mtime_ns, width,
  height, date, caption, columns, date_from, fault)
VALUES ((SELECT id FROM cloob_sources WHERE path = ?),
  ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (source, path) DO UPDATE SET
  content = excluded.content, bytes = excluded.bytes, mtime_ns = excluded.mtime_ns,
  width = excluded.width, height = excluded.height, date = excluded.date,
  caption = excluded.caption, columns = excluded.columns,
  date_from = excluded.date_from, fault = excluded.fault"""
_REMOVE = """DELETE FROM cloob_items
WHERE source = (SELECT id FROM cloob_sources WHERE path = ?) AND path = ?"""
_HAVING = """SELECT c.hash FROM cloob_contents c
WHERE c.hash IN (SELECT value FROM json_each(:contents)) AND EXISTS (
  SELECT 1 FROM cloob_vectors WHERE model = :model AND content = c.id)"""
# as one text: 100,000 rows of Python take three times as long
_PLACES = """SELECT coalesce(group_concat(i.id || ' ' || v.row, ' '), '')
FROM cloob_vectors v CROSS JOIN cloob_items i ON i.content = v.content
WHERE v.model = :model"""
_MONTHS = """SELECT substr(date, 1, 7) AS month, count(*) FROM cloob_items
WHERE id IN (SELECT value FROM json_each(:ids))
GROUP BY month ORDER BY coalesce(month, '') DESC"""
_NAME_CONTENTS = """UPDATE cloob_contents SET unnamed_since =
  CASE WHEN unnamed_since IS NULL THEN :now END
WHERE (unnamed_since IS NULL) != (id IN (SELECT content FROM cloob_pictures))"""


class Store(Database):
    """Items, metadata and vectors of one index.

    Every call that writes is one transaction: all of it or nothing.
    """

    def __init__(
        self, folder: Path, *, writable: bool = False, create: bool = False
    ) -> None:
        super().__init__(folder, writable=writable, create=create)
        self._matrices: dict[int, Matrix] = {}

    def revision(self) -> int:
        """Grows with every committed change: caches and servers look here whether to
        read again.
        """
        return int(self.rows("SELECT revision FROM cloob_state")[0][0])

    # Models

    def models(self) -> tuple[IndexedModel, ...]:
        """The models in order."""
        return tuple(IndexedModel(*row) for row in self.rows(f"{_MODELS} ORDER BY id"))

    def model(self, name: Name = None) -> IndexedModel:
        """A model by its name; one that has other weights by now is not there any more.

        None: the first.
        """
        models = self.models()
        for model in models:
            if name in (None, model.name, model):
                return model
        if not models:
            raise InputError(f"{self.address}: is empty; `cloob index` fills it")
        name = name.name if isinstance(name, IndexedModel) else name
        raise InputError(
            f"{self.address}: has no vectors of a model {name!r} (any more);"
            f" {nearest(str(name), [model.name for model in models])}"
        )

    def add_model(self, model: IndexedModel, *, replace: bool = False) -> IndexedModel:
        """Adds a model without vectors; one of the same weights gets the new place that
        it is loaded from.

        Where its name is that of other weights, InputError; or with ``replace`` their
        vectors go.
        """
        with self.transaction():
            for old in self.models():
                if old.name == model.name and old.fingerprint != model.fingerprint:
                    if not replace:
                        old.check("", self.address)
                    self._forget_vectors(old)
            self.rows(_ADD_MODEL, dataclasses.asdict(model))
            added = self.model(model)
        self._remove_files(added)
        return added

    def remove_model(self, name: str | IndexedModel) -> None:
        with self.transaction():
            model = self.model(name)
            self._forget_vectors(model)
            self.rows("DELETE FROM cloob_models WHERE id = :number", vars(model))
        self._remove_files(model)

    def _forget_vectors(self, model: IndexedModel) -> None:
        self.rows("DELETE FROM cloob_vectors WHERE model = :number", vars(model))
        statement = "UPDATE cloob_models SET rows = 0, packed = packed + 1"
        self.rows(f"{statement} WHERE id = :number", vars(model))

    def _file(self, model: IndexedModel) -> tuple[Path, int]:
        """The file of a model's vectors, and how many of its rows count."""
        statement = "SELECT rows, packed FROM cloob_models WHERE id = :number"
        for rows, packed in self.rows(statement, vars(model)):
            return self.path.with_name(f"vectors-{model.number}-{packed}.f32"), rows
        return self.path.with_name(f"vectors-{model.number}-none.f32"), 0

    def _remove_files(self, model: IndexedModel) -> None:
        """Removes the files of vectors that another one has replaced."""
        current, _ = self._file(model)
        for path in self.path.parent.glob(f"vectors-{model.number}-*.f32"):
            if path != current:
                path.unlink(missing_ok=True)

    # Sources

    def _names(self, source: str, path: str) -> tuple[str, str]:
        """A source and a path of it as the tables have them: the folder around the
        index is empty, and paths are within it.
        """
        if source == self.around:
            return "", path.removeprefix(f"{source}/")
        return source, path

    def _add_source(self, source: str) -> None:
        """Adds a source where it is missing."""
        stored, _ = self._names(source, "")
        statement = "INSERT INTO cloob_sources (path) VALUES (:path)"
        self.rows(f"{statement} ON CONFLICT DO NOTHING", {"path": stored})

    def sources(self) -> tuple[str, ...]:
        """The sources of which it knows a file."""
        used = f"SELECT DISTINCT {SOURCE} AS name FROM cloob_items i ORDER BY name"
        return tuple(name for (name,) in self.rows(used))

    def states(self, source: str, model: int = 0) -> Iterator[FileState]:
        """What is known of the files of a source, and whether their bytes have a vector
        of a model, by its number.
        """
        stored, _ = self._names(source, "")
        for row in self.rows(_STATES, {"source": stored, "model": model}):
            yield FileState(*row)

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
        with self.transaction():
            # in the transaction, so that vectors of other weights never come under its
            # name
            indexed = self.model(model)
            for source in {item.source for item in items}:
                self._add_source(source)
            numbers = self._add_contents([item.content for item in items])
            rows = [
                (
                    *self._names(item.source, item.path),
                    numbers[item.content],
                    *_values(item),
                )
                for item in items
            ]
            self.many(_WRITE_ITEM, rows)
            self._note_columns(items)
            old = self.having(indexed, list(vectors))
            new = {
                numbers[content]: vector
                for content, vector in vectors.items()
                if content not in old
            }
            self._add_vectors(indexed, new)

    def _add_contents(self, hashes: list[str]) -> dict[str, int]:
        """The numbers of contents, which are added where they are missing."""
        self.many(
            "INSERT INTO cloob_contents (hash) VALUES (?) ON CONFLICT DO NOTHING",
            [(content,) for content in hashes],
        )
        statement = "SELECT hash, id FROM cloob_contents WHERE hash IN"
        among = "(SELECT value FROM json_each(:hashes))"
        return dict(self.rows(f"{statement} {among}", {"hashes": hashes}))

    def _add_vectors(self, model: IndexedModel, vectors: Mapping[int, Vectors]) -> None:
        """Adds vectors by the number of their content."""
        if not vectors:
            return
        rows = np.array(list(vectors.values())).reshape(len(vectors), model.dim)
        path, start = self._file(model)
        write_rows(path, start, rows)
        places = [
            (model.number, content, place)
            for place, content in enumerate(vectors, start)
        ]
        self.many("INSERT INTO cloob_vectors VALUES (?, ?, ?)", places)
        statement = "UPDATE cloob_models SET rows = :rows WHERE id = :model"
        self.rows(statement, {"rows": start + len(rows), "model": model.number})

    def _note_columns(self, items: Sequence[Item]) -> None:
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
            with self.transaction():
                self.many(_REMOVE, [self._names(source, path) for path in paths])

    def write_fault(self, source: str, state: FileState) -> None:
        """Notes a file that could not be read, in the place of what was known of it."""
        with self.transaction():
            self._add_source(source)
            names = self._names(source, state.path)
            fault = valid(state.fault or "")
            row = (*names, None, state.bytes, state.mtime_ns, 0, 0, None, None, "{}")
            self.many(_WRITE_ITEM, [(*row, "", fault)])

    def note_unnamed(self) -> None:
        """Notes of contents whether a path names them, and since when none does."""
        self.rows(_NAME_CONTENTS, {"now": int(time.time())})

    def prune(self, now: float | None = None) -> int:
        """Forgets contents that no path has named for ``KEPT_DAYS``, with their
        vectors; returns how many.
        """
        limit = (time.time() if now is None else now) - KEPT_DAYS * 86_400
        old = "DELETE FROM cloob_contents WHERE unnamed_since < :limit RETURNING id"
        self.note_unnamed()
        with self.transaction():
            contents = [content for (content,) in self.rows(old, {"limit": limit})]
            models = self.models() if contents else ()
            for model in models:
                self._pack(model, contents)
        for model in models:
            self._remove_files(model)
        return len(contents)

    def _pack(self, model: IndexedModel, contents: list[int]) -> None:
        """Writes the vectors of a model anew, without those of some contents."""
        path, count = self._file(model)
        rows = map_rows(path, count, model.dim)
        among = "content IN (SELECT value FROM json_each(:contents))"
        values = {"model": model.number, "contents": contents}
        self.rows(f"DELETE FROM cloob_vectors WHERE model = :model AND {among}", values)
        statement = "SELECT content, row FROM cloob_vectors WHERE model = :model"
        kept = self.rows(statement, values)
        self._forget_vectors(model)
        self._add_vectors(model, {content: rows[place] for content, place in kept})

    # Reading

    def having(self, model: IndexedModel, contents: Sequence[str]) -> set[str]:
        """Those of some contents that have a vector of a model."""
        values = {"model": model.number, "contents": list(contents)}
        return {content for (content,) in self.rows(_HAVING, values)}

    def columns(self) -> dict[str, str]:
        """The sources' columns by name, sorted: ``text``, ``number``, ``boolean`` or
        ``mixed``.
        """
        stored = self.rows("SELECT name, kind FROM cloob_columns ORDER BY name")
        return dict(list(kinds(stored).items())[:MOST_COLUMNS])

    def count(self, where: Filter | None = None) -> int:
        if where is None:
            return int(self.rows("SELECT count(content) FROM cloob_items")[0][0])
        return len(self.ids(where))

    def ids(
        self, where: Filter | None = None, *, limit: int = -1, order: Order = "id"
    ) -> Ids:
        """Ids of the items that match: ascending, by date (those without one last), or
        by chance, which is the same each time.
        """
        if where is None:
            statement = f"SELECT id FROM cloob_pictures ORDER BY {_ORDERS[order]}"
            rows = self.rows(f"{statement} LIMIT :limit", {"limit": limit})
            ids = [id_ for (id_,) in rows]
        else:
            columns = self.columns()
            with self.reader() as connection:
                ids = select_ids(
                    connection, where, columns, self.around, _ORDERS[order], limit
                )
        return np.array(ids, np.int64)

    def ids_of(self, path: str) -> list[int]:
        """The ids of the items of a path: one a source that has it."""
        statement = "SELECT id FROM cloob_pictures WHERE path IN (:path, :inside)"
        values = {"path": path, "inside": path.removeprefix(f"{self.around}/")}
        return [id_ for (id_,) in self.rows(f"{statement} ORDER BY id", values)]

    def months(self, where: Filter | None = None) -> list[tuple[str | None, int]]:
        """How many of the items that match each month has, ``2024-05``, newest first.

        A date without a month is its own, and items without a date come last: the order
        of ``ids(order="newest")``.
        """
        among = (
            "" if where is None else "WHERE id IN (SELECT value FROM json_each(:ids))"
        )
        statement = f"""SELECT substr(date, 1, 7) AS month, count(*) FROM cloob_pictures
        {among} GROUP BY month ORDER BY coalesce(month, '') DESC"""
        ids = [] if where is None else self.ids(where).tolist()
        return [(month, count) for month, count in self.rows(statement, {"ids": ids})]

    def items(self, ids: Sequence[int] | Ids) -> list[Item]:
        """Items in the order of the ids; those that are not there are left out."""
        order = list(map(int, ids))
        items = {}
        for *fields, columns in self.rows(_ITEMS, {"ids": order}):
            item = Item(*fields)
            items[item.id] = dataclasses.replace(
                item, columns=self._read_columns(columns, item.path)
            )
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
        return self._matrix(model).vectors(np.asarray(ids, np.int64))

    def nearest(
        self,
        model: str | IndexedModel,
        query: Vectors,
        top: int,
        where: Filter | None = None,
    ) -> Neighbours:
        """The ``top`` items nearest to a query (D,), equal ones by id."""
        allowed = None if where is None else self.ids(where)
        return self._matrix(model).nearest(query, top, allowed)

    def _matrix(self, name: str | IndexedModel) -> Matrix:
        """A model's vectors as they are now."""
        with self.using() as connection, connection:
            connection.execute("BEGIN")  # one state of the database for all reads
            model = self.model(name)
            revision = self.revision()
            matrix = self._matrices.get(model.number)
            if matrix is None or matrix.revision != revision:
                matrix = self._read_matrix(model, revision)
                self._matrices[model.number] = matrix
        return matrix

    def _read_matrix(self, model: IndexedModel, revision: int) -> Matrix:
        text = self.rows(_PLACES, {"model": model.number})[0][0]
        pairs = np.fromstring(text, np.int64, sep=" ").reshape(-1, 2)
        items, places = pairs[np.argsort(pairs[:, 0], kind="stable")].T.copy()
        path, count = self._file(model)
        try:
            if len(places) and not 0 <= places.min() <= places.max() < count:
                raise ValueError(path)
            rows = map_rows(path, count, model.dim)
        except (ValueError, OSError):
            raise InputError(f"{path}: is damaged; {mend(path.parent)}") from None
        return Matrix(revision, items, places, rows)


def _values(item: Item) -> tuple[Any, ...]:
    """The fields of an item after its content, in the order of ``_WRITE_ITEM``."""
    columns = {
        valid(name): valid(value) if isinstance(value, str) else value
        for name, value in item.columns.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
    return (
        item.bytes,
        item.mtime_ns,
        item.width,
        item.height,
        item.date and valid(item.date),
        item.caption and valid(item.caption),
        json.dumps(columns, ensure_ascii=False),
        item.date_from,
        None,
    )


def _kind_of(value: Value) -> str:
    """What a filter finds in a column; nothing is of no kind."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number" if math.isfinite(value) else ""
    return "text" if isinstance(value, str) else ""
