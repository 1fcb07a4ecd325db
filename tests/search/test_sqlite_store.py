"""The SQLite store: its cache follows the database, and a stranger's database is data."""

from __future__ import annotations

import sqlite3
import struct
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.errors import InputError
from cloob.search.records import IndexedModel, Item
from cloob.search.sqlite import approximate, file, matrix
from cloob.search.sqlite.file import FILE
from cloob.search.sqlite.store import SqliteStore
from cloob.search.store import FileState

DIM = 8
MODEL = IndexedModel("m", "somewhere", "f" * 32, DIM)


def item(path: str, content: str = "c", **more: object) -> Item:
    return replace(Item(0, "s", path, content, 3, 5, 7, 9), **more)  # type: ignore[arg-type]


def units(n: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def filled(folder: Path, n: int = 5) -> SqliteStore:
    store = SqliteStore.create(folder)
    store.add_model(MODEL)
    store.write([item(f"{i}") for i in range(n)], "m", units(n))
    return store


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with_all = item(
        "a/ü.jpg", "x" * 64, date="2024-05-01T12:00:00", caption="a\0b", columns={"b": True, "k": 1, "t": "ä", "n": 1.5}
    )
    store = filled(tmp_path / "i", 0)
    store.write([with_all], "m", units(1))
    (read,) = store.items([1])
    assert read == replace(with_all, id=1)
    assert list(store.states("s")) == [FileState(1, "a/ü.jpg", 3, 5, "x" * 64, None, ("m",))]
    assert store.find(["x" * 64, "y"]) == {"x" * 64: [1]} and store.columns() == {
        "b": "boolean",
        "k": "number",
        "n": "number",
        "t": "text",
    }
    assert store.items([9, 1, 1]) == [read, read] and store.sources() == ("s",)


def test_all_of_a_call_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "i")
    before = store.revision()
    with pytest.raises(TypeError):
        store.write([item("a"), item("b", columns={"x": object()})], "m", units(2))  # type: ignore[dict-item]
    assert store.count() == 5 and store.revision() == before
    with pytest.raises(ValueError, match="finite"):
        store.write([item("a")], "m", np.full((1, DIM), np.nan, np.float32))


def test_a_name_is_one_model(tmp_path: Path) -> None:
    store = filled(tmp_path / "i")
    store.add_model(replace(MODEL, spec="elsewhere"))
    assert store.models() == (replace(MODEL, spec="elsewhere"),)
    with pytest.raises(InputError, match="another model"):
        store.add_model(replace(MODEL, fingerprint="0"))
    with pytest.raises(InputError, match="did you mean m"):
        store.vectors("mm", [1])
    store.optimise()
    assert [path.name for path in (tmp_path / "i").glob("*.f32")] == ["vectors-1.f32"]
    store.remove_model("m")
    assert not list((tmp_path / "i").glob("*.f32"))


