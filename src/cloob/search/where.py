"""Filters: an SQL expression over the items' columns, on a connection that can do no
more than answer it.

``date >= '2024' and caption like '%dog%'``. The text may come from anybody. It has to
be one expression, its brackets closed, without comments; the connection reads a view of
the items and nothing else, calls the functions of a list, and stops after
``MOST_SECONDS``.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cloob.errors import InputError, nearest
from cloob.search.records import valid

SCHEMA = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
TEXTS = ("path", "name", "source", "date", "caption")  # columns of every item
NUMBERS = ("id", "bytes", "width", "height")
FUNCTIONS = frozenset(
    """abs coalesce date datetime glob ifnull iif instr json_extract julianday length
    like lower ltrim max min nullif replace round rtrim strftime substr substring time
    trim typeof unicode upper ->>""".split()  # noqa: SIM905
)
MOST_SECONDS = 5.0  # of processor time
MOST_BYTES = 10_000_000  # of a text that a filter makes
MOST_COLUMNS = 1_800  # of the sources: SQLite takes 2,000
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
STEPS = 20_000  # of SQLite's machine between two looks at the clock

# Paths are completed in SQL: a function of Python takes ten times as long.
PATH = "iif(substr(i.path, 1, 1) = '/', i.path, :around || '/' || i.path)"
SOURCE = (
    "(SELECT iif(path = '', :around, path) FROM main.cloob_sources WHERE id = i.source)"
)
_FOLDER = f"rtrim({PATH}, replace({PATH}, '/', ''))"
_FIXED = {
    "id": "i.id",
    "path": PATH,
    "name": f"substr({PATH}, length({_FOLDER}) + 1)",
    "source": SOURCE,
    "date": "i.date",
    "caption": "i.caption",
    "bytes": "i.bytes",
    "width": "i.width",
    "height": "i.height",
}
_TEXT = r"'(?:[^']|'')*'"
_NAME = r'"(?:[^"]|"")*"|`[^`]*`|\[[^]]*]'
_BARE_DATE = re.compile(r"(?<![\w.])\d{4}-\d\d(?!\d)")


@dataclass(frozen=True)
class Filter:
    """A text that is one expression; what it names is looked up when it is used."""

    text: str
    hidden: tuple[str, ...] = ()  # columns that it may not name


def parse(text: str, hidden: Sequence[str] = ()) -> Filter:
    """Checks a filter as far as that can be done without an index; InputError reports
    what is wrong.

    Example:
        >>> parse("date >= '2024'").text
        "date >= '2024'"
    """
    filter_ = Filter(valid(text), tuple(hidden))
    _check_shape(filter_.text)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.executescript(SCHEMA)
        with contextlib.suppress(UnknownColumn):  # which an index may have
            select_ids(connection, filter_, (), "", limit=0)
    return filter_


class UnknownColumn(InputError):  # noqa: N818
    """A filter names a column that is not there."""


def select_ids(
    connection: sqlite3.Connection,
    filter_: Filter,
    columns: Collection[str],
    around: str,
    order: str = "id",
    limit: int = -1,
) -> list[int]:
    """The ids of the items that a filter lets through, ``limit`` of them at most.

    Paths that are not absolute lie in the folder ``around`` the index. The
    connection is of this use alone, and reads nothing but the view afterwards.
    """
    shown = [name for name in (*_FIXED, *columns) if name not in filter_.hidden]
    _check_names(filter_.text, shown)
    view = f"items_{secrets.token_hex(16)}"  # a name that no filter can use
    _make_view(connection, view, shown, around)
    connection.set_authorizer(_authoriser(view))
    connection.set_progress_handler(_clock(), STEPS)
    statement = f'SELECT id FROM "{view}" WHERE ({filter_.text}\n)'
    statement += f" ORDER BY {order} LIMIT {limit}"
    try:
        return [row[0] for row in connection.execute(statement)]
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "").startswith(_DAMAGED):
            raise
        raise _mistake(str(error), filter_.text, shown) from None


def _check_shape(text: str) -> None:
    """Refuses what is not one expression, whatever stands around it."""
    if not text.strip():
        raise InputError("filter: it is empty; write one such as \"date >= '2024'\"")
    rest = re.sub(f"{_TEXT}|{_NAME}", " ", text)
    if sign := re.search(r"--|/\*|[;'\"`\[]", rest):
        raise _wrong(
            f"{sign[0]!r} is not taken: it begins another statement, a comment, or a"
            " text that does not end",
            text,
        )
    if date := _BARE_DATE.search(rest):
        raise _wrong(f"{date[0]} is a difference; a date goes in quotes", text)
    depth = 0
    for bracket in re.findall("[()]", rest):
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            break
    if depth:
        raise _wrong("a bracket is opened and not closed, or the reverse", text)


def _check_names(text: str, shown: Sequence[str]) -> None:
    """Refuses names in double quotes that no column has: SQLite takes them for text."""
    column_names = {name.lower() for name in shown}
    for quoted in filter(None, re.findall(f"{_TEXT}|({_NAME})", text)):
        name = quoted[1:-1].replace('""', '"')
        if name.lower() not in column_names:
            raise _unknown(name, text, shown)


def _make_view(
    connection: sqlite3.Connection,
    view: str,
    shown: Sequence[str],
    around: str,
) -> None:
    """Makes the view that a filter reads, of the columns that it may see, and ends
    writing.
    """
    names = ", ".join(f"{_sql_of(name)} AS {_quoted(name)}" for name in shown)
    # the authoriser hears of a table that is read by its column, so one is read always
    statement = f'CREATE TEMP VIEW "{view}" AS SELECT {names} FROM main.cloob_items i'
    statement += " WHERE i.content > 0"
    literal = around.replace("'", "''")
    connection.execute(statement.replace(":around", f"'{literal}'"))
    connection.execute("PRAGMA query_only = ON")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)


def _sql_of(name: str) -> str:
    if name in _FIXED:
        return _FIXED[name]
    path = f'$."{name}"'.replace("'", "''")
    return f"i.columns ->> '{path}'"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def filterable(name: str) -> bool:
    """Whether a filter can name a column of a source: no column of all items, and no
    name that JSON writes in another way.
    """
    return name not in _FIXED and name.isprintable() and not set('"\\') & set(name)


def _authoriser(view: str) -> Callable[..., int]:
    """Lets a statement read the view and call the functions of the list."""

    def authorise(
        action: int,
        first: str | None,
        second: str | None,
        _database: str | None,
        inside: str | None,
    ) -> int:
        """Allows a filter to read its view and call harmless functions, and nothing
        else.
        """
        allowed = action == sqlite3.SQLITE_SELECT
        if action == sqlite3.SQLITE_READ:
            allowed = view in (first, inside)
        elif action == sqlite3.SQLITE_FUNCTION:
            allowed = str(second).lower() in FUNCTIONS
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    return authorise


def _clock() -> Callable[[], bool]:
    """Says when the time of a filter is over; of this thread, as others may be busy."""
    end = time.thread_time() + MOST_SECONDS
    return lambda: time.thread_time() > end


def _mistake(message: str, text: str, shown: Sequence[str]) -> InputError:
    if match := re.fullmatch(r"no such column: (.*)", message, re.DOTALL):
        return _unknown(match[1], text, shown)
    if message == "interrupted":
        message = f"it takes more than {MOST_SECONDS:g} s"
    return _wrong(re.sub(r"items_[0-9a-f]{32}", "items", message), text)


def _unknown(name: str, text: str, shown: Sequence[str]) -> UnknownColumn:
    """Names the column that is meant; text in double quotes is taken for one."""
    wrong = _wrong(
        f"no column {name!r}; {nearest(name, shown)} ('text' in single quotes)", text
    )
    return UnknownColumn(str(wrong))


def _wrong(why: str, text: str) -> InputError:
    shown = " ".join(text.split())
    why = " ".join(why.split())
    return InputError(f"filter: {why} (in: {shown[:80]}{'…' * (len(shown) > 80)})")
