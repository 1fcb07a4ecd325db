"""The store of several machines: PostgreSQL with pgvector.

HNSW over float16 finds candidates, float32 ranks them. A filter is applied while HNSW is walked
(``hnsw.iterative_scan``), so that a filter that few items pass still gets as many answers as were asked for; where the
walk ends before that, the answer is computed exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cloob.errors import InputError
from cloob.search.postgres.server import Server
from cloob.search.records import Item
from cloob.search.store import Neighbours, Store, Vectors
from cloob.search.where import POSTGRESQL, Filter

HNSW_ROWS = 10_000
"""A model with more vectors gets an HNSW index; below, every search scans. Not tuned: at 10,000 a scan took
0.3 to 0.9 s while vectors were still stored outside their rows, and was not measured since."""

_HNSW_DIM = 4_000  # halfvec's limit for an index
_CANDIDATES = 4  # times as many as asked for are ranked again
_EF_SEARCH = (200, 1000)  # the least (100 gave recall@10 0.938 at 100,000 vectors), and pgvector's most
_COUNTS = 256  # of filters that are kept


class PostgresStore(Store):
    """An index in the tables of one PostgreSQL schema; any number of processes and machines read and write at once."""

    _dialect = POSTGRESQL
    _max_dim = 16_000
    _each = "key, jsonb_typeof(value) FROM cloob_items, jsonb_each(columns)"

    def __init__(self, address: str, *, writable: bool = False, create: bool = False) -> None:
        self._writable = writable or create
        self._server = Server(address, writable=self._writable, create=create)
        self.address = self._server.address
        self._counts: dict[tuple[Any, ...], int] = {}

    def close(self) -> None:
        """Ends the connection."""
        self._server.close()

    def write(self, items: Sequence[Item], model: str, vectors: Vectors) -> None:
        """As of any store; in the order of the places, so that no two writers wait for each other."""
        order = sorted(range(len(items)), key=lambda i: (items[i].source, items[i].path))
        super().write([items[i] for i in order], model, vectors[order])

    def nearest(self, model: str, queries: Vectors, top: int, where: Filter | None = None) -> Neighbours:
        """The items nearest to each query: by HNSW where :meth:`optimise` made it, exactly ranked; else exact."""
        number, _ = self._asked(model, queries)
        condition, values = self._condition(where)
        among = f"cloob_vectors WHERE model = {number}"
        if where is not None:
            among = f"cloob_vectors JOIN cloob_items ON id = item WHERE model = {number} AND {condition}"
        searched = self._count(among, values)
        wanted = min(top, searched)
        ids = np.zeros((len(queries), top), np.int64)
        scores = np.full((len(queries), top), -np.inf, np.float32)
        walks = wanted > 0 and self._has_hnsw(number)
        for i, query in enumerate(np.ascontiguousarray(queries, np.float32)):
            rows = self._walk(among, query, wanted, values) if walks else []
            if len(rows) < wanted:
                rows = self._rows(
                    f"SELECT item, -(vector <#> ?) AS score FROM {among} ORDER BY score DESC, item LIMIT ?",
                    (query, *values, wanted),
                )
            for j, (item, score) in enumerate(rows):
                ids[i, j], scores[i, j] = item, score
        return Neighbours(ids, scores, searched)

    def optimise(self) -> None:
        """Makes an HNSW index of each model's vectors once there are many, and counts for the planner."""
        for number, dim in self._rows("SELECT id, dim FROM cloob_models"):
            ((count,),) = self._rows("SELECT count(*) FROM cloob_vectors WHERE model = ?", (number,))
            if count > HNSW_ROWS and dim <= _HNSW_DIM and not self._has_hnsw(number):
                self._rows(f"DROP INDEX CONCURRENTLY IF EXISTS {_hnsw(number)}")  # of a build that broke off
                self._rows(
                    f"CREATE INDEX CONCURRENTLY {_hnsw(number)} ON cloob_vectors"
                    f" USING hnsw ((vector::halfvec({dim})) halfvec_ip_ops) WHERE model = {number}"
                )
        self._rows("ANALYZE cloob_vectors")
        self._rows("ANALYZE cloob_items")

    def _count(self, among: str, values: Sequence[Any]) -> int:
        """How many vectors a filter lets through, counted once a revision: that reads all of them."""
        key = (self.revision(), among, *values)
        if key not in self._counts:
            if len(self._counts) >= _COUNTS:
                self._counts.clear()
            self._counts[key] = int(self._rows(f"SELECT count(*) FROM {among}", values)[0][0])
        return self._counts[key]

    def _has_hnsw(self, model: int) -> bool:
        """Whether there is an HNSW index that is whole."""
        statement = "SELECT 1 FROM pg_index WHERE indexrelid = to_regclass(?) AND indisvalid"
        return bool(self._rows(statement, (_hnsw(model),)))

    def _walk(self, among: str, query: Vectors, top: int, values: Sequence[Any]) -> list[Any]:
        """By the HNSW index; may come back with fewer than there are."""
        candidates = top * _CANDIDATES
        half = f"halfvec({query.shape[0]})"
        with self._server.transaction():
            self._rows(
                "SELECT set_config('enable_sort', 'off', true), set_config('enable_seqscan', 'off', true),"
                " set_config('hnsw.iterative_scan', 'relaxed_order', true), set_config('hnsw.ef_search', ?, true)",
                (str(max(_EF_SEARCH[0], min(_EF_SEARCH[1], candidates))),),
            )
            return self._rows(
                f"WITH near AS MATERIALIZED (SELECT item, vector FROM {among}"
                f" ORDER BY (vector::{half}) <#> ?::{half} LIMIT ?)"
                " SELECT item, -(vector <#> ?) AS score FROM near ORDER BY score DESC, item LIMIT ?",
                (*values, query, candidates, query, top),
            )

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        return self._server.rows(statement, values)

    def _many(self, statement: str, rows: Sequence[Sequence[Any]]) -> list[Any]:
        return self._server.many(statement, rows)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if not self._writable:
            raise InputError(f"{self.address}: was opened to be read")
        with self._server.transaction():
            yield
            self._rows("UPDATE cloob_revisions SET revision = revision + 1")

    def _among(self, values: Sequence[Any]) -> tuple[str, Any]:
        return "= ANY(?)", list(values)

    def _put(self, model: int, ids: Sequence[int], vectors: Vectors) -> None:
        self._rows("DELETE FROM cloob_vectors WHERE model = ? AND item = ANY(?)", (model, list(ids)))
        last = dict(zip(ids, vectors, strict=True))
        rows = ((item, model, 0, vector) for item, vector in last.items())
        self._server.copy("cloob_vectors (item, model, revision, vector)", ("int8", "int8", "int8", "vector"), rows)

    def _decode(self, cells: Sequence[Any], ids: Sequence[int], dim: int) -> Vectors:
        vectors = [cell.to_numpy() if hasattr(cell, "to_numpy") else cell for cell in cells]
        return np.array(vectors, np.float32).reshape(len(ids), dim)

    def _let_go(self, model: int) -> None:
        self._rows(f"DROP INDEX IF EXISTS {_hnsw(model)}")


def _hnsw(model: int) -> str:
    return f"cloob_vectors_{model}_hnsw"
