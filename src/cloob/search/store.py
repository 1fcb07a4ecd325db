"""What keeps an index: paths that name contents, and vectors of contents.

Legend: n items, D the width of a model's vectors. Vectors are float32 unit rows.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cloob.errors import InputError
from cloob.search.database import Database, mend
from cloob.search.matrix import Ids, Matrix, Neighbours, Vectors, map_rows, write_rows
from cloob.search.records import FileState, IndexedModel, Item, valid
from cloob.search.where import (
    MOST_COLUMNS,
    PATH,
    SOURCE,
    Filter,
    filterable,
    select_ids,
)

Order = Literal["id", "newest", "chance"]
_NO_PLACES = np.empty(0, np.int64)
_KINDS = {bool: "boolean", int: "number", float: "number", str: "text"}
KEPT_DAYS = 30  # of what no path names any more
_ORDERS = {
    "id": "id",
    "newest": "coalesce(date, '') DESC, id DESC",
    "chance": "content * 2654435761 % 4294967296, id",
}

_STATES = f"""SELECT {PATH}, i.bytes, i.mtime_ns, coalesce(c.hash, ''),
  iif(i.content IS NULL, NULL, i.id), i.fault
FROM cloob_items i LEFT JOIN cloob_contents c ON c.id = i.content
WHERE i.source = (SELECT id FROM cloob_sources WHERE path = :source) ORDER BY i.id"""
# CROSS JOIN: SQLite reads the left table first.
_ITEMS = f"""SELECT i.id, {SOURCE}, {PATH}, c.hash, i.bytes, i.mtime_ns,
  i.width, i.height, i.date, i.caption, json(i.columns)
FROM cloob_items i CROSS JOIN cloob_contents c ON c.id = i.content
WHERE i.id IN (SELECT value FROM json_each(:ids))"""
_WRITE_ITEM = """INSERT INTO cloob_items (source, path, content, bytes, mtime_ns, width,
  height, date, caption, columns, fault)
VALUES ((SELECT id FROM cloob_sources WHERE path = :source), :path, :content, :bytes,
  :mtime_ns, :width, :height, :date, :caption, :columns, :fault)
