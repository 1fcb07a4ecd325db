"""Filters: what they find, and that no text gets out of its quotes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from where_cases import CASES, COLUMNS, ITEMS

from cloob.errors import InputError
from cloob.search.records import IndexedModel
from cloob.search.sqlite import SqliteStore
from cloob.search.where import POSTGRESQL, SQLITE, parse


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteStore]:
    with closing(SqliteStore.create(tmp_path_factory.mktemp("where") / "index")) as store:
        store.add_model(IndexedModel("m", "m", "f", 1))
        store.write(ITEMS, "m", np.ones((len(ITEMS), 1), np.float32))
        yield store


@pytest.mark.parametrize("text", CASES)
def test_what_is_found(store: SqliteStore, text: str) -> None:
    assert store.ids(parse(text, COLUMNS)).tolist() == CASES[text]


KNOWN = re.compile(
    r"""(AND|OR|NOT|SELECT|FROM|WHERE|IS|NULL|LIKE|ILIKE|ESCAPE|IN|COLLATE|false|json_each|jsonb_each|jsonb_typeof
    |coalesce|cloob_lower|cloob_place|substr|replace|length|rtrim|columns|key|type|value|1|\d+|"C"|::(numeric|boolean)|\#>>
    |'(integer|real|text|true|false|null|number|string|boolean|::|/|\\|\{\}|)'
    |path|source|date|caption|id|bytes|width|height|[=<>]=?|!=|[(),+ ]|\?)*""",
    re.VERBOSE,
)
"""All that a condition is made of; everything else is a parameter."""


@given(
    st.text()
    | st.text(alphabet="'\"\\%();-=<>! andorlikeinullt0123456789.e+", max_size=60)
    | st.sampled_from(sorted(CASES)).flatmap(
        lambda t: st.integers(0, len(t)).map(lambda i: t[:i] + "'; drop table items; --" + t[i:])
    )
)
@example("caption = '' or 1=1 --'")
@example("\"x\" = '\\' and id = 1 --")
def test_whatever_is_written_is_refused_or_goes_as_parameters(store: SqliteStore, text: str) -> None:
    """The condition's own characters are a few known words; nothing of the text is among them."""
    try:
        filter_ = parse(text)
    except InputError:
        return
    for dialect in (SQLITE, POSTGRESQL):
        condition, parameters = filter_.sql(dialect)
        assert condition.count("?") == len(parameters)
        assert KNOWN.fullmatch(condition), condition
        assert ";" not in condition and "--" not in condition and "drop" not in condition.lower()
    assert store.count(filter_) <= len(ITEMS)
