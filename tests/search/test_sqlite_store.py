"""The SQLite store: its cache follows the database, and a stranger's database is
data.
"""

import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from index_fakes import item, units, write

from cloob.errors import InputError
from cloob.search import database, matrix
from cloob.search.records import INDEX_FILE, FileState, IndexedModel
from cloob.search.store import Store
from cloob.search.where import parse

MODEL = IndexedModel("m", "somewhere", "f" * 32, 8)


def filled(folder, n=5):
    store = Store(folder, create=True)
    store.add_model(MODEL)
    write(store, [item(f"{i}") for i in range(n)], "m", units(n))
    return store


def test_what_is_written_is_read(tmp_path):
    columns = {"b": True, "k": 1, "t": "ä", "n": 1.5}
    whole = item(
        "a/ü.jpg", "x" * 64, date="2024-05-01T12:00:00", caption="a", columns=columns
    )
    store = filled(tmp_path / "i", 0)
    write(
        store,
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
    write(store, [whole], "m", units(1))
    (read,) = store.items([1])
    assert read == replace(whole, id=1)
    state = FileState("/src/a/ü.jpg", 3, 5, "x" * 64, id=1, has_vector=True)
    assert list(store.states("/src", 1)) == [state]
    assert list(store.states("/src", 2)) == [replace(state, has_vector=False)]
    assert store.having(store.model(), ["x" * 64, "y"]) == {"x" * 64}
    assert store.columns() == {
        "b": "boolean",
        "k": "number",
        "n": "number",
        "t": "text",
    }
    assert store.items([9, 1, 1]) == [read, read] and store.sources() == ("/src",)


def test_all_of_a_call_or_nothing_and_a_name_is_one_model(tmp_path):
    store = filled(tmp_path / "i")
    before = store.revision()
    with pytest.raises(TypeError):
        write(store, [item("a"), item("b", columns={"x": object()})], "m", units(2))
    with pytest.raises(UnicodeEncodeError):
        write(store, [item("a"), item("\ud800", "c")], "m", units(2))
    assert store.count() == 5 and store.revision() == before
    store.add_model(replace(MODEL, spec="elsewhere"))
    assert store.models() == (replace(MODEL, spec="elsewhere"),)
    with pytest.raises(InputError, match="other weights"):
        store.add_model(replace(MODEL, fingerprint="0"))
    with pytest.raises(InputError, match="did you mean m"):
        store.vectors("mm", [1])
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
            st.sampled_from(["write", "remove", "reopen", "prune"]),
            st.integers(0, 9),
            st.integers(0, 5),
        ),
        max_size=15,
    )
)
@example([("write", 0, 1), ("write", 1, 1), ("remove", 0, 0), ("prune", 0, 0)])
def test_a_search_gives_what_a_loop_gives(tmp_path_factory, changes):
    """Bit by bit, whatever was written, or is not there any more; a content has one
    vector, whatever paths name it.
    """
    folder = tmp_path_factory.mktemp("i")
    store = filled(folder, 3)
    other = Store(folder)  # another process's view
    contents = {f"/src/{i}": f"of {i}" for i in range(3)}
    vectors = dict(zip(contents.values(), units(3), strict=True))
    vectors |= {str(seed): units(1, seed=10 + seed)[0] for seed in range(2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "_BLOCK", 2)
        for what, number, seed in changes:
            name, content = str(number), str(seed % 2)
            if what == "write":
                write(store, [item(name, content)], "m", [vectors[content]])
                contents[f"/src/{name}"] = content
            elif what == "remove" and f"/src/{name}" in contents:
                store.remove("/src", [f"/src/{name}"])
                del contents[f"/src/{name}"]
            elif what == "reopen":
                store.close()
                store = Store(folder, writable=True)
            elif what == "prune":
                store.prune(time.time() + 31 * 86_400)
            query = units(1, seed=seed)[0]
            truth = {
                each.id: vectors[contents[each.path]]
                for each in store.items(store.ids().tolist())
            }
            assert len(truth) == len(contents)
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


def test_equal_rows_tie_whatever_rounding_makes_of_their_products(tmp_path):
    """2,000 rows of one cosine: float32 products differ in their last digits, and the
    first ids are the nearest all the same.
    """
    query, *others = units(2001, dim=512)
    others = np.array([row - (row @ query) * query for row in others])
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    rows = (0.6 * query + 0.8 * others).astype(np.float32)
    store = Store(tmp_path / "i", create=True)
    store.add_model(replace(MODEL, dim=512))
    write(store, [item(f"{i}") for i in range(len(rows))], "m", rows)
    found = store.nearest("m", query, 5)
    truth = dict(enumerate(rows, 1))
    assert list(zip(found.ids.tolist(), found.scores, strict=True)) == nearest(
        truth, query, 5
    )


def test_vectors_that_are_cut_or_elsewhere_are_named(tmp_path):
    filled(tmp_path / "i").close()
    (path,) = (tmp_path / "i").glob("vectors-*")
    whole = path.read_bytes()
    (tmp_path / "victim").write_bytes(whole)
    for damage in (b"", whole[:-1], None):
        path.unlink()
        if damage is None:
            path.symlink_to(tmp_path / "victim")
        else:
            path.write_bytes(damage)
        store = Store(tmp_path / "i", writable=True)
        with pytest.raises(InputError, match="is damaged; make it again"):
            store.nearest("m", units(1)[0], 1)
        store.close()
    store = Store(tmp_path / "i", writable=True)
    with pytest.raises(InputError, match="no index has a link"):
        write(store, [item("new")], "m", units(1))
    assert (tmp_path / "victim").read_bytes() == whole and store.count() == 5
    store.close()


def test_what_a_killed_writer_left_in_the_file_does_not_count(tmp_path):
    store = filled(tmp_path / "i")
    (path,) = (tmp_path / "i").glob("vectors-*")
    with path.open("ab") as file:  # before its transaction was committed
        file.write(units(3, seed=9).tobytes())
    write(store, [item("new")], "m", units(1, seed=1))
    found = store.nearest("m", units(1, seed=1)[0], 9)
    assert found.ids[0] == 6 and found.searched == 6
    assert found.scores[0] == pytest.approx(1)


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
    assert Store(tmp_path / "i", create=True).count() == 5


def test_a_backup_that_was_put_back_and_went_another_way(tmp_path):
    """The rows that were written after it are written over."""
    filled(tmp_path / "i", 3).close()
    database = tmp_path / "i" / INDEX_FILE
    backup = database.read_bytes()
    for seed in (7, 8):
        database.write_bytes(backup)
        store = Store(tmp_path / "i", writable=True)
        write(store, [item("0", "new")], "m", units(1, seed=seed))
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
    reader = Store(tmp_path / "i")
    assert reader.count() == 5 and reader.nearest("m", units(1)[0], 1).searched == 5
    for number in (6, 7):
        owner = Store(tmp_path / "i", writable=True)
        write(owner, [item(f"new {number}")], "m", units(1, seed=number))
        assert reader.count() == number  # while the owner still writes
        owner.close()
        found = reader.nearest("m", units(1, seed=number)[0], 1)
        assert (
            found.ids.tolist() == [number]
            and found.searched == reader.count() == number
        )
    reader.close()


def test_a_second_writer_waits_then_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "PATIENCE_SECONDS", 0.05)
    store = filled(tmp_path / "i")
    other = sqlite3.connect(tmp_path / "i" / INDEX_FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    second = Store(tmp_path / "i", writable=True)
    with pytest.raises(InputError, match="another process has been writing"):
        second.remove("/src", ["/src/0"])
    assert second.count() == 5  # reading goes on
    other.execute("COMMIT")
    other.close()
    second.remove("/src", ["/src/0"])
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
                Store(tmp_path / "i", writable=writable)
        beside.unlink()
        assert (tmp_path / "victim").read_text() == "mine"
