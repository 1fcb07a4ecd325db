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
from cloob.search.records import INDEX_FILE, IndexedModel
from cloob.search.store import Store
from cloob.search.where import parse

MODEL = IndexedModel("m", "somewhere", "f" * 32, 8)


def filled(folder, n=5):
    store = Store(folder, create=True)
    write(store, [item(f"{i}") for i in range(n)], MODEL, units(n))
    return store


def vectors_of(folder):
    (path,) = folder.glob("vectors-*")
    return path


def test_what_is_written_is_read(tmp_path):
    store = Store(tmp_path / "i", create=True)
    columns = {"b": True, "k": 1, "t": "ä", "n": 1.5}
    date = "2024-05-01T12:00:00"
    whole = item("a/ü.jpg", "x" * 64, date=date, caption="a", columns=columns)
    write(store, [whole], MODEL, units(1))
    (read,) = store.items([1])
    assert read == replace(whole, id=1)
    assert store.items([9, 1, 1]) == [read, read]
    kinds = {"b": "boolean", "k": "number", "n": "number", "t": "text"}
    assert store.columns() == kinds


def test_all_of_a_call_or_nothing_and_of_one_model(tmp_path):
    store = filled(tmp_path / "i")
    before = store.revision()
    wrong = {
        TypeError: (item("b", columns={"x": object()}), MODEL),
        UnicodeEncodeError: (item("\ud800", "c"), MODEL),
        InputError: (item("b"), replace(MODEL, fingerprint="0")),
    }
    for error, (second, model) in wrong.items():
        with pytest.raises(error):
            write(store, [item("a"), second], model, units(2))
    assert store.count() == 5
    assert store.revision() == before
    store.set_model_spec("elsewhere")
    assert store.model() == replace(MODEL, spec="elsewhere")


def nearest(truth, query, top):
    """Best first, equal ones by id; each product summed in float64."""
    scores = {
        id_: np.float32((row.astype(np.float64) * query.astype(np.float64)).sum())
        for id_, row in truth.items()
    }
    return sorted(scores.items(), key=lambda hit: (-hit[1], hit[0]))[:top]


def assert_nearest(store, truth, query, top, where=None):
    found = store.nearest(query, top, where)
    hits = list(zip(found.ids.tolist(), found.scores, strict=True))
    assert hits == nearest(truth, query, top)
    assert found.searched == len(truth)


CHANGES = st.tuples(
    st.sampled_from(["write", "remove", "reopen", "prune"]),
    st.integers(0, 9),
    st.integers(0, 5),
)


@settings(max_examples=20)
@given(st.lists(CHANGES, max_size=15))
@example([("write", 0, 1), ("write", 1, 1), ("remove", 0, 0), ("prune", 0, 0)])
def test_a_search_gives_what_a_loop_gives(tmp_path_factory, changes):
    """Bit by bit, whatever was written, or is not there any more; a content has one
    vector, whatever paths name it.
    """
    folder = tmp_path_factory.mktemp("i")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "_BLOCK", 2)
        follow(folder, changes)


def follow(folder, changes):
    store = filled(folder, 3)
    other = Store(folder)  # another process's view
    contents = {f"/src/{i}": f"of {i}" for i in range(3)}
    vectors = dict(zip(contents.values(), units(3), strict=True))
    vectors |= {str(seed): units(1, seed=10 + seed)[0] for seed in range(2)}
    for what, number, seed in changes:
        path = f"/src/{number}"
        content = str(seed % 2)
        if what == "write":
            write(store, [item(str(number), content)], MODEL, [vectors[content]])
            contents[path] = content
        elif what == "remove":
            store.remove("/src", [path])
            contents.pop(path, None)
        elif what == "reopen":
            store.close()
            store = Store(folder, writable=True)
        else:
            store.prune(time.time() + 31 * 86_400)
        items = store.items(store.ids())
        truth = {each.id: vectors[contents[each.path]] for each in items}
        assert len(truth) == len(contents)
        some = {id_: row for id_, row in truth.items() if id_ not in (3, 6)}
        query = units(1, seed=seed)[0]
        for view in (store, other):
            assert_nearest(view, truth, query, 4)
            assert_nearest(view, some, query, 4, parse("id not in (3, 6)"))
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
    items = [item(f"{i}") for i in range(len(rows))]
    write(store, items, replace(MODEL, dim=512), rows)
    assert_nearest(store, dict(enumerate(rows, 1)), query, 5)


def test_vectors_that_are_cut_or_elsewhere_are_named(tmp_path):
    filled(tmp_path / "i").close()
    path = vectors_of(tmp_path / "i")
    whole = path.read_bytes()
    victim = tmp_path / "victim"
    victim.write_bytes(whole)
    for damage in (b"", whole[:-1], None):
        path.unlink()
        if damage is None:
            path.symlink_to(victim)
        else:
            path.write_bytes(damage)
        store = Store(tmp_path / "i", writable=True)
        with pytest.raises(InputError, match=r"is damaged, .*; make it again"):
            store.nearest(units(1)[0], 1)
        with pytest.raises(InputError, match="is damaged"):
            write(store, [item("new")], MODEL, units(1))
        assert store.count() == 5
        store.close()
    assert victim.read_bytes() == whole


