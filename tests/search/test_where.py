"""Filters: what they mean in SQLite is what a plain loop says, and no text gets out of its quotes."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from where_loop import matches

from cloob.errors import InputError
from cloob.search.records import Item
from cloob.search.where import NUMBERS, TEXTS, And, Comparison, Filter, Not, Or, parse, sql

ITEMS = [
    Item(1, "a", "a/dog.jpg", "", 10, 0, 640, 480, "2024-05-01T12:00:00", "A dog", {"camera": "X", "iso": 100}),
    Item(2, "a", "a/b.tar::c/Katze.png", "", 20, 0, 64, 48, "2023-12-31T23:59:59", "50% off_",
         {"iso": 100.5, "ok": True}),
    Item(3, "b", "top.gif", "", 30, None, 10, 10, None, None, {"iso": "100", "ok": False, "camera": None}),
    Item(4, "b", "b/'; drop table items; --.jpg", "", 2**40, 5, 1, 1, "2024", "it's Ä\\x",
         {'my "col"': 1, "$.iso": 7}),
    Item(5, "b", "b/::", "", 0, 5, 1, 1, "2025-01-01", "", {"iso": 10**30, "ok": 1, "camera": ""}),
]  # fmt: skip
OTHERS = ("camera", "iso", "ok", 'my "col"', "$.iso", "nowhere")


def ids(filter_: Filter, items: list[Item] = ITEMS) -> list[int]:
    """What SQLite finds among the items."""
    names = "id, source, path, bytes, width, height, date, caption"
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"create table items ({names}, columns)")
        for item in items:
            row = [getattr(item, name) for name in names.split(", ")]
            connection.execute("insert into items values (?,?,?,?,?,?,?,?,?)", (*row, json.dumps(dict(item.columns))))
        condition, parameters = sql(filter_, "sqlite")
        found = connection.execute(f"select id from items where {condition} order by id", parameters).fetchall()
        assert connection.execute("select count(*) from sqlite_master").fetchone() == (1,)
    return [row[0] for row in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("date >= 2024 and caption like '%dog%'", [1]),
        ("date >= 2024", [1, 4, 5]),
        ("date > 2024", [5]),
        ("date = 2024-05", [1]),
        ("date <= '2023-12-31 23:59'", [2]),
        ("date in (2024, 2025)", [1, 4, 5]),
        ("not date = 2024", [2, 3, 5]),
        ("date != 2024", [2, 5]),
        ("caption is null or caption = ''", [3, 5]),
        ("caption LIKE '50\\% off\\_'", [2]),
        ("name = 'Katze.png'", [2]),
        ("name like 'KATZE.%'", [2]),
        ("caption = 'it''s Ä\\x'", [4]),
        ("caption like '%ä%'", []),
        ("iso = 100", [1]),
        ("iso = '100'", [3]),
        ("iso > 100", [2, 5]),
        ("iso != 100", [2, 3, 5]),
        ("iso in (100, '100', 100.5)", [1, 2, 3]),
        ("ok = true", [2]),
        ("ok in (1, false)", [3, 5]),
        ("camera is null", [2, 3, 4]),
        ('"my ""col""" = 1', [4]),
        ('"$.iso" >= 7', [4]),
        ("bytes > 1e6 or (width = 640 and not height < 480)", [1, 4]),
        ("source not in ('a') and path not like 'b/%'", [3]),
    ],
)
def test_what_is_found(text: str, expected: list[int]) -> None:
    filter_ = parse(text, OTHERS)
    assert ids(filter_) == expected
    assert [item.id for item in ITEMS if matches(filter_, item)] == expected