Change = tuple[str, int, int]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "remove", "reopen", "search", "optimise"]), st.integers(0, 9), st.integers(0, 99)
        ),
        max_size=25,
    )
)
def test_the_cache_follows(tmp_path_factory: pytest.TempPathFactory, changes: list[Change]) -> None:
    folder = tmp_path_factory.mktemp("i")
    store = filled(folder, 3)
    other = SqliteStore(folder)  # another process's view
    truth = dict(zip(map(str, range(3)), units(3), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "_FEW", 2)
        for what, number, seed in changes:
            if what == "write":
                store.write([item(str(number), str(seed))], "m", units(1, seed))
                truth[str(number)] = units(1, seed)[0]
            elif what == "remove":
                store.remove([each.id for each in store.items(store.ids().tolist()) if each.path == str(number)])
                truth.pop(str(number), None)
            elif what == "reopen":
                store.close()
                store = SqliteStore(folder, writable=True)
            elif what == "optimise":
                store.optimise()
            query = units(1, seed + 1000)
            for view in (store, other):
                found = view.nearest("m", query, 4)
                paths = [each.path for each in view.items(found.ids[0].tolist())]
                wanted = sorted(truth, key=lambda path: -float(truth[path].astype(float) @ query[0].astype(float)))[:4]
                scores = [float(truth[path] @ query[0]) for path in wanted]
                assert found.searched == len(truth)
                assert np.allclose(found.scores[0, : len(scores)], scores, atol=1e-6)
                assert np.allclose([float(truth[path] @ query[0]) for path in paths], scores, atol=1e-6)
    store.close()
    other.close()


def test_a_cache_of_another_index_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        store = SqliteStore.create(tmp_path / name)
        store.add_model(MODEL)
        store.write([item("x")], "m", units(1, seed))
        store.optimise()
        store.close()
    cache = tmp_path / "a" / "vectors-1.f32"
    whole = cache.read_bytes()
    for content in (
        (tmp_path / "b" / "vectors-1.f32").read_bytes(),
        b"",
        whole[:-1],
        struct.pack("<8sQQ", b"cloobvec", 2**60, DIM) + whole[24:],
        whole[:4096] + struct.pack("<q", 77) + whole[4104:],  # an id that is not there
    ):
        cache.write_bytes(content)
        with_cache = SqliteStore(tmp_path / "a")
        found = with_cache.nearest("m", units(1, 1), 1)
        assert found.ids.tolist() == [[1]] and found.scores[0, 0] == pytest.approx(1)
        with_cache.close()


def test_a_backup_that_was_put_back_and_went_another_way(tmp_path: Path) -> None:
    """Its revisions have the numbers of those that the cache knows, and other vectors."""
    filled(tmp_path / "i", 3).close()
    database = tmp_path / "i" / FILE
    backup = database.read_bytes()
    for seed in (7, 8):
        database.write_bytes(backup)
        store = SqliteStore(tmp_path / "i", writable=True)
        store.write([item("0", "new")], "m", units(1, seed))
        assert store.nearest("m", units(1, seed), 1).scores[0, 0] == pytest.approx(1)
        store.optimise()
        store.close()


def _forbid(monkeypatch: pytest.MonkeyPatch, log: Path | None = None) -> None:
    """Has SQLite refuse a reader who may not write the folder: without a log, which it would have to make, or ever."""
    connect = sqlite3.connect

    def refused(address: object, *given: object, **options: object) -> sqlite3.Connection:
        if str(address).endswith("?mode=ro") and not (log is not None and log.exists()):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(address, *given, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", refused)


def test_a_reader_without_permission_to_write_sees_what_the_owner_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "i").close()
    _forbid(monkeypatch, tmp_path / "i" / f"{FILE}-wal")
    reader = SqliteStore(tmp_path / "i")
    assert reader.count() == 5 and reader.nearest("m", units(1), 1).searched == 5
    for number in (6, 7):
        owner = SqliteStore(tmp_path / "i", writable=True)
        owner.write([item(f"new {number}")], "m", units(1, number))
        if number == 7:
            assert reader.count() == 7  # while the owner still writes
        owner.close()
        found = reader.nearest("m", units(1, number), 1)
        assert found.ids.tolist() == [[number]] and found.searched == reader.count() == number
    reader.close()


def test_a_second_writer_waits_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "PATIENCE_SECONDS", 0.05)
    store = filled(tmp_path / "i")
    other = sqlite3.connect(tmp_path / "i" / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    second = SqliteStore(tmp_path / "i", writable=True)
    with pytest.raises(InputError, match="another process has been writing"):
        second.remove([1])
    assert second.count() == 5  # reading goes on
    other.execute("COMMIT")
    other.close()
    second.remove([1])
    assert store.count() == 4


def test_several_threads(tmp_path: Path) -> None:
    store = filled(tmp_path / "i", 50)
    wrong: list[object] = []

    def search(seed: int) -> None:
        for i in range(20):
            found = store.nearest("m", units(1, seed * 100 + i), 3)
            if len(store.items(found.ids[0].tolist())) != 3:
                wrong.append(found)

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for i in range(20):
        store.write([item(f"more {i}")], "m", units(1, i))
    for thread in threads:
        thread.join()
    assert not wrong and store.nearest("m", units(1), 1).searched == 70


def test_approximate_search_finds_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(approximate, "WORTH_IT_FROM", 100)
    n = 2000
    store = SqliteStore.create(tmp_path / "i")
    store.add_model(MODEL)
    store.write([item(f"{i}") for i in range(n)], "m", units(n))
    store.close()
    store = SqliteStore(tmp_path / "i", writable=True, approximate=True)
    store.optimise()
    used = []
    nearest = approximate.nearest
    monkeypatch.setattr(approximate, "nearest", lambda *given: used.append(1) or nearest(*given))
    exact = SqliteStore(tmp_path / "i", approximate=False)
    queries = units(20, 5)
    for _ in range(2):
        found, wanted = store.nearest("m", queries, 10), exact.nearest("m", queries, 10)
        recall = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(found.ids, wanted.ids, strict=True)])
        assert recall > 0.9 and found.searched == wanted.searched
        both = {
            i: s
            for row, scores in zip(wanted.ids, wanted.scores, strict=True)
            for i, s in zip(row, scores, strict=True)
        }
        assert both and used
        assert set(found.scores[0]) >= set(wanted.scores[0]) & set(found.scores[0])
        store.remove(wanted.ids[0].tolist())  # gone from both, and what is new is found
        store.write([item("new")], "m", queries[:1])
        assert store.nearest("m", queries[:1], 1).scores[0, 0] == pytest.approx(1)