def test_what_a_killed_writer_left_in_the_file_does_not_count(tmp_path):
    store = filled(tmp_path / "i")
    with vectors_of(tmp_path / "i").open("ab") as file:  # before it was committed
        file.write(units(3, seed=9).tobytes())
    write(store, [item("new")], MODEL, units(1, seed=1))
    rows = [*units(5), *units(1, seed=1)]
    assert_nearest(store, dict(enumerate(rows, 1)), units(1, seed=1)[0], 9)


def test_a_database_that_another_process_makes_meanwhile_stays(tmp_path, monkeypatch):
    link = os.link
    exists = Path.exists

    def meanwhile(made, path):
        monkeypatch.undo()
        filled(path.parent).close()
        link(made, path)

    monkeypatch.setattr(os, "link", meanwhile)
    monkeypatch.setattr(
        Path, "exists", lambda path: path.name != INDEX_FILE and exists(path)
    )
    assert Store(tmp_path / "i", create=True).count() == 5


def test_a_database_that_was_put_back_alone_gives_no_wrong_answer(tmp_path):
    """It searches the rows that it knows; where these are others by now, it says so."""
    folder = tmp_path / "i"
    file = folder / INDEX_FILE
    backups = [file]
    for seed in (None, 7, 8):  # each goes on from the first one
        if seed is None:
            filled(folder, 3).close()
        else:
            file.write_bytes(backups[1])
            store = Store(folder, writable=True)
            write(store, [item("0", "new")], MODEL, units(1, seed=seed))
            row = units(1, seed=seed)[0]
            assert store.nearest(row, 1).scores[0] == pytest.approx(1)
            store.close()
        backups.append(file.read_bytes())
    database.remove(folder)
    filled(folder, 5).close()  # made anew
    for backup in backups[1:]:
        file.write_bytes(backup)
        store = Store(folder, writable=True)
        with pytest.raises(InputError, match="not of this index"):
            store.nearest(units(1)[0], 1)
        store.close()


def test_an_earlier_database_beside_the_rows_of_a_later_one(tmp_path):
    folder = tmp_path / "i"
    filled(folder, 3).close()
    earlier = (folder / INDEX_FILE).read_bytes()
    store = Store(folder, writable=True)
    write(store, [item("new")], MODEL, units(1, seed=7))
    store.close()
    later = (folder / INDEX_FILE).read_bytes()
    (folder / INDEX_FILE).write_bytes(earlier)
    store = Store(folder, writable=True)
    assert_nearest(store, dict(enumerate(units(3), 1)), units(1)[0], 9)
    write(store, [item("other")], MODEL, units(1, seed=8))
    store.close()
    (folder / INDEX_FILE).write_bytes(later)
    with pytest.raises(InputError, match="not of this index"):
        Store(folder).nearest(units(1)[0], 1)


def test_a_reader_without_permission_to_write_sees_what_the_owner_writes(
    tmp_path, monkeypatch
):
    connect = sqlite3.connect
    log = tmp_path / "i" / f"{INDEX_FILE}-wal"

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
    assert reader.nearest(units(1)[0], 1).searched == reader.count() == 5
    for number in (6, 7):
        owner = Store(tmp_path / "i", writable=True)
        row = units(1, seed=number)
        write(owner, [item(f"new {number}")], MODEL, row)
        assert reader.count() == number  # while the owner still writes
        owner.close()
        found = reader.nearest(row[0], 1)
        assert found.ids.tolist() == [number]
        assert found.searched == reader.count() == number
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


@pytest.mark.parametrize(
    ("suffix", "message"), [("-journal", "journal"), ("-wal", "link")]
)
def test_a_journal_or_a_link_beside_it_is_refused(tmp_path, suffix, message):
    """SQLite deletes the file that a journal names, and writes where a link leads."""
    filled(tmp_path / "i").close()
    beside = tmp_path / "i" / f"{INDEX_FILE}{suffix}"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    if message == "link":
        beside.symlink_to(victim)
    else:
        mark = bytes.fromhex("d9d505f920a163d7")
        beside.write_bytes(bytes(512) + str(victim).encode() + mark)
    for writable in (True, False):
        with pytest.raises(InputError, match=f"no index has a {message}"):
            Store(tmp_path / "i", writable=writable)
    beside.unlink()
    assert victim.read_text() == "mine"


def test_what_databases_do_not_take_is_replaced(tmp_path):
    store = Store(tmp_path / "i", create=True)
    odd = item("a", caption="a\0", columns={"t": "ä\ud800", "no": float("inf")})
    write(store, [odd], MODEL, units(1))
    (read,) = store.items([1])
    assert read.caption == "a\ufffd"
    assert read.columns == {"t": "ä\ufffd"}