ON CONFLICT (source, path) DO UPDATE SET
  content = excluded.content, bytes = excluded.bytes, mtime_ns = excluded.mtime_ns,
  width = excluded.width, height = excluded.height, date = excluded.date,
  caption = excluded.caption, columns = excluded.columns, fault = excluded.fault"""
_NO_PICTURE = {"width": 0, "height": 0, "date": None, "caption": None, "columns": "{}"}
_REMOVE = """DELETE FROM cloob_items
WHERE source = (SELECT id FROM cloob_sources WHERE path = :source) AND path = :path"""
# as one text: 100,000 rows of Python take three times as long
_PLACES = """SELECT coalesce(group_concat(i.id || ' ' || c.row, ' '), '')
FROM cloob_contents c CROSS JOIN cloob_items i ON i.content = c.id"""
_COLUMNS = """SELECT name, iif(count(*) = 1, min(kind), 'mixed') FROM cloob_columns
GROUP BY name ORDER BY name LIMIT :most"""
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
        self._matrix: Matrix | None = None

    def revision(self) -> int:
        """Grows with every committed change: caches and servers look here whether to
        read again.
        """
        return int(self.rows("SELECT revision FROM cloob_state")[0][0])

    # The model

    def stored_model(self) -> IndexedModel | None:
        """The model; None as long as nothing was embedded."""
        statement = "SELECT name, spec, fingerprint, dim, inv_tau FROM cloob_model"
        for row in self.rows(statement):
            return IndexedModel(*row)
        return None

    def model(self) -> IndexedModel:
        model = self.stored_model()
        if model is None:
            raise InputError(f"{self.address}: is empty; `cloob index` fills it")
        return model

    def check_weights(self, fingerprint: str) -> None:
        """Refuses a model that is not the one that the index has vectors of."""
        model = self.stored_model()
        if model is not None and fingerprint != model.fingerprint:
            raise InputError(
                f"{model.name}: has other weights or another preprocessing"
                f" than when {self.address} was indexed ({model.spec});"
                f" {mend(self.path.parent)}"
            )

    def set_model_spec(self, spec: str) -> None:
        """Notes where the model is loaded from by now."""
        with self.transaction():
            self.rows("UPDATE cloob_model SET spec = :spec", {"spec": spec})

    def _set_model(self, model: IndexedModel) -> None:
        self.check_weights(model.fingerprint)
        if self.stored_model() is None:
            self.rows(
                "INSERT INTO cloob_model VALUES"
                " (:name, :spec, :fingerprint, :dim, :inv_tau)",
                vars(model),
            )

    # Sources

    def _place(self, source: str, path: str = "") -> dict[str, str]:
        """A source and a path of it as the tables have them: the folder around the
        index is empty, and paths are within it.
        """
        if source == self.around:
            return {"source": "", "path": path.removeprefix(f"{source}/")}
        return {"source": source, "path": path}

    def _add_source(self, source: str) -> None:
        """Adds a source where it is missing."""
        statement = "INSERT INTO cloob_sources (path) VALUES (:source)"
        self.rows(f"{statement} ON CONFLICT DO NOTHING", self._place(source))

    def sources(self) -> tuple[str, ...]:
        """The sources of which it knows a file."""
        used = f"SELECT DISTINCT {SOURCE} AS name FROM cloob_items i ORDER BY name"
        return tuple(name for (name,) in self.rows(used))

    def states(self, source: str) -> Iterator[FileState]:
        """What is known of the files of a source."""
        for row in self.rows(_STATES, self._place(source)):
            yield FileState(*row)

    # Writing

    def write(
        self,
        items: Sequence[Item],
        model: IndexedModel,
        vectors: Mapping[str, Vectors],
    ) -> None:
        """Adds items, or replaces those of the same source and path, and vectors (D,)
        of the model by content; a content that has one keeps it.

        A replaced item keeps its id.
        """
        with self.transaction():
            self._set_model(model)
            for source in {item.source for item in items}:
                self._add_source(source)
            self._add_vectors(vectors)
            content_ids = self._content_ids([item.content for item in items])
            rows = [self._item_row(item, content_ids[item.content]) for item in items]
            self.many(_WRITE_ITEM, rows)
            self._note_columns(items)
        self._remove_old_vectors()

    def embedded_contents(self, contents: Sequence[str]) -> set[str]:
        """Those of some contents that have a vector."""
        return set(self._content_ids(list(contents)))

    def _item_row(self, item: Item, content: int) -> dict[str, object]:
        """An item as its table holds it."""
        return {
            **vars(item),
            **self._place(item.source, item.path),
            **_stored_text(item),
            "content": content,
            "fault": None,
        }

    def _content_ids(self, hashes: list[str]) -> dict[str, int]:
        """The ids of those contents that have a vector, by hash."""
        statement = "SELECT hash, id FROM cloob_contents WHERE hash IN"
        among = "(SELECT value FROM json_each(:hashes))"
        return dict(self.rows(f"{statement} {among}", {"hashes": hashes}))

    def _add_vectors(self, vectors: Mapping[str, Vectors]) -> None:
        """Adds contents with their vectors at the end of the file.

        What stands there already is of a writer that was killed, or of a later database
        in whose place an earlier one was put: the rows that count go into another file.
        """
        old = self.embedded_contents(list(vectors))
        new = {key: vector for key, vector in vectors.items() if key not in old}
        if not new:
            return
        path, start = self._file()
        length = self._mapped().nbytes
        if not start or path.stat().st_size > length:
            self._rewrite()
            path, start = self._file()
        rows = np.array(list(new.values())).reshape(len(new), self.model().dim)
        write_rows(path, start, rows)
        places = [(content, place) for place, content in enumerate(new, start)]
        self.many("INSERT INTO cloob_contents (hash, row) VALUES (?, ?)", places)
        end = {"rows": start + len(rows)}
        self.rows("UPDATE cloob_state SET rows = :rows", end)

    def _file(self) -> tuple[Path, int]:
        """The file of vectors, and how many of its rows count."""
        number, rows = self.rows("SELECT file, rows FROM cloob_state")[0]
        return self.path.with_name(f"vectors-{number:016x}.f32"), rows

    def _mapped(self, places: Ids = _NO_PLACES) -> Vectors:
        """The rows of the file that count; refused where it is too short, or has no
        such ``places``.
        """
        path, count = self._file()
        try:
            if len(places) and not 0 <= places.min() <= places.max() < count:
                raise ValueError(path)
            return map_rows(path, count, self.model().dim)
        except (ValueError, OSError):
            raise InputError(
                f"{path}: is damaged, or not of this {self.path.name};"
                f" {mend(path.parent)}"
            ) from None

    def _rewrite(self) -> None:
        """Writes the vectors of all contents into a file of a new name."""
        contents = self.rows("SELECT id, row FROM cloob_contents ORDER BY row")
        places = np.array([place for _, place in contents], np.int64)
        rows = self._mapped(places)[places]
        state = {"file": secrets.randbits(62), "rows": len(rows)}
        self.rows("UPDATE cloob_state SET file = :file, rows = :rows", state)
        write_rows(self._file()[0], 0, rows)
        moved = [(place, number) for place, (number, _) in enumerate(contents)]
        self.many("UPDATE cloob_contents SET row = ? WHERE id = ?", moved)

    def _remove_old_vectors(self) -> None:
        """Removes the files of vectors that another one has replaced."""
        current, _ = self._file()
        for path in self.path.parent.glob("vectors-*.f32"):
            if path != current:
                path.unlink(missing_ok=True)

    def _note_columns(self, items: Sequence[Item]) -> None:
        found = {
            (valid(name), type(value))
            for item in items
            for name, value in item.columns.items()
        }
        named = [
            (name, _KINDS[kind])
            for name, kind in found
            if kind in _KINDS and filterable(name)
        ]
        self.many("INSERT OR IGNORE INTO cloob_columns VALUES (?, ?)", named)

    def remove(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that are gone, readable or not; the contents and vectors of
        theirs stay for ``KEPT_DAYS``.
        """
        if paths:
            with self.transaction():
                self.many(_REMOVE, [self._place(source, path) for path in paths])

    def write_fault(self, source: str, state: FileState) -> None:
        """Notes a file that could not be read, in the place of what was known of it."""
        with self.transaction():
            self._add_source(source)
            row = {
                **_NO_PICTURE,
                **vars(state),
                **self._place(source, state.path),
                "content": None,
                "fault": valid(state.fault or ""),
            }
            self.rows(_WRITE_ITEM, row)

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
            contents = self.rows(old, {"limit": limit})
            if contents:
                self._rewrite()
        self._remove_old_vectors()
        return len(contents)

    # Reading

    def columns(self) -> dict[str, str]:
        """The sources' columns by name, sorted: ``text``, ``number``, ``boolean`` or
        ``mixed``.
        """
        return dict(self.rows(_COLUMNS, {"most": MOST_COLUMNS}))

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
            fields.append(json.loads(columns))
            item = Item(*fields)
            items[item.id] = item
        return [items[id_] for id_ in order if id_ in items]

    def pictures(self, where: Filter | None = None) -> tuple[list[Item], Vectors]:
        """The items that match, and their unit rows (n, D); refused if there are
        none.
        """
        items = self.items(self.ids(where))
        if not items:
            raise InputError(f"no picture: {self.why_none()}")
        return items, self.vectors([item.id for item in items])

    def why_none(self) -> str:
        """Why no item matches, in a sentence."""
        return "the filter lets none through" if self.count() else "the index is empty"

    def vectors(self, ids: Sequence[int] | Ids) -> Vectors:
        """(n, D) in the order of the ids; rows of NaN where there is no such item."""
        return self._read_matrix().vectors(np.asarray(ids, np.int64))

    def nearest(
        self, query: Vectors, top: int, where: Filter | None = None
    ) -> Neighbours:
        """The ``top`` items nearest to a query (D,), equal ones by id."""
        allowed = None if where is None else self.ids(where)
        return self._read_matrix().nearest(query, top, allowed)

    def _read_matrix(self) -> Matrix:
        """The vectors as they are now."""
        with self.using() as connection, connection:
            connection.execute("BEGIN")  # one state of the database for all reads
            revision = self.revision()
            if self._matrix is None or self._matrix.revision != revision:
                text = self.rows(_PLACES)[0][0]
                pairs = np.fromstring(text, np.int64, sep=" ").reshape(-1, 2)
                order = np.argsort(pairs[:, 0], kind="stable")
                items, places = pairs[order].T.copy()
                self._matrix = Matrix(revision, items, places, self._mapped(places))
            return self._matrix


def _stored_text(item: Item) -> dict[str, str | None]:
    """The texts of an item as the tables hold them."""
    columns = {
        valid(name): valid(value) if isinstance(value, str) else value
        for name, value in item.columns.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
    return {
        "date": item.date and valid(item.date),
        "caption": item.caption and valid(item.caption),
        "columns": json.dumps(columns, ensure_ascii=False),
    }
