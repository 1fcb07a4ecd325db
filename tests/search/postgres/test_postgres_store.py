"""The store in PostgreSQL against the one in SQLite, on a real server."""

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_fakes import item, units
from where_cases import CASES, ITEMS

from cloob.errors import InputError
from cloob.search import postgres as postgres_module
from cloob.search.postgres import PostgresStore
from cloob.search.records import FileState, IndexedModel
from cloob.search.sqlite import SqliteStore
from cloob.search.where import parse

MODEL = IndexedModel("small", "runs/small", "f" * 64, 8)
OTHER = IndexedModel("other", "runs/other", "0" * 64, 3)


@pytest.fixture
def store(address):
    with closing(PostgresStore(address, create=True)) as store:
        store.add_model(MODEL)
        yield store


def seen(store):
    """All that an index holds, by path, without ids."""
    items = store.items(store.ids().tolist())
    states = [state for source in store.sources() for state in store.states(source)]
    names = [model.name for model in store.models()]
    vectors = {name: store.vectors(name, [one.id for one in items]) for name in names}
    return {
        "items": {
            one.path: (one.content, one.caption, one.date, dict(one.columns))
            for one in items
        },
        "states": sorted(
            (s.path, s.content, s.fault, s.models, s.id is None) for s in states
        ),
        "vectors": {
            (name, one.path): str(vectors[name][place])
            for name in names
            for place, one in enumerate(items)
        },
        "columns": store.columns(),
        "newest": [one.date for one in store.items(store.ids(limit=3, order="newest"))],
    }


_WORDS = st.sampled_from(["dog", "cat's", 'say "hi"', "naïve ☃", "50 %", "a\\b", ""])
_COLUMNS = st.dictionaries(
    st.sampled_from(["camera", "stars", "a b"]),
    st.one_of(_WORDS, st.integers(-9, 9), st.booleans(), st.none()),
)
_ITEMS = st.lists(
    st.builds(
        item,
        st.sampled_from(["a.jpg", "b.jpg", "sub/c.jpg", "x" * 2000]),
        st.sampled_from(["1", "2"]),
        caption=st.none() | _WORDS,
        date=st.none()
        | st.sampled_from(["2023-12-31T23:59:59", "2024-05-01T08:00:00"]),
        columns=_COLUMNS,
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one.path,
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _ITEMS, st.sampled_from([MODEL, OTHER])),
        st.tuples(st.just("remove"), st.sampled_from(["a.jpg", "b.jpg", "z.jpg"])),
        st.tuples(st.just("fault"), st.sampled_from(["a.jpg", "z.jpg"])),
    ),
    max_size=8,
)


def play(store, steps):
    for seed, (step, *what) in enumerate(steps):
        if step == "write":
            store.write(what[0], what[1].name, units(len(what[0]), what[1].dim, seed))
        elif step == "remove":
            store.remove("SRC", [what[0]])
        else:
            store.write_faults(
                "SRC", [FileState(None, what[0], 5, 2, "", "corrupt image", ())]
            )


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=_STEPS)
def test_it_does_what_sqlite_does(address, tmp_path_factory, steps):
    with psycopg.connect(address, autocommit=True) as connection:
        for (table,) in connection.execute(
            "SELECT tablename FROM pg_tables WHERE tablename LIKE 'cloob%'"
        ).fetchall():
            connection.execute(f"DROP TABLE {table} CASCADE".encode())
    stores = [
        PostgresStore(address, create=True),
        SqliteStore(tmp_path_factory.mktemp("index"), create=True),
    ]
    for store in stores:
        store.add_model(MODEL)
        store.add_model(OTHER)
        play(store, steps)
    assert (
        stores[0].revision()
        == stores[1].revision()
        >= sum(step == "write" for step, *_ in steps)
    )
    assert seen(stores[0]) == seen(stores[1])
    for top, text in (
        (2, ""),
        (9, ""),
        (2, "id > 0"),
        (9, "not date is null"),
    ):  # 9 are more than there are
        filter_ = parse(text) if text else None
        found = [
            store.nearest(MODEL.name, units(1, MODEL.dim, 99)[0], top, filter_)
            for store in stores
        ]
        assert found[0].searched == found[1].searched
        np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-6)
    for store in stores:
        store.remove_model(OTHER.name)
        assert store.models() == (MODEL,)
        store.close()


def test_filters_find_what_they_find_in_sqlite(store):
    store.write(ITEMS, MODEL.name, units(len(ITEMS), MODEL.dim))
    ids = {one.path: one.id for one in store.items(store.ids().tolist())}
    numbers = {ids[one.path]: one.id for one in ITEMS}
    found = {
        text: sorted(numbers[id_] for id_ in store.ids(parse(text)).tolist())
        for text in CASES
        if "id" not in text
        and not (
            "like" in text and not text.isascii()
        )  # the database's locale decides these
    }
    assert found == {text: CASES[text] for text in found} and len(found) > 25


def test_a_connection_that_the_server_dropped_is_made_anew(address, store):
    with psycopg.connect(address, autocommit=True) as other:
        ours = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid !="
            " pg_backend_pid() AND backend_type = %s"
        )
        assert other.execute(ours, ("client backend",)).fetchall()
    assert store.models() == (MODEL,)