columns = st.sampled_from((*TEXTS, *NUMBERS, *OTHERS))
values = st.sampled_from(
    (1, 7, 10, 100, 100.5, -1, 1e6, "", "100", "X", "%g%", "%", "_", "a\\_", "Dog", "it's Ä\\x", True, False)
)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    column = draw(columns)
    kinds = ["=", "!=", "<", "<=", ">", ">=", "in", "not in", "is null", "is not null"]
    operator = draw(st.sampled_from(kinds + ["like", "not like"] * (column not in NUMBERS)))
    if column == "date":
        fitting = st.sampled_from(("2024", "2023-12", "2024-05-01", "2024-05-01T12:00"))
    elif column in TEXTS:
        fitting = values.map(str)
    elif column in NUMBERS:
        fitting = values.filter(lambda v: not isinstance(v, str | bool))
    else:
        fitting = values.filter(lambda v: not isinstance(v, bool) or operator in ("=", "!=", "in", "not in"))
    if operator.endswith("null"):
        return Comparison(column, operator, None)
    if operator.endswith("like"):
        return Comparison(column, operator, draw(st.sampled_from(("%", "%g%", "A%", "_", "50\\%%", "", "100", "a\\_"))))
    if operator.endswith("in"):
        return Comparison(column, operator, tuple(draw(st.lists(fitting, min_size=1, max_size=4))))
    return Comparison(column, operator, draw(fitting))


filters = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: And(tuple(some))),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: Or(tuple(some))),
    ),
    max_leaves=6,
)


def written(filter_: Filter) -> str:
    """A filter as text."""
    if isinstance(filter_, Not):
        return f"not ({written(filter_.operand)})"
    if isinstance(filter_, And | Or):
        return (" and " if isinstance(filter_, And) else " OR ").join(f"({written(o)})" for o in filter_.operands)
    column = '"' + filter_.column.replace('"', '""') + '"'
    if filter_.value is None:
        return f"{column} {filter_.operator}"
    many = isinstance(filter_.value, tuple)
    literals = [_literal(value) for value in (filter_.value if many else (filter_.value,))]
    return f"{column} {filter_.operator} " + (f"({', '.join(literals)})" if many else literals[0])


def _literal(value: object) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value).lower()


@given(filters)
def test_sqlite_finds_what_a_loop_finds(filter_: Filter) -> None:
    assert ids(filter_) == [item.id for item in ITEMS if matches(filter_, item)]


@given(filters)
def test_what_is_written_is_read_back(filter_: Filter) -> None:
    assert parse(written(filter_), OTHERS) == filter_


KNOWN = re.compile(
    r"""(AND|OR|NOT|EXISTS|SELECT|FROM|WHERE|IS|NULL|LIKE|ILIKE|ESCAPE|IN|CASE|WHEN|THEN|ELSE|END|COLLATE|false
    |json_each|jsonb_typeof|coalesce|substr|replace|length|rtrim|columns|key|type|value|1|\d+|"C"|::(text|numeric|boolean)
    |'(integer|real|text|true|false|null|number|string|boolean|::|/|\\|)'
    |path|source|date|caption|id|bytes|width|height|->>?|[=<>]=?|!=|[(),+ ]|\?|%s)*""",
    re.VERBOSE,
)
"""All that a condition is made of; everything else is a parameter."""


@given(
    st.text()
    | st.text(alphabet="'\"\\%();-=<>! andorlikeinullt0123456789.e+", max_size=60)
    | filters.map(written).flatmap(
        lambda t: st.integers(0, len(t)).map(lambda i: t[:i] + "'; drop table items; --" + t[i:])
    )
)
@example("caption = '' or 1=1 --'")
@example("\"x\" = '\\' and id = 1 --")
def test_whatever_is_written_is_refused_or_goes_as_parameters(text: str) -> None:
    """The condition's own characters are a few known words; nothing of the text is among them."""
    try:
        filter_ = parse(text)
    except InputError:
        return
    for dialect, place in (("sqlite", "?"), ("postgresql", "%s")):
        condition, parameters = sql(filter_, dialect)
        assert condition.count(place) == len(parameters)
        assert KNOWN.fullmatch(condition), condition
        assert ";" not in condition and "--" not in condition and "drop" not in condition.lower()
    ids(filter_, [])
