"""What both stores do: models are replaced as a unit, words find pictures, another
format is made anew.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from index_fakes import FakeEncoder, Stopping, content, options, units, write_noise
from pyarrow import parquet

from cloob import cli
from cloob.errors import InputError
from cloob.search import store
from cloob.search.index import Index
from cloob.search.records import INDEX_FILE, IndexedModel, Item
from cloob.search.scan.open import ScanOptions
from cloob.search.where import equals
from search_colours import loads, write_pictures


@pytest.fixture(params=["folder", "postgresql"])
def place(request, tmp_path):
    """The address of a new index in each of both stores."""
    return str(
        request.getfixturevalue("address")
        if request.param == "postgresql"
        else tmp_path / "idx"
    )


def test_a_model_is_replaced_when_its_successor_is_complete(place, tmp_path):
    folder = tmp_path / "p"
    for seed in range(12):
        write_noise(folder / f"{seed}.png", seed)
    write_noise(tmp_path / "q" / "q.png", 99)
    with Index.create(place) as index:
        index.update([folder, tmp_path / "q"], options(FakeEncoder()))
        index.update([folder, tmp_path / "q"], options(FakeEncoder("second", seed=5)))
        before = content(index)
        for pictures, error in ((0, MemoryError()), (8, KeyboardInterrupt())):
            new = Stopping(pictures, error, seed=1, dim=5)
            with pytest.raises(type(error)):
                index.update([folder], options(new, replace_model=True))
            assert content(index) == before and [
                model.name for model in index.models
            ] == ["fake", "second"]
        new = FakeEncoder(seed=1, dim=5)
        with pytest.raises(InputError, match="--replace-model"):
            index.update([folder], options(new))
        with pytest.raises(MemoryError):
            index.update(
                [folder],
                options(
                    Stopping(1, MemoryError(), seed=1, dim=5),
                    batch_size=1,
                    replace_model=True,
                ),
            )
        done = index.update([folder], options(new, replace_model=True))
        assert (
            done.embedded == new.seen == 4 and done.unchanged == 9
        )  # those of the other source as well
        assert [model.name for model in index.models] == [
            "fake",
            "second",
        ] and index.models[0].dim == 5
        rows = index.store.vectors("fake", index.store.ids())
        assert rows.shape == (13, 5) and np.isfinite(rows).all()
        assert index.search(units(1, 5)[0]).searched == 13


def test_vectors_of_two_models_never_mix_whoever_writes(place, tmp_path):
    folder = tmp_path / "p"
    for seed in range(8):
        write_noise(folder / f"{seed}.png", seed)

    def replace():  # another process, before the second batch is written
        with Index.open(place, writable=True) as other:
            model = IndexedModel("fake", "x", "0" * 32, 16)
            other.store.finish(other.store.add_model(model, replace=True))

    with Index.create(place) as index:
        with pytest.raises(InputError, match="no vectors of a model 'fake'"):
            index.update([folder], options(Stopping(4, replace)))
        assert not np.isfinite(index.store.vectors("fake", index.store.ids())).any()


def test_words_find_names_captions_and_columns(place):
    """Whatever the model thinks: the list of each is joined by 1 / (60 + rank)."""
    facts = {  # path: caption, columns
        "IMG_1092.jpg": (None, {}),
        "a.jpg": ("Ein ÉTÉ am Meer", {"tags": "Anna, Linz", "stars": 5}),
        "b/IMG_1092.jpg.tar::c.jpg": ("Meer", {"date_from": "exif"}),
        "d.jpg": ("Meer Meer IMG_1093", {}),
    }
    items = [
        Item(0, "s", path, path, 1, 0, 1, 1, None, *said)
        for path, said in facts.items()
    ]
    rows = np.eye(4, dtype=np.float32)[::-1]  # the last is the nearest to the query
    with Index.create(place) as index:
        index.store.add_model(IndexedModel("m", "m", "f" * 32, 4))
        index.store.write(items, "m", rows)
        index.use("m", FakeEncoder(dim=4), "f" * 32)

        def found(words, by="words", **how):
            row = np.float32([1, 0.3, 0.2, 0.1])
            hits = index.search(
                words, by=by, row=None if by == "words" else row, cutoff=None, **how
            ).hits
            return {hit.item.path: hit.words for hit in hits}

        assert found("img_1092") == {"IMG_1092.jpg": ("name",)}
        assert found("ete linz") == {"a.jpg": ("caption", "tags")}
        assert (
            set(found("MEER")) == {*facts} - {"IMG_1092.jpg"}
            and not found("exif")
            and not found("1092 meer")
        )
        assert found("meer", where="caption like 'Ein%'") == {"a.jpg": ("caption",)}
        ranks = {
            "IMG_1092.jpg": 4,
            "a.jpg": 3,
            "b/IMG_1092.jpg.tar::c.jpg": 2,
            "d.jpg": 1,
        }
        fused = {
            path: 1 / (60 + rank) + (path == "IMG_1092.jpg") / 61
            for path, rank in ranks.items()
        }
        wanted = sorted(facts, key=lambda path: -fused[path])
        assert list(found("IMG 1092", "both")) == wanted and wanted[0] == "IMG_1092.jpg"
        assert list(found("IMG 1092", "meaning")) == sorted(
            facts, key=ranks.__getitem__
        )
        with pytest.raises(InputError, match="only words are searched"):
            index.search(rows[0], by="words")
        index.store.write(
            [Item(0, "s", "a.jpg", "new", 1, 0, 1, 1, None, "another")], "m", rows[:1]
        )
        index.store.remove("s", ["d.jpg"])
        assert not found("ete") and set(found("meer")) == {"b/IMG_1092.jpg.tar::c.jpg"}
        assert found("another") == {"a.jpg": ("caption",)}


def test_of_many_that_have_the_words_the_nearest_come_first(place, monkeypatch):
    captions = ["red " * number for number in (1, 2, 3)] + ["blue"] * 7
    items = [
        Item(0, "s", f"{number}", f"{number}", 1, 0, 1, 1, None, text)
        for number, text in enumerate(captions)
    ]
    with Index.create(place) as index:
        index.store.add_model(IndexedModel("m", "m", "e" * 32, 10))
        index.store.write(items, "m", np.eye(10, dtype=np.float32))
        index.use("m", FakeEncoder(dim=10), "e" * 32)

        def found(nearest, **how):
            row = (
                0.1 * np.eye(10, dtype=np.float32)[nearest]
                + np.eye(10, dtype=np.float32)[9]
            )
            return [
                hit.item.path
                for hit in index.search("red", row=row, cutoff=None, **how).hits
            ]

        monkeypatch.setattr(store, "_COMMON", 2)
        assert found(0, by="words") == ["2", "1", "0"]
        assert (
            found(0)[:3] == ["0", "1", "2"]
            and found(1)[:3] == ["1", "0", "2"]
            and found(2, top=1) == ["0"]
        )


def test_vectors_that_exist_are_taken_and_their_file_stays_the_source(place, tmp_path):
    file, encoder = tmp_path / "rows", FakeEncoder(dim=8)
    file.mkdir()

    def write(rows, part="0.parquet"):
        columns = {
            "path": list(rows),
            "caption": [f"of {name}" for name in rows],
            "stars": [3] * len(rows),
        }
        table = pa.table(
            columns
            | {
                "vector": pa.array(
                    [row.astype(np.float16).tolist() for row in rows.values()]
                )
            }
        )
        parquet.write_table(table, file / part)

    rows = {f"{number}.jpg": 3 * row for number, row in enumerate(units(10, 8))}
    write({name: rows[name] for name in list(rows)[:6]})
    write(
        {name: rows[name] for name in list(rows)[6:]}
        | {"3.jpg": rows["0.jpg"], "zero": np.zeros(8)},
        "1.parquet",
    )
    with Index.create(place) as index:
        done = index.update(
            [file], options(encoder, scan=ScanOptions(vectors="vector"))
        )
        assert (done.added, done.embedded, encoder.seen) == (
            10,
            0,
            0,
        ) and done.faults == {"vector not finite, or 0": 1}
        assert done.left_out.counts == {"row of a path that stood before": 1}
        found = index.search(
            rows["3.jpg"].astype(np.float32),
            top=1,
            where="stars = 3 and caption = 'of 3.jpg'",
        ).hits
        assert found[0].item.path == "3.jpg" and found[0].score == pytest.approx(
            1, abs=1e-3
        )
        (file / "1.parquet").unlink()
        write(
            {"0.jpg": rows["1.jpg"], "1.jpg": rows["1.jpg"], "new.jpg": rows["2.jpg"]}
        )
        done = index.update([], options(encoder))  # the index knows the column
        assert (done.added, done.changed, done.removed, done.unchanged) == (1, 1, 8, 1)
        row = index.store.vectors("fake", index.store.ids(equals("path", "0.jpg")))[0]
        np.testing.assert_allclose(row, rows["1.jpg"] / 3, atol=1e-3)
        other = index.update([], options(FakeEncoder("other", seed=1, dim=8)))
        assert "are of another model" in other.refused[str(file)] and [
            model.name for model in index.models
        ] == ["fake"]
        with pytest.raises(InputError, match="8 numbers a row, wide 9"):
            index.update(
                [file],
                options(FakeEncoder("wide", dim=9), scan=ScanOptions(vectors="vector")),
            )
        empty = pa.table(
            {
                "path": pa.array([], pa.string()),
                "vector": pa.array([], pa.list_(pa.float16())),
            }
        )
        parquet.write_table(empty, file / "0.parquet")
        assert (
            "--remove-all" in index.update([], options(encoder)).refused[str(file)]
            and len(index) == 3
        )
        with pytest.raises(InputError, match="vec"):
            index.update([file], options(encoder, scan=ScanOptions(vectors="vec")))


def test_an_index_of_another_format_names_what_to_do(
    place, tmp_path, capsys, monkeypatch
):
    loads(monkeypatch)
    pictures = write_pictures(tmp_path / "p", n=1)
    make = ["index", str(pictures), "--model", "m", "--out", place]
    assert cli.main(make) == 0
    with Index.open(place) as index:
        address = index.store.address  # without the password
    for version, said in (
        (6, f"cloob index SRC --model M --out {address} --anew"),
        (99, "of a newer cloob"),
    ):
        if place.startswith("postgresql:"):
            with psycopg.connect(place) as server:
                server.execute("UPDATE cloob_index SET version = %s", [version])
        else:
            with closing(sqlite3.connect(Path(place) / INDEX_FILE)) as file:
                file.execute(f"PRAGMA user_version = {version}")
        for words in (["search", place, "red"], ["index", "--out", place]):
            assert cli.main(words) == 2
            err = capsys.readouterr().err
            assert said in err and "pass" not in err
    if not place.startswith("postgresql:"):
        (Path(place) / "heads").mkdir()
    assert cli.main([*make, "--anew"]) == 0
    assert "8 added; 8 embedded" in capsys.readouterr().out
    assert place.startswith("postgresql:") or (Path(place) / "heads").is_dir()