def fill(store, n):
    vectors = units(n, MODEL.dim, 7)
    vectors[n // 2] = vectors[0]  # a tie, which the smaller id wins
    items = [item(f"{i:06}.jpg", str(i), columns={"i": i}) for i in range(n)]
    store.write(items, MODEL.name, vectors)
    return vectors


def loop(vectors, query, top, allowed):
    return sorted(allowed, key=lambda i: (-float(np.float32(vectors[i] @ query)), i))[
        :top
    ]


@pytest.mark.nightly
def test_hnsw_finds_what_is_near_and_fills_up_behind_a_narrow_filter(
    address, store, monkeypatch
):
    monkeypatch.setattr(postgres_module, "HNSW_ROWS", 1000)
    vectors = fill(store, 1500)
    store.table.optimise()
    ids = store.ids()
    queries = units(20, MODEL.dim, 3)
    found = [store.nearest(MODEL.name, query, 10) for query in queries]
    best = [
        [int(ids[i]) for i in loop(vectors, query, 10, range(1500))]
        for query in queries
    ]
    hits = [
        len(set(each.ids.tolist()) & set(wanted))
        for each, wanted in zip(found, best, strict=True)
    ]
    assert np.mean(hits) >= 9.5 and all(
        (np.diff(each.scores) <= 0).all() for each in found
    )
    for query in queries[:3]:
        narrow = store.nearest(MODEL.name, query, 10, parse("i in (3, 700, 1400)"))
        assert narrow.ids.tolist() == [
            ids[i] for i in loop(vectors, query, 3, [3, 700, 1400])
        ]
    with psycopg.connect(address) as connection:
        assert connection.execute(
            "SELECT 1 FROM pg_indexes WHERE indexname = 'cloob_vectors_1_hnsw'"
        ).fetchone()


@pytest.mark.nightly
def test_two_writers_and_a_reader(address, store):
    """Two processes write halves that overlap, in opposite orders; nothing is lost,
    doubled or stuck.
    """
    script = (
        "import sys; import numpy as np; from cloob.search.postgres import"
        " PostgresStore; from cloob.search.records import Item\nstore ="
        " PostgresStore(sys.argv[1], writable=True)\nfor start in (range(0, 120, 20) if"
        " sys.argv[2] == 'up' else range(100, -20, -20)):\n    names = [f'{i}.jpg' for"
        " i in range(start, start + 20)]\n    if sys.argv[2] == 'down':"
        " names.reverse()\n    items = [Item(0, 'SRC', name, name, 1, 1, 1, 1) for name"
        " in names]\n    vectors = np.zeros((20, 8), np.float32); vectors[:, 0] = 1\n  "
        "  store.write(items, 'small', vectors)\n"
    )
    words = [sys.executable, "-c", script, address]
    writers = [
        subprocess.Popen([*words, way], stderr=subprocess.PIPE)
        for way in ("up", "down")
    ]
    revisions = [store.revision()]
    while any(writer.poll() is None for writer in writers):
        revisions.append(store.revision())
        assert store.count() % 20 == 0  # whole batches only
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert revisions == sorted(revisions)
    assert (
        store.count() == 120
        and store.nearest("small", units(1, 8)[0], 1).searched == 120
    )
    assert store.revision() == revisions[0] + 12


@pytest.mark.nightly
def test_errors_are_one_line_without_the_password(postgres, address, tmp_path):
    cases = {
        postgres.replace("pass%20word", "wrong"): "password authentication failed",
        postgres.replace("/postgres", "/nowhere"): 'database "nowhere" does not exist',
        "postgresql://cloob:secret@127.0.0.1:1/x": "onnect",
        "postgresql://host:port/x": "port",
        address: "holds no index",
        f"{postgres}?options=-csearch_path%3Dnone": "holds no index",
        "postgresql://x?nonsense=1": "nonsense",
    }
    for wrong, said in cases.items():
        with pytest.raises(InputError) as caught:
            PostgresStore(wrong)
        line = str(caught.value)
        assert said in line and "\n" not in line, line
        assert not any(
            secret in line
            for secret in ("pass word", "pass%20word", "wrong@", "secret")
        ), line
    with pytest.raises(InputError, match="schema"):
        PostgresStore(f"{postgres}?options=-csearch_path%3Dnone", create=True)


def test_the_block_of_the_page_finds_the_nearest(address):
    page = Path(__file__).parents[3] / "docs" / "interop.md"
    if not page.is_file():
        pytest.skip("docs/interop.md is not beside the tests")
    text = page.read_text(encoding="utf-8").replace(
        "postgresql://me@db/pictures", address
    )
    (block,) = re.findall(
        r"^```python\n(import psycopg.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    )
    vectors = units(20, 8)
    rows = pa.table(
        {"path": [f"{i}.png" for i in range(20)], "vector": vectors.tolist()}
    )
    names = {"rows": rows, "query": vectors[3].tolist()}
    exec(block, names)
    assert [path for (path,) in names["nearest"]] == [
        f"{i}.png" for i in np.argsort(-vectors @ vectors[3])[:3]
    ]
