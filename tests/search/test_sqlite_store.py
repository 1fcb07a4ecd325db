"""The SQLite store: its cache follows the database, and a stranger's database is
data.
"""

import operator
import os
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from index_fakes import item, units
from where_cases import CASES, COLUMNS, ITEMS

from cloob.errors import InputError
from cloob.search import sqlite
from cloob.search.records import INDEX_FILE, FileState, IndexedModel
from cloob.search.sqlite import SqliteStore
from cloob.search.where import SQLITE, parse

SIGNS = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
MODEL = IndexedModel("m", "somewhere", "f" * 32, 8)


def filled(folder, n=5):
    store = SqliteStore(folder, create=True)
    store.add_model(MODEL)
    store.write([item(f"{i}") for i in range(n)], "m", units(n))
    return store


def test_what_is_written_is_read(tmp_path):
    columns = {"b": True, "k": 1, "t": "ä", "n": 1.5}
    whole = item(
        "a/ü.jpg", "x" * 64, date="2024-05-01T12:00:00", caption="a", columns=columns
    )
    store = filled(tmp_path / "i", 0)
    store.write(
        [
            replace(
                whole,
                caption="a\0",
                columns={**columns, "t": "ä\ud800", "no": float("inf")},
            )
        ],
        "m",
        units(1),
    )
    (read,) = store.items([1])
    assert (read.caption, read.columns) == (
        "a\ufffd",
        columns | {"t": "ä\ufffd"},
    )  # what databases do not take
    store.write([whole], "m", units(1))
    (read,) = store.items([1])
    assert read == replace(whole, id=1)
    assert list(store.states("SRC")) == [
        FileState(1, "a/ü.jpg", 3, 5, "x" * 64, None, (1,))
    ]
    assert list(store.known(store.model(), ["x" * 64, "y"])) == ["x" * 64]
    assert store.columns() == {
        "b": "boolean",
        "k": "number",
        "n": "number",
        "t": "text",
    }
    assert store.items([9, 1, 1]) == [read, read] and store.sources() == ("SRC",)


def test_all_of_a_call_or_nothing_and_a_name_is_one_model(tmp_path):
    store = filled(tmp_path / "i")
    before = store.revision()
    with pytest.raises(TypeError):
        store.write([item("a"), item("b", columns={"x": object()})], "m", units(2))
    with pytest.raises(UnicodeEncodeError):
        store.write([item("a"), item("\ud800")], "m", units(2))
    assert store.count() == 5 and store.revision() == before
    store.add_model(replace(MODEL, spec="elsewhere"))
    assert store.models() == (replace(MODEL, spec="elsewhere"),)
    with pytest.raises(InputError, match="another model"):
        store.add_model(replace(MODEL, fingerprint="0"))
    with pytest.raises(InputError, match="did you mean m"):
        store.vectors("mm", [1])
    store.table.optimise()
    assert len(list((tmp_path / "i").glob("vectors-*"))) == 1
    store.remove_model("m")
    assert not list((tmp_path / "i").glob("vectors-*")) and store.count() == 5


