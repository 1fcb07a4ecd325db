"""What keeps an index: tables and statements that SQLite and PostgreSQL share.

Legend: n items, Q queries, D the width of a model's vectors. Vectors are float32 unit rows.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, nearest
from cloob.search.records import IndexedModel, Item, Value, valid
from cloob.search.where import Dialect, Filter

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

_FIELDS = "source, path, content, bytes, mtime_ns, width, height, date, caption, columns"
_PLACES = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
# A row that is there is locked and stays as it is, so that its old content comes back.
_TAKE = f"""INSERT INTO cloob_items ({_FIELDS}) VALUES ({_PLACES})
ON CONFLICT (source, path) DO UPDATE SET path = excluded.path RETURNING id, {_FIELDS}"""
_UPDATE = f"UPDATE cloob_items SET ({_FIELDS}) = ({_PLACES}) WHERE id = ?"
_FAULT = """INSERT INTO cloob_faults (source, path, bytes, mtime_ns, fault) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (source, path)
DO UPDATE SET bytes = excluded.bytes, mtime_ns = excluded.mtime_ns, fault = excluded.fault"""
_MODEL = """INSERT INTO cloob_models (name, spec, fingerprint, dim) VALUES (?, ?, ?, ?)
ON CONFLICT (name) DO UPDATE SET spec = excluded.spec WHERE cloob_models.fingerprint = excluded.fingerprint
RETURNING id"""
_PAGE = 10_000
_KINDS = {"string": "text", "integer": "number", "real": "number", "true": "boolean", "false": "boolean"}


@dataclass(frozen=True)
class FileState:
    """What the index knows of a file without opening it."""

    id: int | None  # the item's; None for a file that could not be read
    path: str
    bytes: int  # size when it was read
    mtime_ns: int | None  # when it was changed last, as of then
    content: str  # SHA-256, hex; empty where it could not be read
    fault: str | None  # why it could not be read; it is tried again when size or time differ
    models: tuple[str, ...]  # names of the models that have a vector of it


class Neighbours(NamedTuple):
    """The nearest items of each query, best first; rows end with id 0 and score −inf where fewer items match."""

    ids: Ids  # (Q, top)
    scores: Vectors  # (Q, top) float32 cosines
    searched: int  # items that the filter lets through and the model has vectors of


class Store(ABC):
    """Items, metadata and vectors of one index. Each call that writes is one transaction: all of it or nothing."""

    address: str  # what opens it again; of a database without the password
    _dialect: ClassVar[Dialect]
    _max_dim: ClassVar[int]
    _each: ClassVar[str]  # selects the keys and types of all columns

    @abstractmethod
    def close(self) -> None:
        """Ends the connection."""

    @abstractmethod
    def optimise(self) -> None:
        """After an update: whatever makes searches fast."""

    @abstractmethod
    def nearest(self, model: str, queries: Vectors, top: int, where: Filter | None = None) -> Neighbours:
        """The items nearest to each of (Q, D) queries, equal ones by id."""

    @abstractmethod
    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]: ...

    @abstractmethod
    def _many(self, statement: str, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Runs a statement for each of some rows of values; all that they return."""

    @abstractmethod
    def _writing(self) -> AbstractContextManager[None]:
        """One transaction, which makes a new revision."""

    @abstractmethod
    def _among(self, values: Sequence[Any]) -> tuple[str, Any]:
        """A condition on a column that has one of some values, and its one parameter."""

    @abstractmethod
    def _put(self, model: int, ids: Sequence[int], vectors: Vectors) -> None: ...

    @abstractmethod
    def _decode(self, cells: Sequence[Any], ids: Sequence[int], dim: int) -> Vectors: ...

    @abstractmethod
    def _let_go(self, model: int) -> None:
        """Removes what was made for the searches of a model."""

    def revision(self) -> int:
        """Grows with each committed change: caches and servers look here whether to read again."""
        return int(self._rows("SELECT max(revision) FROM cloob_revisions")[0][0] or 0)

    def models(self) -> tuple[IndexedModel, ...]:
        """All models, in the order in which they came."""
        rows = self._rows("SELECT name, spec, fingerprint, dim FROM cloob_models ORDER BY id")
        return tuple(IndexedModel(*row) for row in rows)

    def add_model(self, model: IndexedModel) -> None:
        """Adds a model without vectors; one of the same weights gets the new place that it is loaded from.

        Raises:
            InputError: The name stands for another fingerprint.
        """
        if not 1 <= model.dim <= self._max_dim:
            raise InputError(f"{model.name}: vectors of width {model.dim:,}; 1 to {self._max_dim:,} is possible")
        with self._writing():
            if not self._rows(_MODEL, (model.name, model.spec, model.fingerprint, model.dim)):
                raise InputError(f"{model.name}: {self.address} holds vectors of another model of this name")

    def remove_model(self, name: str) -> None:
        """Removes a model and its vectors."""
        number, _ = self._model(name)
        with self._writing():
            self._rows("DELETE FROM cloob_vectors WHERE model = ?", (number,))
            self._rows("DELETE FROM cloob_models WHERE id = ?", (number,))
            self._let_go(number)

    def states(self, source: str) -> Iterator[FileState]:
        """What is known of a source's files, in pages: writing in between is fine."""
        names = dict(self._rows("SELECT id, name FROM cloob_models"))
        last = 0
        while rows := self._rows(
            "SELECT id, path, bytes, mtime_ns, content FROM cloob_items"
            " WHERE source = ? AND id > ? ORDER BY id LIMIT ?",
            (source, last, _PAGE),
        ):
            first, last = rows[0][0], rows[-1][0]
            held = defaultdict(list)
            for item, model in self._rows(
                "SELECT item, model FROM cloob_vectors WHERE item BETWEEN ? AND ? ORDER BY item, model", (first, last)
            ):
                held[item].append(names.get(model, ""))
            for number, path, size, mtime, content in rows:
                yield FileState(number, path, size, mtime, content, None, tuple(held[number]))
        for path, size, mtime, fault in self._rows(
            "SELECT path, bytes, mtime_ns, fault FROM cloob_faults WHERE source = ? ORDER BY path", (source,)
        ):
            yield FileState(None, path, size, mtime, "", fault, ())

    def write(self, items: Sequence[Item], model: str, vectors: Vectors) -> None:
        """Adds items, or replaces those of the same source and path, with their (n, D) vectors of one model.

        A replaced item keeps its id, and loses other models' vectors where its content differs.
        """
        number, dim = self._model(model)
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.shape != (len(items), dim) or not np.isfinite(vectors).all():
            raise ValueError(f"vectors: {vectors.shape} found, finite ({len(items)}, {dim}) wanted")
        with self._writing():
            given = [_values(item) for item in items]
            taken = self._many(_TAKE, given)
            pairs = [(old, new) for old, new in zip(taken, given, strict=True) if not _equal(old, new)]
            self._many(_UPDATE, [(*new, old[0]) for old, new in pairs])
            changed = [(old[0],) for old, new in pairs if old[3] != new[2]]
            self._many("DELETE FROM cloob_vectors WHERE item = ?", changed)
            self._put(number, [row[0] for row in taken], vectors)
            for source in {item.source for item in items}:
                self._forget(source, [item.path for item in items if item.source == source])

    def remove(self, ids: Sequence[int]) -> None:
        """Removes items with their vectors."""
        among, values = self._among([int(number) for number in ids])
        with self._writing():
            self._rows(f"DELETE FROM cloob_items WHERE id {among}", (values,))

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of them."""
        faults = sorted(faults, key=lambda fault: fault.path)
        with self._writing():
            self._many(
                "DELETE FROM cloob_items WHERE source = ? AND path = ?", [(source, each.path) for each in faults]
            )
            self._many(
                _FAULT, [(source, each.path, each.bytes, each.mtime_ns, valid(each.fault or "")) for each in faults]
            )

    def clear_faults(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that could not be read: they are gone."""
        with self._writing():
            self._forget(source, paths)

    def sources(self) -> tuple[str, ...]:
        """All sources that there are items or faults of, sorted."""
        rows = self._rows("SELECT source FROM cloob_items UNION SELECT source FROM cloob_faults")
        return tuple(sorted(row[0] for row in rows))

    def exclude(self, source: str) -> tuple[str, ...]:
        """The globs that an update leaves out of a source unless it is given others."""
        return tuple(row[0] for row in self._rows("SELECT glob FROM cloob_excludes WHERE source = ?", (source,)))

    def set_exclude(self, source: str, globs: Sequence[str]) -> None:
        """Replaces them."""
        with self._writing():
            self._rows("DELETE FROM cloob_excludes WHERE source = ?", (source,))
            self._many("INSERT INTO cloob_excludes VALUES (?, ?)", [(source, glob) for glob in globs])

    def columns(self) -> dict[str, str]:
        """The metadata columns beside an item's own by name, sorted; reads all items.

        Each is of the kind ``text``, ``number``, ``boolean``, or ``mixed``.
        """
        kinds = defaultdict(set)
        for name, kind in self._rows(f"SELECT DISTINCT {self._each}"):
            kinds[valid(str(name))].add(_KINDS.get(kind, kind))
        known = {name: sorted(some & {"text", "number", "boolean"}) for name, some in sorted(kinds.items())}
        return {name: "mixed" if len(some) > 1 else (some or ["number"])[0] for name, some in known.items()}

    def find(self, contents: Sequence[str]) -> dict[str, list[int]]:
        """Ids of the items that have these SHA-256, ascending; a content that no item has is left out."""
        among, values = self._among(list(contents))
        ids: dict[str, list[int]] = {}
        for content, number in self._rows(
            f"SELECT content, id FROM cloob_items WHERE content {among} ORDER BY id", (values,)
        ):
            ids.setdefault(content, []).append(number)
        return ids

    def count(self, where: Filter | None = None) -> int:
        """How many items there are, or match."""
        condition, values = self._condition(where)
        return int(self._rows(f"SELECT count(*) FROM cloob_items WHERE {condition}", values)[0][0])

    def ids(self, where: Filter | None = None, *, after: int = 0, limit: int | None = None) -> Ids:
        """Ids of the items that match, ascending, above ``after``."""
        condition, values = self._condition(where)
        rows = self._rows(
            f"SELECT id FROM cloob_items WHERE {condition} AND id > ? ORDER BY id LIMIT ?",
            (*values, after, 2**62 if limit is None else limit),
        )
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def last_id(self) -> int:
        """The largest id; 0 where there is none."""
        return int(self._rows("SELECT max(id) FROM cloob_items")[0][0] or 0)

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for; ids that are not there are left out."""
        among, values = self._among(wanted := [int(number) for number in ids])
        rows = self._rows(f"SELECT id, {_FIELDS} FROM cloob_items WHERE id {among}", (values,))
        items = {row[0]: _item(row) for row in rows}
        return [items[number] for number in wanted if number in items]

    def vectors(self, model: str, ids: Sequence[int]) -> Vectors:
        """(n, D) in the order asked for; rows of NaN where there is no vector."""
        number, dim = self._model(model)
        result = np.full((len(ids), dim), np.nan, np.float32)
        for start in range(0, len(ids), _PAGE):
            wanted = [int(item) for item in ids[start : start + _PAGE]]
            among, values = self._among(wanted)
            rows = self._rows(
                f"SELECT item, vector FROM cloob_vectors WHERE model = ? AND item {among}", (number, values)
            )
            found = [row[0] for row in rows]
            vectors = dict(zip(found, self._decode([row[1] for row in rows], found, dim), strict=True))
            for place, item in enumerate(wanted, start):
                result[place] = vectors.get(item, np.nan)
        return result

    def _forget(self, source: str, paths: Sequence[str]) -> None:
        among, values = self._among(list(paths))
        self._rows(f"DELETE FROM cloob_faults WHERE source = ? AND path {among}", (source, values))

    def _condition(self, where: Filter | None) -> tuple[str, Sequence[Any]]:
        return ("true", ()) if where is None else where.sql(self._dialect)

    def _model(self, name: str) -> tuple[int, int]:
        """A model's number and the width of its vectors."""
        rows = self._rows("SELECT id, dim FROM cloob_models WHERE name = ?", (name,))
        if not rows:
            names = [model.name for model in self.models()]
            raise InputError(f"{self.address}: has no vectors of a model {name!r}; {nearest(name, names)}")
        return int(rows[0][0]), int(rows[0][1])

    def _asked(self, model: str, queries: Vectors) -> tuple[int, int]:
        """As ``_model``; the queries have its width."""
        number, dim = self._model(model)
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries: {queries.shape} found, (Q, {dim}) wanted")
        return number, dim


def _values(item: Item) -> tuple[Any, ...]:
    """An item's fields but for its id."""
    sizes = (item.content, item.bytes, item.mtime_ns, item.width, item.height)
    texts = (None if text is None else valid(text) for text in (item.date, item.caption))
    columns = {
        valid(name): valid(value) if isinstance(value, str) else value
        for name, value in item.columns.items()
        if not (isinstance(value, float) and not math.isfinite(value))
    }
    return (item.source, item.path, *sizes, *texts, json.dumps(columns))


def _equal(row: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether a row with its id holds some values."""
    *facts, columns = values
    return list(row[1:-1]) == facts and (row[-1] == columns or row[-1] == json.loads(columns))


def _item(row: Sequence[Any]) -> Item:
    """The item of a row; a column that no source writes is left out."""
    *facts, stored = row
    try:
        columns: Any = json.loads(stored) if isinstance(stored, str) else stored
    except (ValueError, RecursionError):
        columns = {}
    known = columns.items() if isinstance(columns, dict) else ()
    fields = [*facts, {name: value for name, value in known if _is_value(value)}]
    return Item(*fields)


def _is_value(value: Value) -> bool:
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, str | int)
