"""What keeps an index: its tables and statements.

Legend: n items, D the width of a model's vectors. Vectors are float32 unit rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, nearest, printable
from cloob.search.records import FileState, IndexedModel, Item, Name, valid
from cloob.search.where import STATEMENTS as SQL
from cloob.search.where import Dialect, Filter

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Order = Literal["id", "newest", "chance"]

FORMAT = 9  # the number of these tables
TABLES = Path(__file__).with_name("tables.sql").read_text(encoding="utf-8")
_PAGE = 10_000
_KINDS = {
    "string": "text",
    "integer": "number",
    "real": "number",
    "true": "boolean",
    "false": "boolean",
}


def check_format(address: str, number: int) -> None:
    """Raises InputError for an index of another format than this one."""
    if number != FORMAT:
        older = f"which this cloob does not read; {anew(address)}"
        why = older if number < FORMAT else f"of a newer cloob; this one reads {FORMAT}"
        raise InputError(f"{address}: is of format {number}, {why}")


def anew(address: str) -> str:
    """What to do with an index that cannot be read."""
    return (
        "delete it and index again, or do both: cloob index SRC --model M --out"
        f" {address} --anew"
    )


class Neighbours(NamedTuple):
    """The items nearest to a query, best first."""

    ids: Ids  # (k,)
    scores: Vectors  # (k,) cosines
    searched: int  # items that the filter lets through and the model has vectors of


class SourceSettings(NamedTuple):
    exclude: tuple[
        str, ...
    ] = ()  # globs that an update leaves out unless it is given others


class VectorTable(ABC):
    """The vectors of an index: here those of SQL; the items' database knows which item
    has one of which model.
    """

    def __init__(self, store: Any) -> None:
        self.store = store

    def write(
        self, model: IndexedModel, ids: Sequence[int], vectors: Vectors
    ) -> Sequence[Any]:
        """Keeps (n, D) vectors of items; returns the cells that SQL keeps of them,
        empty bytes where it keeps nothing.

        It is called inside the transaction that writes the items, before it is
        committed.
        """
        return vectors  # type: ignore[return-value]  # a cell per row

    def vectors(
        self, model: IndexedModel, ids: Sequence[int]
    ) -> tuple[Sequence[int], Vectors]:
        """Ids, of some thousands, that have a vector, in any order, and these."""
        statement = (
            "SELECT item, vector FROM cloob_vectors WHERE model = ? AND item"
            f" {self.store._among}"
        )
        rows = self.store._rows(statement, (model.number, ids))
        return [row[0] for row in rows], self.store._decode(
            [row[1] for row in rows], model.dim
        )

    @abstractmethod
    def nearest(
        self, model: IndexedModel, query: Vectors, top: int, where: Filter | None
    ) -> Neighbours:
        """The ``top`` items nearest to a query (D,), equal ones by id; ``Store.ids``
        applies a filter.
        """

    @abstractmethod
    def drop(self, model: IndexedModel) -> None:
        """Forgets all of a model."""

    @abstractmethod
    def optimise(self) -> None:
        """Prepares for searches, at the end of an update."""


class Store:
    """Items, metadata and vectors of one index.

    Every call that writes is one transaction: all of it or nothing.
    """

    address: str  # what opens it again; of a database without the password
    writable: bool
    table: VectorTable
    close: Callable[[], None]
    _dialect: Dialect
    _among: (
        str  # of the dialect: follows a column that has to have one of several values
    )
    _rows: Callable[
        ..., list[Any]
    ]  # runs a statement with values, which may be lists, for ``_among``
    _many: Callable[
        [str, Sequence[Sequence[Any]]], None
    ]  # runs a statement for every row of values
    _decode: Callable[[list[Any], int], Vectors]  # (n, D) of the cells of vectors
    _transaction: Callable[
        [], AbstractContextManager[object]
    ]  # all of it or nothing; one writer at a time

    def exclusive(self) -> AbstractContextManager[object]:
        """No other process updates meanwhile, or ``Busy``; in a database any number
        may.
        """
        return nullcontext()

    def _stored(self, source: str, path: str = "") -> tuple[str, str]:
        """A source and a path as the tables have them: of a source that holds the
        index, from where that is.
        """
        return source, path

    def _full(self, stored: str) -> str:
        """The source or path that the tables have as this."""
        return stored

    @contextmanager
    def _writing(self) -> Iterator[tuple[int, int]]:
        """One transaction: its revision, and the highest id that an item has had."""
        with self._transaction():
            yield self._rows(SQL["revise"], (secrets.randbits(62),))[0]

    def revision(self) -> int:
        """Grows with every committed change: caches and servers look here whether to
        read again.
        """
        return int(self._rows("SELECT max(revision) FROM cloob_revisions")[0][0])

    def models(self, *, unfinished: bool = False) -> tuple[IndexedModel, ...]:
        """The models in order; an unfinished one has the name of the one that it is to
        replace.
        """
        rows = self._rows(
            "SELECT name, spec, fingerprint, dim, id, replaces FROM cloob_models ORDER"
            " BY place, id"
        )
        return tuple(IndexedModel(*row) for row in rows if unfinished or row[5] is None)

    def model(self, name: Name = None) -> IndexedModel:
        """A model by its name; one that has other weights by now is not there any more.

        None: the first.
        """
        models, key, fingerprint = self.models(), name, None
        if isinstance(name, IndexedModel):
            models, key, fingerprint = (
                self.models(unfinished=True),
                name.name,
                name.fingerprint,
            )
        for model in models:
            if key in (None, model.name) and fingerprint in (None, model.fingerprint):
                return model
        why = (
            f"has no vectors of a model {key!r} (any more);"
            f" {nearest(str(key), [model.name for model in models])}"
        )
        raise InputError(
            f"{self.address}: {why if models else 'is empty; `cloob index` fills it'}"
        )

    def add_model(self, model: IndexedModel, *, replace: bool = False) -> IndexedModel:
        """Adds a model without vectors; one of the same weights gets the new place that
        it is loaded from.

        Where its name is that of other weights, InputError; or with ``replace`` it is
        added as unfinished, and these stay until :meth:`finish`.
        """
        with self._writing():
            old = next(
                (item for item in self.models() if item.name == model.name), model
            )
            if old.fingerprint != model.fingerprint:
                if not replace:
                    raise InputError(
                        f"{self.address}: holds vectors of another model"
                        f" {model.name!r}; index one of the two anew with"
                        " --replace-model, or under another --name"
                    )
                model = dataclasses.replace(model, replaces=old.number)
                for other in self.models(
                    unfinished=True
                ):  # it was to replace the same one
                    if (
                        other.replaces == old.number
                        and other.fingerprint != model.fingerprint
                    ):
                        self._drop(other)
            fields = (
                model.name,
                model.spec,
                model.fingerprint,
                model.dim,
                model.replaces,
                model.replaces,
            )
            self._rows(SQL["add_model"], fields)
            return self.model(model)

    def finish(self, model: IndexedModel) -> None:
        """Puts a model in the place of the one that it replaces, whose vectors go."""
        for old in [item for item in self.models() if item.number == model.replaces]:
            with self._writing():
                self._drop(old)
                self._rows(
                    "UPDATE cloob_models SET replaces = NULL WHERE id = ?",
                    (self.model(model).number,),
                )

    def remove_model(self, name: str | IndexedModel) -> None:
        with self._writing():
            self._drop(self.model(name))

    def _drop(self, model: IndexedModel) -> None:
        self._rows("DELETE FROM cloob_vectors WHERE model = ?", (model.number,))
        self._rows("DELETE FROM cloob_models WHERE id = ?", (model.number,))
        self.table.drop(model)

    def states(self, source: str) -> Iterator[FileState]:
        """What is known of the files of a source; the models are those that have a
        vector, by number.
        """
        stored = self._stored(source)[:1]
        for (id_, path, size, mtime, content), rows in groupby(
            self._rows(SQL["states"], stored), itemgetter(0, 1, 2, 3, 4)
        ):
            models = tuple(row[5] for row in rows if row[5] is not None)
            yield FileState(id_, self._full(path), size, mtime, content, None, models)
        faults = (
            "SELECT path, bytes, mtime_ns, fault FROM cloob_faults WHERE source = ?"
            " ORDER BY path"
        )
        for path, size, mtime, fault in self._rows(faults, stored):
            yield FileState(None, self._full(path), size, mtime, "", fault, ())

    def write(
        self, items: Sequence[Item], model: str | IndexedModel, vectors: Vectors
    ) -> list[int]:
        """Adds items, or replaces those of the same source and path, with their (n, D)
        vectors of one model; their ids.

        A replaced item keeps its id, and loses other models' vectors where its content
        differs.
        """
        rows = [
            (*self._stored(item.source, item.path), *_values(item)) for item in items
        ]
        with self._writing() as (revision, last):
            # in the transaction, so that vectors of other weights never come under its
            # name
            known = self.model(model)
            before, fresh = self._places(rows), count(last + 1)
            changed = [
                before[row[:2]][0]
                for row in rows
                if row[:2] in before and before[row[:2]][1] != row[2]
            ]
            self._rows(
                f"DELETE FROM cloob_vectors WHERE item {self._among}", (changed,)
            )
            ids = [
                before[row[:2]][0] if row[:2] in before else next(fresh) for row in rows
            ]
            self._rows(
                "UPDATE cloob_revisions SET last_id = ? WHERE revision = ?",
                (max([last, *ids]), revision),
            )
            self._many(
                SQL["replace_item"],
                [(id_, *row) for id_, row in zip(ids, rows, strict=True)],
            )
            cells = self.table.write(
                known, ids, np.ascontiguousarray(vectors, np.float32)
            )
            given = [
                (id_, known.number, revision, cell)
                for id_, cell in zip(ids, cells, strict=True)
            ]
            self._many(SQL["replace_vector"], given)
            there = f"SELECT source, path FROM cloob_items WHERE id {self._among}"
            self._rows(
                f"DELETE FROM cloob_faults WHERE (source, path) IN ({there})", (ids,)
            )
        return ids

    def _places(
        self, rows: Sequence[Sequence[Any]]
    ) -> dict[tuple[str, str], tuple[int, str]]:
        """Ids and contents of the items that are there, by source and path, of rows
        that begin with these.
        """
        statement = (
            "SELECT source, path, id, content FROM cloob_items WHERE source = ? AND"
            f" path {self._among}"
        )
        by_source = (
            (source, [row[1] for row in rows if row[0] == source])
            for source in {row[0] for row in rows}
        )
        matches = (row for values in by_source for row in self._rows(statement, values))
        return {
            (source, path): (id_, content) for source, path, id_, content in matches
        }

    def _forget(self, files: Sequence[tuple[str, str]]) -> None:
        """Deletes the items and the faults of some files of a source."""
        ids = [id_ for id_, _ in self._places(files).values()]
        self._rows(f"DELETE FROM cloob_items WHERE id {self._among}", (ids,))
        faults = f"DELETE FROM cloob_faults WHERE source = ? AND path {self._among}"
        self._rows(faults, (files[0][0], [path for _, path in files]))

    def remove(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that are gone, those that could not be read as well."""
        if paths:
            with self._writing():
                self._forget([self._stored(source, path) for path in paths])

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of
        them.
        """
        files = [self._stored(source, item.path) for item in faults]
        facts = [
            (item.bytes, item.mtime_ns, valid(item.fault or "")) for item in faults
        ]
        with self._writing():
            self._forget(files)
            statement = (
                "INSERT INTO cloob_faults (source, path, bytes, mtime_ns, fault) VALUES"
                " (?, ?, ?, ?, ?)"
            )
            self._many(
                statement,
                [(*file, *rest) for file, rest in zip(files, facts, strict=True)],
            )

    def sources(self) -> tuple[str, ...]:
        rows = self._rows(
            "SELECT source FROM cloob_items UNION SELECT source FROM cloob_faults"
        )
        return tuple(sorted(self._full(row[0]) for row in rows))

    def settings(self) -> dict[str, SourceSettings]:
        """How sources are read, where that was named."""
        rows = self._rows("SELECT source, exclude FROM cloob_sources")
        return {
            self._full(row[0]): SourceSettings(tuple(filter(None, row[1].split("\n"))))
            for row in rows
        }

    def set(self, source: str, settings: SourceSettings) -> None:
        with self._writing():
            self._rows(
                SQL["replace_source"],
                (self._stored(source)[0], "\n".join(settings.exclude)),
            )

    def having(self, model: IndexedModel, ids: Sequence[int]) -> list[int]:
        """Those of some ids that have a vector of a model."""
        statement = (
            f"SELECT item FROM cloob_vectors WHERE model = ? AND item {self._among}"
            " ORDER BY item"
        )
        return [row[0] for row in self._rows(statement, (model.number, list(ids)))]

    def known(self, model: IndexedModel, contents: Iterable[str]) -> dict[str, Vectors]:
        """The vector (D,) of every content that has one."""
        keys = list(contents)
        result = dict(
            self._rows(
                SQL["known"].format(self._among),
                (model.number, [key[:12] for key in keys], keys),
            )
        )
        result.pop(None, None)
        ids, rows = self.table.vectors(model, [*result]) if result else ((), ())
        return {result[id_]: row for id_, row in zip(ids, rows, strict=True)}

    def columns(self) -> dict[str, str]:
        """The sources' columns by name, sorted: ``text``, ``number``, ``boolean`` or
        ``mixed``; reads all items.
        """
        kinds: dict[str, set[str]] = defaultdict(set)
        for name, kind in self._rows(f"SELECT DISTINCT {self._dialect['each_column']}"):
            kinds[name] |= {_KINDS.get(kind, kind)} & {"text", "number", "boolean"}
        return {
            name: "mixed" if len(some) > 1 else [*some, "number"][0]
            for name, some in sorted(kinds.items())
        }

    def count(self, where: Filter | None = None) -> int:
        condition, values = self._condition(where)
        return int(
            self._rows(f"SELECT count(*) FROM cloob_items WHERE {condition}", values)[
                0
            ][0]
        )

    def ids(
        self, where: Filter | None = None, *, limit: int = 2**62, order: Order = "id"
    ) -> Ids:
        """Ids of the items that match: ascending, by date (those without one last), or
        by the hash of their bytes.
        """
        condition, values = self._condition(where)
        orders = {
            "newest": "coalesce(date, '') DESC, id DESC",
            "chance": "substr(content, 1, 12), id",
        }
        statement = (
            f"SELECT id FROM cloob_items WHERE {condition} ORDER BY"
            f" {orders.get(order, 'id')} LIMIT ?"
        )
        rows = self._rows(statement, (*values, limit))
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def pages(self, where: Filter | None = None) -> Iterator[list[int]]:
        """The ids of the items that match, ascending, some thousands at a time."""
        ids = self.ids(where)
        return (
            ids[start : start + _PAGE].tolist() for start in range(0, len(ids), _PAGE)
        )

    def items(self, ids: Sequence[int] | Ids) -> list[Item]:
        """Items in the order of the ids; those that are not there are left out."""
        order = list(map(int, ids))
        items: dict[int, Item] = {}
        for id_, source, path, *fields, columns in self._rows(
            SQL["items"].format(self._among), (order,)
        ):
            try:
                fields.append(
                    json.loads(columns) if isinstance(columns, str) else columns
                )
            except ValueError:
                raise InputError(
                    f"{self.address}: is damaged at {printable(path)};"
                    f" {anew(self.address)}"
                ) from None
            items[id_] = Item(id_, self._full(source), self._full(path), *fields)
        return [items[id_] for id_ in order if id_ in items]

    def vectors(self, model: str | IndexedModel, ids: Sequence[int] | Ids) -> Vectors:
        """(n, D) in the order of the ids; rows of NaN where there is no vector."""
        known = self.model(model)
        result = np.full((len(ids), known.dim), np.nan, np.float32)
        for start in range(0, len(ids), _PAGE):
            page = list(map(int, ids[start : start + _PAGE]))
            rows = dict(zip(*self.table.vectors(known, page), strict=True))
            for place, id_ in enumerate(page, start):
                result[place] = rows.get(id_, np.nan)
        return result

    def nearest(
        self,
        model: str | IndexedModel,
        query: Vectors,
        top: int,
        where: Filter | None = None,
    ) -> Neighbours:
        """The ``top`` items nearest to a query (D,), equal ones by id."""
        return self.table.nearest(self.model(model), query, top, where)

    def _condition(self, where: Filter | None) -> tuple[str, Sequence[Any]]:
        return ("true", ()) if where is None else where.sql(self._dialect)


def _values(item: Item) -> tuple[Any, ...]:
    """An item's fields but for its id, source and path, in the order of the table."""
    columns = {
        valid(name): valid(value) if isinstance(value, str) else value
        for name, value in item.columns.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
    sizes = (item.content, item.bytes, item.mtime_ns, item.width, item.height)
    return (
        *sizes,
        item.date and valid(item.date),
        item.caption and valid(item.caption),
        json.dumps(columns),
    )
