"""Nearest neighbours by pgvector: HNSW over float16 finds candidates, float32 ranks them.

A filter is applied while HNSW is walked (``hnsw.iterative_scan``), so that a filter that few items pass still gets as
many answers as were asked for; where the walk ends before that, the answer is computed exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from cloob.search.postgres.server import Server, vectors_table
from cloob.search.store import Neighbours, Vectors

HNSW_ROWS = 10_000
"""A model with more vectors gets an HNSW index; below, every search scans. Not tuned: at 10,000 a scan took
0.3 to 0.9 s while vectors were still stored outside their rows (docs/search-index.md), and was not measured since."""

_HNSW_DIM = 4_000  # halfvec's limit for an index
_CANDIDATES = 4  # times as many as asked for are ranked again
_EF_SEARCH = (200, 1000)  # the least (100 gave recall@10 0.938 at 100,000 vectors), and pgvector's most

Condition = tuple[str, Sequence[Any]]
"""Over ``cloob_items``, with its parameters."""


class Counts:
    """How many items a filter lets through, of one revision; counting reads all of them."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._counts: dict[tuple[Any, ...], int] = {}

    def get(self, server: Server, model: int, condition: Condition) -> int:
        """The count, counted once a revision."""
        revision = server.rows("SELECT revision FROM cloob_index")[0][0]
        key = (revision, model, condition[0], tuple(condition[1]))
        with self._lock:
            known = self._counts.get(key)
        if known is not None:
            return known
        table, (text, values) = vectors_table(model), condition
        joined = f"{table} JOIN cloob_items ON id = item WHERE {text}" if text != "true" else table
        count = int(server.rows(f"SELECT count(*) FROM {joined}", values)[0][0])
        with self._lock:
            if len(self._counts) >= self._most:
                self._counts.clear()
            self._counts[key] = count
        return count


def nearest(server: Server, counts: Counts, model: int, queries: Vectors, top: int, condition: Condition) -> Neighbours:
    """The ``top`` items nearest to each of (Q, D) queries that meet the condition, ties by id."""
    searched = counts.get(server, model, condition)
    wanted = min(top, searched)
    ids = np.zeros((len(queries), top), np.int64)
    scores = np.full((len(queries), top), -np.inf, np.float32)
    approximate = wanted > 0 and _has_index(server, model)
    for i, query in enumerate(np.ascontiguousarray(queries, np.float32)):
        rows = _walk(server, model, query, wanted, condition) if approximate else []
        if len(rows) < wanted:
            rows = _scan(server, model, query, wanted, condition)
        for j, (item, score) in enumerate(rows):
            ids[i, j], scores[i, j] = item, score
    return Neighbours(ids, scores, searched)


def build(server: Server, model: int, dim: int) -> None:
    """Makes an HNSW index of a model's vectors where there are many and it is missing; searches go on meanwhile."""
    table = vectors_table(model)
    count = int(server.rows(f"SELECT count(*) FROM {table}")[0][0])
    if count > HNSW_ROWS and dim <= _HNSW_DIM and not _has_index(server, model):
        server.build(f"DROP INDEX CONCURRENTLY IF EXISTS {table}_hnsw")  # of a build that broke off
        server.build(
            f"CREATE INDEX CONCURRENTLY {table}_hnsw ON {table} USING hnsw ((vector::halfvec({dim})) halfvec_ip_ops)"
        )
    server.build(f"ANALYZE {table}")
    server.build("ANALYZE cloob_items")


def to_numpy(vector: Any) -> Vectors:
    """What pgvector's adapter gave, its own class or an array, as float32."""
    array: Vectors = np.asarray(vector.to_numpy() if hasattr(vector, "to_numpy") else vector, np.float32)
    return array


def _has_index(server: Server, model: int) -> bool:
    """Whether there is an HNSW index that is whole."""
    return bool(
        server.rows(
            "SELECT 1 FROM pg_index WHERE indexrelid = to_regclass(%s) AND indisvalid",
            (f"{vectors_table(model)}_hnsw",),
        )
    )


def _walk(server: Server, model: int, query: Vectors, top: int, condition: Condition) -> list[Any]:
    """By the HNSW index; may come back with fewer than there are."""
    table, (text, values) = vectors_table(model), condition
    joined = f"{table} JOIN cloob_items ON id = item WHERE {text}" if text != "true" else table
    candidates = top * _CANDIDATES
    half = f"halfvec({query.shape[0]})"
    with server.transaction() as cursor:
        cursor.execute("SET LOCAL hnsw.iterative_scan = relaxed_order")
        cursor.execute(f"SET LOCAL hnsw.ef_search = {max(_EF_SEARCH[0], min(_EF_SEARCH[1], candidates))}")
        cursor.execute("SET LOCAL enable_seqscan = off")
        statement: Any = (
            f"WITH near AS MATERIALIZED (SELECT item, vector FROM {joined}"
            f" ORDER BY (vector::{half}) <#> %s::{half} LIMIT %s)"
            " SELECT item, -(vector <#> %s) AS score FROM near ORDER BY score DESC, item LIMIT %s"
        )
        return cursor.execute(statement, (*values, query, candidates, query, top)).fetchall()


def _scan(server: Server, model: int, query: Vectors, top: int, condition: Condition) -> list[Any]:
    """Exactly, by all vectors."""
    table, (text, values) = vectors_table(model), condition
    joined = f"{table} JOIN cloob_items ON id = item WHERE {text}" if text != "true" else table
    return server.rows(
        f"SELECT item, -(vector <#> %s) AS score FROM {joined} ORDER BY score DESC, item LIMIT %s",
        (query, *values, top),
    )
