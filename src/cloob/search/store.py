"""What keeps an index: paths that name contents, and vectors of contents.

Legend: n items, D the width of a model's vectors. Vectors are float32 unit rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cloob.errors import InputError, nearest, printable
from cloob.search.database import Database, full_path, mend
from cloob.search.matrix import Ids, Matrix, Neighbours, Vectors, decode
from cloob.search.records import FileState, IndexedModel, Item, Name, Value, valid
from cloob.search.where import (
    MOST_COLUMNS,
    Filter,
    SourcePlace,
    filterable,
    kinds,
    select_ids,
)

Order = Literal["id", "newest", "chance"]
KEPT_DAYS = 30  # of what no path names any more
_PAGE = 10_000
_BEGINNING = 12  # letters of a hash that are indexed
_AMONG = "IN (SELECT value FROM json_each(?))"  # follows a column
_ORDERS = {
    "id": "id",
    "newest": "coalesce(date, '') DESC, id DESC",
    "chance": "content * 2654435761 % 4294967296, id",
}

# CROSS JOIN: SQLite reads the left table first, and does not scan all vectors.
_ADD_MODEL = """INSERT INTO cloob_models (name, spec, fingerprint, dim, replaces, place)
SELECT ?, ?, ?, ?, ?,
  coalesce(max(CASE WHEN id = ? THEN place END), max(place) + 1, 1) FROM cloob_models
WHERE true ON CONFLICT (name, fingerprint) DO UPDATE SET spec = excluded.spec"""
_STATES = """SELECT i.id, i.path, i.bytes, i.mtime_ns, c.hash,
  (SELECT group_concat(model) FROM cloob_vectors v WHERE v.content = i.content)
FROM cloob_items i CROSS JOIN cloob_contents c ON c.id = i.content
WHERE i.source = ? ORDER BY i.id"""
_ITEMS = f"""SELECT i.id, i.source, i.path, c.hash, i.bytes, i.mtime_ns, i.width,
  i.height, i.date, i.date_from, i.caption, i.columns
