"""Items and vectors into PostgreSQL: a few statements a batch, however many rows it has.

The rows go in by one ``INSERT`` over arrays, the vectors by ``COPY`` in binary. Several indexers may write the same
places: the ``INSERT`` takes all its rows, new ones and those that are there, in the order of their places, so that no
two writers wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cloob.search.postgres.rows import FIELDS, UPDATE, place_of, values_of
from cloob.search.postgres.server import Server, vectors_table
from cloob.search.records import Item
from cloob.search.store import Vectors

if TYPE_CHECKING:
    from psycopg import Cursor

# A row that is there is locked by an update that changes nothing, so that its old content comes back.
_TAKE = f"""
INSERT INTO cloob_items ({FIELDS})
SELECT source, path, content, bytes, mtime_ns, width, height, date, caption, columns::jsonb
FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::int[], %s::int[], %s::text[],
  %s::text[], %s::text[]) WITH ORDINALITY AS given({FIELDS}, number) ORDER BY number
ON CONFLICT (md5(source), md5(path)) DO UPDATE SET path = EXCLUDED.path
RETURNING source, path, id, content, xmax <> 0"""
_FORGET = """
DELETE FROM cloob_faults USING unnest(%s::text[], %s::text[]) AS given(source, path)
WHERE md5(cloob_faults.source) = md5(given.source) AND md5(cloob_faults.path) = md5(given.path)"""


def write(server: Server, model: int, others: Sequence[int], items: Sequence[Item], vectors: Vectors) -> None:
    """Adds items, or replaces those of the same place, with their vectors of one model: one transaction.

    Args:
        server: Where to.
        model: The model's number.
        others: The numbers of the other models, whose vectors go where an item's content has changed.
        items: n; of one place twice the last counts.
        vectors: (n, D) float32.
    """
    last = {place_of(item): number for number, item in enumerate(items)}
    places = sorted(last)
    if not places:
        return
    given = {place: values_of(items[last[place]]) for place in places}
    with server.transaction(write=True) as cursor:
        # psycopg asks for a sequence of parameters: an array a column.
        columns = [list(column) for column in zip(*given.values(), strict=True)]
        taken = cursor.execute(_TAKE, columns).fetchall()
        ids = {(source, path): number for source, path, number, _, _ in taken}
        known = [(ids[source, path], given[source, path], old) for source, path, _, old, there in taken if there]
        if known:
            cursor.executemany(UPDATE, [(*values, number) for number, values, _ in known])
            changed = [number for number, values, old in known if values[2] != old]
            for table in map(vectors_table, others):
                cursor.execute(f"DELETE FROM {table} WHERE item = ANY(%s)", (changed,))
            numbers = [number for number, _, _ in known]
            cursor.execute(f"DELETE FROM {vectors_table(model)} WHERE item = ANY(%s)", (numbers,))
        _copy(cursor, vectors_table(model), [ids[place] for place in places], vectors[[last[p] for p in places]])
        cursor.execute(_FORGET, columns[:2])


def _copy(cursor: Cursor[Any], table: str, ids: Sequence[int], vectors: Vectors) -> None:
    with cursor.copy(f"COPY {table} (item, vector) FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["int8", "vector"])
        for number, vector in zip(ids, vectors, strict=True):
            copy.write_row((number, vector))