def nearest(truth, query, top):
    """Best first, equal ones by id; each product summed in float64."""
    found = [
        (id_, np.float32((row.astype(np.float64) * query.astype(np.float64)).sum()))
        for id_, row in truth.items()
    ]
    return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:top]


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "remove", "reopen", "optimise"]),
            st.integers(0, 9),
            st.integers(0, 5),
        ),
        max_size=15,
    )
)
@example(
    [("optimise", 0, 0), ("write", 0, 0), ("optimise", 0, 0), ("write", 0, 2)]
)  # the same bytes, another vector
def test_a_search_gives_what_a_loop_gives(tmp_path_factory, changes):
    """Bit by bit, whatever is in the file, was written since, or is not there any more;
    many vectors are equal.
    """
    folder = tmp_path_factory.mktemp("i")
    store = filled(folder, 3)
    other = SqliteStore(folder)  # another process's view
    truth = dict(zip((1, 2, 3), units(3), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite, "_FEW", 2)
        patch.setattr(sqlite, "_BLOCK", 2)
        for what, number, seed in changes:
            ids = {each.path: each.id for each in store.items(store.ids().tolist())}
            if what == "write":
                store.write(
                    [item(str(number), str(seed % 2))], "m", units(1, seed=seed)
                )
                truth[ids.get(str(number), int(store.ids()[-1]))] = units(1, seed=seed)[
                    0
                ]
            elif what == "remove" and str(number) in ids:
                store.remove("SRC", [str(number)])
                del truth[ids[str(number)]]
            elif what == "reopen":
                store.close()
                store = SqliteStore(folder, writable=True)
            elif what == "optimise":
                store.table.optimise()
            query = units(1, seed=seed)[0]
            some = {id_: row for id_, row in truth.items() if id_ % 3 or id_ > 6}
            for view in (store, other):
                for where, wanted in ((None, truth), (parse("id not in (3, 6)"), some)):
                    found = view.nearest("m", query, 4, where)
                    assert list(
                        zip(found.ids.tolist(), found.scores, strict=True)
                    ) == nearest(wanted, query, 4)
                    assert found.searched == len(wanted)
    store.close()
    other.close()


def test_a_damaged_cache_is_not_used_and_written_anew(tmp_path):
    store = filled(tmp_path / "i", 1)
    store.table.optimise()
    store.close()
    (cache,) = (tmp_path / "i").glob("vectors-*")
    whole = cache.read_bytes()
    for content in (
        b"",
        whole[:-1],
        (77).to_bytes(8, "little") + whole[8:],
        whole[:30],
    ):
        cache.write_bytes(content)
        store = SqliteStore(tmp_path / "i")
        found = store.nearest("m", units(1)[0], 1)
        assert found.ids.tolist() == [1] and found.scores[0] == pytest.approx(1)
        store.table.optimise()  # also where another process has just begun to write it
        assert [path.name for path in (tmp_path / "i").glob("vectors-*")] == [
            cache.name
        ] and cache.stat().st_size
        store.close()


def test_a_database_that_another_process_makes_meanwhile_stays(tmp_path, monkeypatch):
    link, exists = os.link, Path.exists

    def meanwhile(made, path):
        monkeypatch.undo()
        filled(path.parent).close()
        link(made, path)

    monkeypatch.setattr(os, "link", meanwhile)
    monkeypatch.setattr(
        Path, "exists", lambda path: path.name != INDEX_FILE and exists(path)
    )
    assert SqliteStore(tmp_path / "i", create=True).count() == 5


def test_a_backup_that_was_put_back_and_went_another_way(tmp_path):
    """Its revisions have the numbers of those that the cache knows, and other
    vectors.
    """
    filled(tmp_path / "i", 3).close()
    database = tmp_path / "i" / INDEX_FILE
    backup = database.read_bytes()
    for seed in (7, 8):
        database.write_bytes(backup)
        store = SqliteStore(tmp_path / "i", writable=True)
        store.write([item("0", "new")], "m", units(1, seed=seed))
        store.table.optimise()
        assert store.nearest("m", units(1, seed=seed)[0], 1).scores[0] == pytest.approx(
            1
        )
        store.close()


def test_a_reader_without_permission_to_write_sees_what_the_owner_writes(
    tmp_path, monkeypatch
):
    connect, log = sqlite3.connect, tmp_path / "i" / f"{INDEX_FILE}-wal"

    def refused(address, *given, **options):
        """SQLite has to make its log to read; that is refused unless a writer has made
        it.
        """
        if str(address).endswith("?mode=ro") and not log.exists():
            raise sqlite3.OperationalError("unable to open database file")
        return connect(address, *given, **options)  # type: ignore[call-overload, no-any-return]

    filled(tmp_path / "i").close()
    monkeypatch.setattr(sqlite3, "connect", refused)
    reader = SqliteStore(tmp_path / "i")
    assert reader.count() == 5 and reader.nearest("m", units(1)[0], 1).searched == 5
    for number in (6, 7):
        owner = SqliteStore(tmp_path / "i", writable=True)
        owner.write([item(f"new {number}")], "m", units(1, seed=number))
        assert reader.count() == number  # while the owner still writes
        owner.close()
        found = reader.nearest("m", units(1, seed=number)[0], 1)
        assert (
            found.ids.tolist() == [number]
            and found.searched == reader.count() == number
        )
    reader.close()


def test_a_second_writer_waits_then_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "PATIENCE_SECONDS", 0.05)
    store = filled(tmp_path / "i")
    other = sqlite3.connect(tmp_path / "i" / INDEX_FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    second = SqliteStore(tmp_path / "i", writable=True)
    with pytest.raises(InputError, match="another process has been writing"):
        second.remove("SRC", ["0"])
    assert second.count() == 5  # reading goes on
    other.execute("COMMIT")
    other.close()
    second.remove("SRC", ["0"])
    assert store.count() == 4


def test_a_journal_or_a_link_beside_it_is_refused(tmp_path):
    """SQLite deletes the file that a journal names, and writes where a link leads."""
    filled(tmp_path / "i").close()
    for suffix, said in (("-journal", "journal"), ("-wal", "link")):
        beside = tmp_path / "i" / f"{INDEX_FILE}{suffix}"
        (tmp_path / "victim").write_text("mine")
        if said == "link":
            beside.symlink_to(tmp_path / "victim")
        else:
            beside.write_bytes(
                bytes(512)
                + str(tmp_path / "victim").encode()
                + bytes.fromhex("d9d505f920a163d7")
            )
        for writable in (True, False):
            with pytest.raises(InputError, match=f"no index has a {said}"):
                SqliteStore(tmp_path / "i", writable=writable)
        beside.unlink()
        assert (tmp_path / "victim").read_text() == "mine"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with closing(
        SqliteStore(tmp_path_factory.mktemp("where") / "index", create=True)
    ) as store:
        store.add_model(IndexedModel("m", "m", "f", 1))
        store.write(ITEMS, "m", np.ones((len(ITEMS), 1), np.float32))
        yield store


@pytest.mark.parametrize("text", CASES)
def test_what_is_found(store, text):
    assert store.ids(parse(text, COLUMNS)).tolist() == CASES[text]


PIECES = st.sampled_from(
    [
        "a",
        "B",
        "b",
        ".",
        "..",
        "/",
        "0",
        "(",
        "_",
        "%",
        "\\",
        "\\%",
        "aB",
        "/aB/",
        "aB/.",
        "Ä",
    ]
)


@pytest.fixture(scope="module", params=[".cloob", "b/.cloob"])
def moving(request, tmp_path_factory):
    """An index in a source, whose paths it stores as they lie from there, and of
    another source; and all paths.
    """
    folder = tmp_path_factory.mktemp("aB.") / "aB"
    names = [
        "a",
        "aB",
        "(b",
        ".a",
        "..b",
        "B/a",
        "a/B",
        "a_b",
        "a%b",
        "0",
        "a/..",
        "aB/aB/a.b",
        "a\\b",
        "ä",
    ]
    paths = [
        (str(source), f"{source}/{name}")
        for source in (folder, folder.parent / "b")
        for name in names
    ]
    paths += [("s", name) for name in (f"{folder}/B", "..", "../a", "..b", "a")]
    with closing(SqliteStore(folder / request.param, create=True)) as store:
        store.add_model(IndexedModel("m", "m", "f", 1))
        items = [
            replace(item(path), source=source)
            for source, path in paths
            if not path.startswith("..")
        ]
        store.write(items, "m", np.ones((len(items), 1), np.float32))
        yield (
            store,
            str(folder),
            [(each.id, each.path) for each in store.items(store.ids().tolist())],
        )


def like(pattern, text):
    """SQL's LIKE, by a plain walk."""
    if not pattern:
        return not text
    if pattern[0] == "%":
        return any(like(pattern[1:], text[i:]) for i in range(len(text) + 1))
    if pattern[0] == "\\":
        pattern = pattern[1:]
    elif pattern[0] == "_":
        return bool(text) and like(pattern[1:], text[1:])
    return (
        bool(text and pattern)
        and pattern[0].lower() == text[0].lower()
        and like(pattern[1:], text[1:])
    )


@settings(max_examples=50)
@given(
    st.lists(PIECES, max_size=5).map("".join),
    st.sampled_from(["", "%", "FOLDER", "FOLDER/", "%FOLDER", "../"]),
)
@example("0", "FOLDER")
@example(".a", "%")
@example("/", "%")
@example("aB/a", "%/")
@example("Ä", "%")
def test_a_filter_of_paths_is_that_of_paths_in_full(moving, rest, start):
    """However they are stored."""
    store, folder, paths = moving
    value = start.replace("FOLDER", folder) + rest
    tests = {
        f"path {sign} {{}}": getattr(operator, name) for sign, name in SIGNS.items()
    }
    tests |= {
        "path like {}": lambda path, pattern: like(pattern, path),
        "path in ({}, 'a')": lambda p, v: p in (v, "a"),
    }
    for text, test in tests.items():
        for where, expected in ((text, True), (f"not {text}", False)):
            wanted = [id_ for id_, path in paths if test(path, value) is expected]
            assert store.ids(parse(where.format(f"'{value}'"))).tolist() == wanted, (
                where
            )


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
        lambda t: st.integers(0, len(t)).map(
            lambda i: t[:i] + "'; drop table items; --" + t[i:]
        )
    )
)
@example("caption = '' or 1=1 --'")
@example("\"x\" = '\\' and id = 1 --")
def test_whatever_is_written_is_refused_or_goes_as_parameters(store, text):
    """The condition's own characters are a few known words; nothing of the text is
    among them.
    """
    try:
        filter_ = parse(text)
    except InputError:
        return
    condition, parameters = filter_.sql(SQLITE)
    assert condition.count("?") == len(parameters)
    assert KNOWN.fullmatch(condition), condition
    assert (
        ";" not in condition
        and "--" not in condition
        and "drop" not in condition.lower()
    )
    assert store.count(filter_) <= len(ITEMS)
