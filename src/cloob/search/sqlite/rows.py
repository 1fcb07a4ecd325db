"""Items as rows of the database, and the statements that write them."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from types import UnionType
from typing import Any

from cloob.search.records import Item, Value
from cloob.search.sqlite.file import Connection, damaged, size_of

ITEM = "id, source, path, content, bytes, mtime_ns, width, height, date, caption, columns"
"""What ``item_of`` takes."""

ITEM_KINDS = (int, str, str, str, int, int | None, int, int, str | None, str | None, str)
"""Of these columns."""

INSERT = (
    "INSERT INTO items(source, path, content, bytes, mtime_ns, width, height, date, caption, columns) VALUES"
    " (CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, ?, ?, ?, CAST(? AS TEXT), CAST(? AS TEXT), ?)"
)
UPDATE = (
    "UPDATE items SET source = CAST(? AS TEXT), path = CAST(? AS TEXT), content = ?, bytes = ?,"
    " mtime_ns = ?, width = ?, height = ?, date = CAST(? AS TEXT), caption = CAST(? AS TEXT), columns = ? WHERE id = ?"
)
FORGET = "DELETE FROM faults WHERE source = CAST(? AS TEXT) AND path = CAST(? AS TEXT)"


def as_bytes(text: str | None) -> bytes | None:
    """Text as SQLite gets it: a file's name need not be UTF-8."""
    return None if text is None else text.encode("utf-8", "surrogateescape")


def values_of(item: Item) -> tuple[Any, ...]:
    """What ``INSERT`` and ``UPDATE`` take."""
    texts = (as_bytes(item.source), as_bytes(item.path))
    sizes = (item.content, item.bytes, item.mtime_ns, item.width, item.height)
    return (*texts, *sizes, as_bytes(item.date), as_bytes(item.caption), json.dumps(dict(item.columns)))


def read_rows(
    connection: Connection, statement: str, values: Sequence[Any], kinds: Sequence[type | UnionType]
) -> list[Any]:
    """All rows of a question that are as they should be: strict tables need not hold what they say they do.

    Args:
        connection: Where to ask.
        statement: What to ask.
        values: That go into it.
        kinds: What each row consists of.

    Raises:
        InputError: Something is of another kind, or all of it together more than the database holds.
    """
    most, held, rows = 0, 0, []
    for row in connection.execute(statement, values):
        if not all(map(isinstance, row, kinds)):
            raise damaged(connection.path, "a number stands where a text should, or the other way round")
        held += sum(len(value) for value in row if isinstance(value, str))
        if held > most and held > (most := size_of(connection)):  # of the state that is being read
            raise damaged(connection.path, "it refers to one text again and again")
        rows.append(row)
    return rows


def item_of(row: tuple[Any, ...]) -> Item:
    """The item of a row."""
    number, source, path, content, size, mtime, width, height, date, caption, columns = row
    return Item(number, source, path, content, size, mtime, width, height, date, caption, _columns(columns))


def _columns(text: str) -> dict[str, Value]:
    try:
        columns: dict[str, Value] = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, TypeError, RecursionError):
        columns = {}
    return columns if isinstance(columns, dict) else {}


def _finite(number: str) -> float | None:
    """A number of a column; None where JSON has none for it."""
    value = float(number)
    return value if math.isfinite(value) else None


def delete(connection: sqlite3.Connection, chosen: str, values: Sequence[Any]) -> None:
    """Removes the items whose ids a query gives, with their vectors."""
    ids = [(row[0],) for row in connection.execute(chosen, values)]
    connection.executemany("DELETE FROM vectors WHERE item = ?", ids)
    connection.executemany("DELETE FROM items WHERE id = ?", ids)
