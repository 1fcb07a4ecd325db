"""Filters are SQL expressions over the items' columns, and nothing more."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from index_fakes import item, units, write

from cloob.errors import InputError
from cloob.search import where
from cloob.search.records import IndexedModel
from cloob.search.store import Store

HOSTILE = json.loads(Path(__file__).with_name("hostile.json").read_text("utf-8"))
ROWS = [
    item(
        f"a/b{number}.png",
        date=f"20{20 + number}-05-01T10:00:00",
        caption=f"a dog {number}" if number % 2 else None,
        width=10 * number,
        columns={"year": 2020 + number, "indoor": number > 2, "größe": 1.5, "a b": "x"},
    )
    for number in range(1, 5)
]
FOUND = {
    "width > 20": [3, 4],
    "width between 20 and 30": [2, 3],
    "not width > 20": [1, 2],
    "date >= '2023'": [3, 4],
    "date like '2022-05%'": [2],
    "caption like '%DOG%' and year < 2023": [1],
    "caption is null or id = 1": [1, 2, 4],
    "year in (2021, 2024)": [1, 4],
    "indoor": [3, 4],
    "indoor = true": [3, 4],
    "größe = 1.5 and \"a b\" = 'x'": [1, 2, 3, 4],
    "YEAR = 2021": [1],
    "name = 'b2.png' or path = '/src/a/b3.png'": [2, 3],
    "source = '/src' and bytes = 3 and height = 9": [1, 2, 3, 4],
    "lower(substr(caption, 1, 1)) = 'a'": [1, 3],
    "coalesce(caption, 'none') = 'none'": [2, 4],
    "case when width > 20 then 1 else 0 end": [3, 4],
    "'--' = '/* */' or caption = ';' or width = 10": [1],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("where") / "index"
    with closing(Store(folder, create=True)) as store:
        write(store, ROWS, IndexedModel("m", "m", "f", 8), units(len(ROWS)))
        yield store


@pytest.mark.parametrize("text", FOUND)
def test_what_is_found(store, text):
    filter_ = where.parse(text)
    assert store.ids(filter_).tolist() == FOUND[text]
    assert store.count(filter_) == len(FOUND[text])
    newest = store.ids(filter_, order="newest", limit=1).tolist()
    assert newest == FOUND[text][-1:]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_question_about_the_items_is_refused(store, text):
    before = Path(store.path).read_bytes()
    with pytest.raises(InputError, match=r"^filter: ") as caught:
        store.ids(where.parse(text))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert Path(store.path).read_bytes() == before
    assert store.count() == len(ROWS)


def test_a_hidden_column_is_not_there(store):
    for text in (
        "path = 'x'",
        "\"path\" = 'x'",
        "length(source) > 1",
        "[source] = 'a'",
    ):
        with pytest.raises(InputError, match=r"no column '(path|source)'"):
            store.ids(where.parse(text, ("path", "source")))
    assert store.ids(where.parse("width = 10", ("path", "source"))).tolist() == [1]


def test_a_mistake_names_the_column_that_is_meant(store):
    for text in ("captoin = 'a'", "\"captoin\" = 'a'"):
        with pytest.raises(InputError, match="did you mean caption"):
            store.ids(where.parse(text))


def test_what_takes_too_long_is_stopped(store, monkeypatch):
    monkeypatch.setattr(where, "STEPS", 1)
    ticks = iter([0.0, *[1e6] * 10_000])
    monkeypatch.setattr(where.time, "thread_time", lambda: next(ticks))
    with pytest.raises(InputError, match="it takes more than"):
        store.ids(where.parse("width > 0"))


@given(
    st.text(max_size=40)
    | st.text(
        alphabet="'\"\\%();-=<>! andorlikeselectfrom*/`[]?:@$0123456789.e+",
        max_size=60,
    )
    | st.sampled_from(sorted(FOUND)).flatmap(
        lambda text: st.integers(0, len(text)).map(
            lambda i: text[:i] + "'; drop table cloob_items; --" + text[i:]
        )
    )
)
@example("caption = '' or 1=1 --'")
@example("\"x\" = '\\' and id = 1 --")
def test_whatever_is_written_is_refused_in_one_line_or_lets_items_through(store, text):
    mistake = ""
    found = []
    try:
        found = store.ids(where.parse(text)).tolist()
    except InputError as error:
        mistake = str(error)
    assert "\n" not in mistake
    assert {*found} <= {1, 2, 3, 4}
    assert store.count() == len(ROWS)


def test_the_limits_of_another_connection_stay(store):
    """A filter's connection is its own: afterwards the store reads and writes."""
    store.ids(where.parse("width > 0"))
    write(
        store,
        [item("new", caption="x" * 100)],
        IndexedModel("m", "m", "f", 8),
        units(1),
    )
    store.remove("/src", ["/src/new"])
    assert store.rows("SELECT count(*) FROM cloob_model") == [(1,)]
    refused = pytest.raises(InputError, match="may not be written")
    with refused, store.reader() as connection:
        connection.execute("DELETE FROM cloob_items")
