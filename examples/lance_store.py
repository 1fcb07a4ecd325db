"""Vectors of an index in LanceDB: a store that is not SQL, as a
``cloob.search.store.VectorTable``.

    pip install lancedb
    PYTHONPATH=examples cloob index pictures --model runs/mine --out
    lance_store:open_store:pictures.idx PYTHONPATH=examples cloob search
    lance_store:open_store:pictures.idx "a red bird"

Paths, dates and captions stay in the SQLite file, which also knows which picture has a
vector of which model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from cloob.search.records import IndexedModel
from cloob.search.sqlite import SqliteStore
from cloob.search.store import Neighbours, Vectors, VectorTable
from cloob.search.where import Filter

MANY = 100_000  # vectors from which LanceDB searches by an index of its own
MARGIN = 100  # more than wanted are looked for, as some may have been removed


def open_store(
    folder: str, *, writable: bool = False, create: bool = False
) -> SqliteStore:
    """What ``cloob`` calls for an address ``lance_store:open_store:FOLDER``."""
    return SqliteStore(
        Path(folder), writable=writable, create=create, table=LanceVectors
    )


class LanceVectors(VectorTable):
    """A table of LanceDB for each model, in ``lance`` beside the SQLite file."""

    def __init__(self, store: SqliteStore) -> None:
        super().__init__(store)
        self.database = lancedb.connect(store.path.parent / "lance")

    def write(
        self, model: IndexedModel, ids: Sequence[int], vectors: Vectors
    ) -> Sequence[Any]:
        """Adds rows, or replaces those of the same id."""
        cells = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), model.dim
        )
        rows = pa.table({"id": pa.array(ids, pa.int64()), "vector": cells})
        table = self._table(model)
        if table is None:
            self.database.create_table(_name(model), rows)
        else:
            table.merge_insert(
                "id"
            ).when_matched_update_all().when_not_matched_insert_all().execute(rows)
        return [b""] * len(rows)  # SQLite keeps none of them

    def vectors(
        self, model: IndexedModel, ids: Sequence[int]
    ) -> tuple[Sequence[int], Vectors]:
        """Reads rows by id."""
        known = self.store.having(model, ids)
        if (table := self._table(model)) is None or not known:
            return [], np.empty((0, model.dim), np.float32)
        found = table.search().where(_among(known)).limit(len(known)).to_arrow()
        return found["id"].to_pylist(), _rows(found, model)

    def nearest(
        self, model: IndexedModel, query: Vectors, top: int, where: Filter | None
    ) -> Neighbours:
        """Searches; what SQLite no longer knows is left out."""
        allowed = self.store.having(model, self.store.ids(where).tolist())
        if (table := self._table(model)) is None or not allowed:
            return Neighbours(np.empty(0, np.int64), np.empty(0, np.float32), 0)
        search = table.search(np.asarray(query, np.float32)).distance_type("dot")
        if where is not None:
            search = search.where(_among(allowed), prefilter=True)
        found = search.limit(top + MARGIN).to_arrow()
        scores = _rows(found, model) @ query
        best = sorted(zip((-scores).tolist(), found["id"].to_pylist(), strict=True))
        known = {*allowed}
        kept = [(id_, -score) for score, id_ in best if id_ in known][:top]
        ids, scores = (
            np.array([id_ for id_, _ in kept], np.int64),
            np.array([s for _, s in kept], np.float32),
        )
        return Neighbours(ids, scores, len(allowed))

    def drop(self, model: IndexedModel) -> None:
        """Deletes the table of a model."""
        if self._table(model) is not None:
            self.database.drop_table(_name(model))

    def optimise(self) -> None:
        """Merges what was written in parts, and indexes what is large."""
        for model in self.store.models():
            table = self._table(model)
            if table is not None:
                table.optimize()
                if table.count_rows() > MANY and not table.list_indices():
                    table.create_index(metric="dot")

    def _table(self, model: IndexedModel) -> Any:
        try:
            return self.database.open_table(_name(model))
        except ValueError:  # nothing was written yet
            return None


def _name(model: IndexedModel) -> str:
    return f"model_{model.number}"


def _among(ids: Sequence[int]) -> str:
    return f"id IN ({', '.join(map(str, ids))})"


def _rows(found: pa.Table, model: IndexedModel) -> Vectors:
    return found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, model.dim)