FROM cloob_items i CROSS JOIN cloob_contents c ON c.id = i.content
WHERE i.id {_AMONG}"""
_WRITE_ITEM = """INSERT INTO cloob_items (source, path, content, bytes, mtime_ns, width,
  height, date, caption, columns, date_from)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (source, path) DO UPDATE SET
  content = excluded.content, bytes = excluded.bytes, mtime_ns = excluded.mtime_ns,
  width = excluded.width, height = excluded.height, date = excluded.date,
  caption = excluded.caption, columns = excluded.columns,
  date_from = excluded.date_from"""
_WRITE_VECTOR = """INSERT INTO cloob_vectors VALUES (?, ?, ?, ?)
ON CONFLICT (content, model) DO UPDATE
SET revision = excluded.revision, vector = excluded.vector"""
_VECTORS = f"""SELECT i.id, v.vector FROM cloob_items i CROSS JOIN cloob_vectors v
ON v.content = i.content AND v.model = ? WHERE i.id {_AMONG}"""
_HAVING = f"""SELECT c.hash FROM cloob_contents c CROSS JOIN cloob_vectors v
ON v.content = c.id AND v.model = ?
WHERE substr(c.hash, 1, {_BEGINNING}) {_AMONG} AND c.hash {_AMONG}"""
_CONTENTS = f"""SELECT hash, id FROM cloob_contents
WHERE substr(hash, 1, {_BEGINNING}) {_AMONG} AND hash {_AMONG}"""
_ADD_CONTENTS = """INSERT INTO cloob_contents (hash)
SELECT value FROM json_each(?) RETURNING hash, id"""
_NAME_CONTENTS = f"""UPDATE cloob_contents SET unnamed_since =
CASE WHEN EXISTS (SELECT 1 FROM cloob_items WHERE content = cloob_contents.id)
THEN NULL ELSE coalesce(unnamed_since, ?) END WHERE id {_AMONG}"""


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
    def _writing(self) -> Iterator[int]:
        """One transaction, with its revision."""
        with self.transaction():
            statement = (
                "INSERT INTO cloob_revisions SELECT max(revision) + 1, ? FROM"
                " cloob_revisions RETURNING revision"
            )
            yield self.rows(statement, (secrets.randbits(62),))[0][0]

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
            "SELECT name, spec, fingerprint, dim, id, replaces FROM cloob_models ORDER"
            " BY place, id"
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
                        raise InputError(
                            f"{self.address}: holds vectors of another model"
                            f" {model.name!r}; index one of the two anew with"
                            " --replace-model, or under another --name"
                        )
                    model = dataclasses.replace(model, replaces=old.number)
                    self._drop_unfinished(model)
            fields = (model.name, model.spec, model.fingerprint, model.dim)
            self.rows(_ADD_MODEL, (*fields, model.replaces, model.replaces))
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

    def _places(self) -> dict[int, SourcePlace]:
        """Where the sources lie now, by their number."""
        places = {}
        for id_, base, path in self.rows("SELECT id, base, path FROM cloob_sources"):
            folder = full_path(base, "", self.path.parent)
            prefix = f"{folder.rstrip('/')}/" if folder else ""
            name = full_path(base, path, self.path.parent)
            places[id_] = SourcePlace(id_, name, prefix)
        return places

    def _place(self, source: str) -> SourcePlace | None:
        for place in self._places().values():
            if place.name == source:
                return place
        return None

    def _added_place(self, source: str) -> SourcePlace:
        """The place of a source, which is added where it is missing."""
        if not self._place(source):
            base, path = self._split(source)
            self.rows(
                "INSERT INTO cloob_sources (base, path) VALUES (?, ?)", (base, path)
            )
        place = self._place(source)
        assert place is not None
        return place

    def _split(self, source: str) -> tuple[str | None, str]:
        """The base of a source, and the source in it: a folder is its own base, and the
        one around the index has none, so that it may move.
        """
        if not os.path.isabs(source):  # noqa: PTH117
            return None, source
        base, path = source, ""
        if not os.path.isdir(source):  # noqa: PTH112
            base, path = os.path.split(source)
        return ("" if base == full_path("", "", self.path.parent) else base), path

    def sources(self) -> tuple[str, ...]:
        """The sources of which it knows a file."""
        used = """SELECT id FROM cloob_sources s
        WHERE EXISTS (SELECT 1 FROM cloob_items WHERE source = s.id)
        OR EXISTS (SELECT 1 FROM cloob_faults WHERE source = s.id)"""
        places = self._places()
        return tuple(sorted(places[row[0]].name for row in self.rows(used)))

    def excludes(self) -> dict[str, tuple[str, ...]]:
        """The globs that an update of a source leaves out unless it is given others."""
        places = self._places()
        rows = self.rows("SELECT id, exclude FROM cloob_sources WHERE exclude != ''")
        return {places[id_].name: tuple(text.split("\n")) for id_, text in rows}

    def set_exclude(self, source: str, exclude: Sequence[str]) -> None:
        with self._writing():
            place = self._added_place(source)
            self.rows(
                "UPDATE cloob_sources SET exclude = ? WHERE id = ?",
                ("\n".join(exclude), place.id),
            )

    def states(self, source: str) -> Iterator[FileState]:
        """What is known of the files of a source; the models are those that have a
        vector, by number.
        """
        place = self._place(source)
        if place is None:
            return
        for id_, path, size, mtime, content, models in self.rows(_STATES, (place.id,)):
            numbers = tuple(sorted(map(int, models.split(",")))) if models else ()
            full = _joined(place, path)
            yield FileState(id_, full, size, mtime, content, None, numbers)
        faults = (
            "SELECT path, bytes, mtime_ns, fault FROM cloob_faults WHERE source = ?"
            " ORDER BY path"
        )
        for path, size, mtime, fault in self.rows(faults, (place.id,)):
            yield FileState(None, _joined(place, path), size, mtime, "", fault, ())

    # Writing

    def write(
        self,
        items: Sequence[Item],
        model: str | IndexedModel,
        vectors: Mapping[str, Vectors],
    ) -> None:
        """Adds items, or replaces those of the same source and path, and vectors (D,)
        of one model by content.

        A replaced item keeps its id.
        """
        with self._writing() as revision:
            # in the transaction, so that vectors of other weights never come under its
            # name
            known = self.model(model)
            places = {
                source: self._added_place(source)
                for source in dict.fromkeys(item.source for item in items)
            }
            hashes = list(dict.fromkeys(item.content for item in items))
            known_contents = self._numbers(hashes)
            contents = known_contents | self._added(hashes, known_contents)
            rows = []
            for item in items:
                place = places[item.source]
                row = (place.id, _within(place, item.path), contents[item.content])
                rows.append((*row, *_values(item)))
            replaced = self._contents_of(rows)
            self.many(_WRITE_ITEM, rows)
            self.many(
                _WRITE_VECTOR,
                [
                    (contents[content], known.number, revision, _encode(vector))
                    for content, vector in vectors.items()
                ],
            )
            self.many(
                "DELETE FROM cloob_faults WHERE source = ? AND path = ?",
                [row[:2] for row in rows],
            )
            self._note_columns(items)
            self._name_contents(replaced.union(known_contents.values()))

    def _added(self, hashes: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
        """Adds the contents that are not known; their numbers."""
        missing = [hash_ for hash_ in hashes if hash_ not in known]
        return dict(self.rows(_ADD_CONTENTS, (missing,)))

    def _numbers(self, hashes: list[str]) -> dict[str, int]:
        beginnings = [hash_[:_BEGINNING] for hash_ in hashes]
        return dict(self.rows(_CONTENTS, (beginnings, hashes)))

    def _contents_of(self, files: Sequence[Sequence[Any]]) -> set[int]:
        """The contents that files name now; a file begins with source and path."""
        found: set[int] = set()
        for source in {file[0] for file in files}:
            paths = [file[1] for file in files if file[0] == source]
            statement = (
                f"SELECT content FROM cloob_items WHERE source = ? AND path {_AMONG}"
            )
            found |= {row[0] for row in self.rows(statement, (source, paths))}
        return found

    def _name_contents(self, contents: Iterable[int]) -> None:
        """Notes of contents whether a path names them, and since when none does."""
        self.rows(_NAME_CONTENTS, (int(time.time()), list(contents)))

    def _note_columns(self, items: Iterable[Item]) -> None:
        found = {
            (valid(name), _kind_of(value))
            for item in items
            for name, value in item.columns.items()
        }
        named = [(name, kind) for name, kind in found if kind and filterable(name)]
        self.many("INSERT OR IGNORE INTO cloob_columns VALUES (?, ?)", named)

    def remove(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that are gone, those that could not be read as well; what they
        held stays for ``KEPT_DAYS``.
        """
        place = self._place(source)
        if paths and place is not None:
            with self._writing():
                self._forget(place, paths)

    def _forget(self, place: SourcePlace, paths: Sequence[str]) -> None:
        files = [(place.id, _within(place, path)) for path in paths]
        contents = self._contents_of(files)
        for table in ("cloob_items", "cloob_faults"):
            self.many(f"DELETE FROM {table} WHERE source = ? AND path = ?", files)
        self._name_contents(contents)

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of
        them.
        """
        with self._writing():
            place = self._added_place(source)
            self._forget(place, [state.path for state in faults])
            rows = [
                (
                    place.id,
                    _within(place, state.path),
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
        with self._writing():
            statement = (
                "DELETE FROM cloob_contents WHERE unnamed_since < ? RETURNING id"
            )
            return len(self.rows(statement, (limit,)))

    # Reading

    def having(self, model: IndexedModel, contents: Sequence[str]) -> set[str]:
        """Those of some contents that have a vector of a model."""
        beginnings = [content[:_BEGINNING] for content in contents]
        values = (model.number, beginnings, list(contents))
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
        self,
        where: Filter | None = None,
        *,
        limit: int | None = None,
        order: Order = "id",
    ) -> Ids:
        """Ids of the items that match: ascending, by date (those without one last), or
        by chance, which is the same each time.
        """
        if where is None:
            statement = f"SELECT id FROM cloob_items ORDER BY {_ORDERS[order]} LIMIT ?"
            rows = self.rows(statement, (-1 if limit is None else limit,))
            return np.fromiter((row[0] for row in rows), np.int64, len(rows))
        columns = self.columns()
        places = self._places().values()
        with self.reader() as connection:
            ids = select_ids(
                connection,
                where,
                columns,
                places,
                _ORDERS[order],
                -1 if limit is None else limit,
            )
        return np.array(ids, np.int64)

    def check(self, where: Filter) -> None:
        """Raises InputError for a filter that names what is not there."""
        self.ids(where, limit=0)

    def ids_of(self, path: str) -> list[int]:
        """The ids of the items of a path: one a source that has it."""
        found = []
        for place in self._places().values():
            statement = "SELECT id FROM cloob_items WHERE source = ? AND path = ?"
            found += self.rows(statement, (place.id, _within(place, path)))
        return sorted(row[0] for row in found)

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
        places = self._places()
        items = {}
        for row in self.rows(_ITEMS, (order,)):
            items[row[0]] = self._item(row, places[row[1]])
        return [items[id_] for id_ in order if id_ in items]

    def _item(self, row: Sequence[Any], place: SourcePlace) -> Item:
        """The item of a row of ``_ITEMS``."""
        id_, _, path, content, size, mtime, width, height, date, origin, caption = row[
            :-1
        ]
        full = _joined(place, path)
        try:
            columns = json.loads(row[-1])
        except ValueError:
            raise InputError(
                f"{self.address}: is damaged at {printable(full)};"
                f" {mend(self.path.parent)}"
            ) from None
        return Item(
            id=id_,
            source=place.name,
            path=full,
            content=content,
            bytes=size,
            mtime_ns=mtime,
            width=width,
            height=height,
            date=date,
            date_from=origin,
            caption=caption,
            columns=columns,
        )

    def vectors(self, model: str | IndexedModel, ids: Sequence[int] | Ids) -> Vectors:
        """(n, D) in the order of the ids; rows of NaN where there is no vector."""
        known = self.model(model)
        result = np.full((len(ids), known.dim), np.nan, np.float32)
        for start in range(0, len(ids), _PAGE):
            page = list(map(int, ids[start : start + _PAGE]))
            rows = self.rows(_VECTORS, (known.number, page))
            vectors = decode(self.path, [row[1] for row in rows], known.dim)
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

    def optimise(self) -> None:
        """Prepares for searches, at the end of an update."""
        for model in self.models():
            self._matrix(model).refresh(few=0)

    def _matrix(self, model: IndexedModel) -> Matrix:
        if model.number not in self._matrices:
            self._matrices[model.number] = Matrix(self, model)
        return self._matrices[model.number]


def _joined(place: SourcePlace, path: str) -> str:
    return path if path.startswith("/") else place.prefix + path


def _within(place: SourcePlace, path: str) -> str:
    """A path as the tables have it; below its base without that."""
    below = path.removeprefix(place.prefix)
    return path if below.startswith("/") or not below else below


def _values(item: Item) -> tuple[Any, ...]:
    """The fields of an item after its source, path and content, in the order of
    ``_WRITE_ITEM``.
    """
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
