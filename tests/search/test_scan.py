"""What sources name: folders, tables, shards, data sets."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from index_fakes import FakeEncoder, noise, options, write_noise
from PIL import Image
from pyarrow import parquet

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.scan import shards
from cloob.search.scan.addresses import remember
from cloob.search.scan.collection import ReadFailed
from cloob.search.scan.inside import Inside
from cloob.search.scan.open import Pictures, ScanOptions, open_collection
from cloob.search.update import UpdateOptions
from cloob.search.where import parse
from support import served, serving


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    noise(seed).save(stream, "PNG")
    return stream.getvalue()


def scanned(source: Path | str, **how: object) -> dict[str, tuple[str | None, Mapping[str, object]]]:
    """Caption and columns by name."""
    collection = open_collection(source, ScanOptions(**how))  # type: ignore[arg-type]
    return {Path(found.path).name: collection.describe(found) for found in collection.scan(())}


def left_out(source: Path | str, **how: object) -> dict[str, int]:
    collection = open_collection(source, ScanOptions(**how))  # type: ignore[arg-type]
    list(collection.scan(()))
    return collection.left_out.counts


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    for name in ("a.png", "B.JPG", "sub/c.png", ".hidden.png", ".dir/d.png", "other/e.png", "idx/thumb.png"):
        write_noise(folder / name, 1)
    (folder / "idx" / "index.sqlite").touch()
    (folder / "a.txt").write_text("a dog")
    (folder / "B.TXT").write_text("a cat")
    (folder / "film.mp4").touch()
    (folder / "alone.txt").touch()
    for name in ("@eaDir", "#recycle", "System Volume Information", "sub/node_modules"):
        write_noise(folder / name / "small.png", 1)
    assert scanned(folder) == {"a.png": ("a dog", {}), "B.JPG": ("a cat", {}), "c.png": (None, {}), "e.png": (None, {})}
    assert left_out(folder) == {"file of another kind": 1}
    assert set(scanned(folder, exclude=("sub", "*.JPG"))) == {"a.png", "e.png"}
    assert left_out(folder, exclude=("sub", "*.JPG")) == {"excluded": 2, "file of another kind": 1}
    assert left_out(folder, exclude=("a.*", "alone.txt")) == {"excluded": 1, "file of another kind": 1}
    assert set(scanned(folder, exclude=("sub/*",))) == {"a.png", "B.JPG", "e.png"}


def test_a_tar_beside_pictures_makes_no_folder_of_shards(tmp_path: Path) -> None:
    folder, encoder = tmp_path / "p", FakeEncoder()
    for seed in range(3):
        write_noise(folder / "sub" / f"{seed}.png", seed)
    tar = write_tar(folder / "backup.tar", {"x.png": png(9)})
    (folder / "rows.parquet").write_bytes(b"")
    assert set(scanned(folder)) == {"0.png", "1.png", "2.png"}
    assert left_out(folder) == {"tar or Arrow file beside pictures": 2}
    assert set(scanned(folder, exclude=("sub",))) == {"backup.tar::x.png"}
    with Index.create(tmp_path / "i") as index:
        index.update([folder], options(encoder))
        (folder / "sub").rename(tmp_path / "sub")  # not there for now
        for _ in range(2):
            summary = index.update([folder], options(encoder))
            assert "3 pictures were files and now are in tars" in summary.refused[str(folder)]
            assert summary.added == summary.removed == 0 and len(index) == 3
        assert index.update([folder], options(encoder, remove_all=True)).removed == 3
        (tmp_path / "sub").rename(folder / "sub")
        assert "1 pictures were in tars or Arrow" in index.update([], options(encoder)).refused[str(folder)]
        assert Path(index.items([4])[0].path).name == f"{tar.name}::x.png"


def test_links_and_pipes(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write_noise(folder / "a.png", 1)
    write_noise(tmp_path / "outside.png", 2)
    (folder / "inside.png").symlink_to("a.png")
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "round").symlink_to(".")
    (folder / "out").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "a.txt")  # nor is a caption read from one
    assert scanned(folder) == {"a.png": (None, {}), "inside.png": (None, {})}
    counts = left_out(folder)
    assert counts == {
        "link that leads out of the folder, not followed": 1,
        "pipe or device": 2,
        "linked folder, not followed": 2,
    }


def test_an_imagefolder(tmp_path: Path) -> None:
    write_noise(tmp_path / "p" / "a.png", 1)
    write_noise(tmp_path / "p" / "b.png", 2)
    (tmp_path / "p" / "metadata.csv").write_text("file_name,text,year\na.png,a dog,2020\nc.png,no,1\n")
    assert scanned(tmp_path / "p") == {"a.png": ("a dog", {"year": 2020}), "b.png": (None, {})}


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_a_table(tmp_path: Path, kind: str) -> None:
    write_noise(tmp_path / "a.png", 1)
    rows = [
        {"filepath": "a.png", "title": "a dog", "year": 2020, "score": 0.5, "place": "Linz"},
        {"filepath": "a.png", "title": "an animal", "year": 1, "score": 1.0, "place": "x"},
        {"filepath": "gone.png", "title": "", "year": 2021, "score": 1.5, "place": ""},
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        comma = "," if kind == "csv" else "\t"
        path.write_text("\n".join(comma.join(map(str, row)) for row in [list(rows[0]), *(r.values() for r in rows)]))
    found = scanned(path)
    assert found["a.png"] == ("a dog\nan animal", {"year": 2020, "score": 0.5, "place": "Linz"})
    assert found["gone.png"][0] is None and found["gone.png"][1]["year"] == 2021
    with Index.create(tmp_path / "i") as index:
        summary = index.update([path], options(FakeEncoder()))
        assert summary.added == 1 and summary.faults == {"missing image": 1}
        assert index.update([path], options(FakeEncoder())).unchanged == 1
        write_noise(tmp_path / "gone.png", 3)  # what was missing has come
        assert index.update([path], options(FakeEncoder())).added == 1
        assert index.columns() == {"place": "text", "score": "number", "year": "number"}
    with pytest.raises(InputError, match=r"no column 'picture'.* \(--image-column of cloob index names one\)"):
        open_collection(path, ScanOptions(image_column="picture"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_captions_in_a_list_are_joined(tmp_path: Path, kind: str) -> None:
    write_noise(tmp_path / "a.png", 1)
    write_noise(tmp_path / "b.png", 2)
    rows = [{"filepath": "a.png"}, {"filepath": "b.png", "title": ["bow, target", "two ", "", None, "two"]}]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows[::-1]), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    assert scanned(path) == {"a.png": (None, {}), "b.png": ("bow, target\ntwo", {})}


def test_what_a_table_says_stays_what_it_says(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 1)
    write_noise(tmp_path / "b.png", 2)
    rows = [
        "filepath,title,sku,ean,date,price,name,,title",
        "a.png,002,0002,12345678901234567890,2017,1.50,Shirt 1,,x",
        "b.png,10,0010,12345678901234567891,2018,2,Shirt 2,,y",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    said = {"sku": "0002", "ean": "12345678901234567890", "date": 2017, "price": 1.5, "name": "Shirt 1"}
    assert scanned(tmp_path / "t.csv")["a.png"] == ("002", said)
    assert left_out(tmp_path / "t.csv") == {"from filters, a column of a name that all pictures have": 1}
    (tmp_path / "two.csv").write_text("filepath,title,caption\na.png,x,y\n")
    assert left_out(tmp_path / "two.csv") == {"from filters, a column of a name that all pictures have": 1}
    with Index.create(tmp_path / "i") as index:
        index.update([tmp_path / "t.csv"], options(FakeEncoder()))
        assert [item.date for item in index.items([1, 2])] == ["2017", "2018"]


@pytest.mark.parametrize("image", ["filepath", "image"])
def test_a_time_that_python_does_not_have_is_text_or_nothing(tmp_path: Path, image: str) -> None:
    write_noise(tmp_path / "a.png", 1)
    columns = {
        image: ["a.png" if image == "filepath" else png(1)],
        "day": pa.array([10**7], pa.date32()),
        "far": pa.array([10**18], pa.timestamp("us")),
        "mars": pa.array([0], pa.timestamp("us", tz="Mars/Base")),
        "since": pa.array([10**18], pa.duration("s")),
        "year": [2020],
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    (said,) = scanned(tmp_path / "t.parquet").values()
    text = {"day": "29349-01-26", "far": "<value out of range: 1000000000000000000>", "since": str(10**18)}
    assert said[1] == text | {"year": 2020}


def test_a_time_may_stand_behind_a_space(tmp_path: Path) -> None:
    rows = [("a", "2024-05-31 18:30:00"), ("b", "2024-05-31T18:30:00"), ("c", "2024-05-31 09:00")]
    for seed, (name, _) in enumerate(rows):
        write_noise(tmp_path / f"{name}.png", seed)
    (tmp_path / "t.csv").write_text("filepath,title,date\n" + "".join(f"{n}.png,{n},{date}\n" for n, date in rows))
    with Index.create(tmp_path / "i") as index:
        index.update([tmp_path / "t.csv"], options(FakeEncoder()))
        for filter_, n in (
            ("date >= '2024-05-31T18:00'", 2),
            ("date = '2024-05-31 18:30:00'", 2),
            ("date < '2024-05-31 12:00'", 1),
        ):
            assert index.store.count(parse(filter_)) == n


def test_texts_that_are_not_utf8(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 1)
    (tmp_path / "t.csv").write_bytes(b"filepath,title,place\na.png,caf\xe9,Z\xfcrich\n")
    assert scanned(tmp_path / "t.csv") == {
        "a.png": ("caf\N{REPLACEMENT CHARACTER}", {"place": "Z\N{REPLACEMENT CHARACTER}rich"})
    }
    assert left_out(tmp_path / "t.csv") == {"letters that are not UTF-8": 2}
    write_noise(tmp_path / "folder" / "a.png", 1)
    (tmp_path / "folder" / "metadata.csv").write_bytes(b"file_name,title\na.png,caf\xe9\n")
    assert left_out(tmp_path / "folder") == {"letters that are not UTF-8": 1, "file of another kind": 1}
    (tmp_path / "t.jsonl").write_text(r'{"filepath": "a.png", "title": "cut \ud83d", "x\ud83d": "y\ud83d"}')
    cut = "\N{REPLACEMENT CHARACTER}"
    assert scanned(tmp_path / "t.jsonl") == {"a.png": (f"cut {cut}", {f"x{cut}": f"y{cut}"})}
    write_tar(tmp_path / "s.tar", {"a.png": png(1), "a.json": rb'{"title": "cut \ud83d"}'})
    assert scanned(tmp_path / "s.tar") == {"s.tar::a.png": (f"cut {cut}", {"title": f"cut {cut}"})}
    with Index.create(tmp_path / "i") as index:
        for source in ("t.jsonl", "s.tar"):
            assert index.update([tmp_path / source], options(FakeEncoder())).added == 1


def test_shards(tmp_path: Path) -> None:
    members = {
        "a.png": png(1),
        "a.txt": b"a dog",
        "a.json": json.dumps({"year": 2020, "tags": ["x", "y"], "nested": {"k": 1}, "nan": float("nan")}).encode(),
        "b.png": png(2),
        "c.txt": b"no picture",
    }
    tar = write_tar(tmp_path / "0.tar", members)
    found = scanned(tmp_path)
    assert found["0.tar::a.png"] == ("a dog", {"year": 2020, "tags": "x, y", "nested": '{"k": 1}'})
    assert found["0.tar::b.png"] == (None, {}) and left_out(tmp_path) == {"sample without a picture": 1}
    assert left_out(tmp_path, exclude=("0.*",)) == {"excluded": 1}
    with Index.create(tmp_path.parent / f"{tmp_path.name}-i") as index:
        assert index.update([tmp_path], options(FakeEncoder())).added == 2
        ids = index.store.ids().tolist()
        assert [index.picture(number) for number in ids] == [png(1), png(2)]
        write_tar(tar, members | {"b.png": png(3), "d.png": png(4)})
        os.utime(tar, ns=(10**18, 10**18))
        with pytest.raises(InputError, match="has changed since it was indexed"):
            index.picture(ids[1])
        summary = index.update([tmp_path], options(FakeEncoder()))
        assert (summary.added, summary.changed, summary.described, summary.embedded) == (1, 1, 1, 2)
        whole = tar.read_bytes()
        for content, said in ((whole[:1500], "truncated shard"), (b"no tar" * 999, "shard cannot be read")):
            tar.write_bytes(content)
            summary = index.update([tmp_path], options(FakeEncoder()))
            assert summary.removed == 0 and summary.left_out.counts == {said: 1} and len(index) == 3


@pytest.mark.parametrize("pattern", ["s/*.tar", "s/{0..1}.tar"])
def test_a_pattern_of_shards_is_there_as_long_as_a_file_matches(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "s").mkdir()
    for i in range(2):
        write_tar(tmp_path / "s" / f"{i}.tar", {f"{i}.png": png(i)})
    source = tmp_path / pattern
    with Index.create(tmp_path / "i") as index:
        assert index.update([source], options(FakeEncoder())).added == 2
        write_tar(tmp_path / "s" / "2.tar", {"2.png": png(2)})
        number = 3 if "*" in pattern else 2
        for sources in ([source], []):
            summary = index.update(sources, options(FakeEncoder(), remove_all=True))
            assert (len(index), summary.removed, summary.refused) == (number, 0, {})
        assert summary.unchanged == number
        shutil.rmtree(tmp_path / "s")
        summary = index.update([source], options(FakeEncoder()))
        assert list(summary.refused) == [str(source)] and len(index) == number
        assert index.update([], options(FakeEncoder(), remove_all=True)).removed == number


def test_a_folder_that_is_gone_is_no_pattern(tmp_path: Path) -> None:
    for seed, name in enumerate(("a{b", "c[d]", "cd")):
        write_noise(tmp_path / name / "x.png", seed)
    with Index.create(tmp_path / "i") as index:
        gone = [tmp_path / "a{b", tmp_path / "c[d]"]
        assert index.update(gone, options(FakeEncoder())).added == 2
        for folder in gone:
            shutil.rmtree(folder)
        assert sorted(index.update(gone, options(FakeEncoder())).refused) == [str(folder) for folder in gone]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list a process's open files")
def test_of_many_shards_few_are_open(tmp_path: Path) -> None:
    for i in range(40):
        write_tar(tmp_path / f"{i:02}.tar", {f"{i}.png": png(i), f"{i}.txt": str(i).encode()})
    collection = open_collection(tmp_path)
    found = list(collection.scan(()))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(collection.read, found * 3)) == [png(i) for i in range(40)] * 3
        assert [caption for caption, _ in pool.map(collection.describe, found)] == [str(i) for i in range(40)]
    opened = [link for link in Path("/proc/self/fd").iterdir() if tmp_path in link.resolve().parents]
    assert 1 <= len(opened) <= 8


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_open_index_shows_what_was_indexed_meanwhile(tmp_path: Path, kind: str) -> None:
    def write(name: str, seeds: range) -> None:
        path = tmp_path / "s" / f"{name}.{kind}"
        if kind == "tar":
            write_tar(path, {f"{seed}.png": png(seed) for seed in seeds})
        else:
            parquet.write_table(pa.table({"image": [{"bytes": png(seed), "path": None} for seed in seeds]}), path)
        os.utime(path, ns=(10**18, 10**18 + seeds.start * 10**9))

    (tmp_path / "s").mkdir()
    with Index.create(tmp_path / "i") as writing, Index.open(tmp_path / "i") as index:
        held: dict[str, range] = {}
        for name, seeds in (("0", range(3)), ("1", range(3, 5)), ("0", range(10, 14)), ("0", range(20, 22))):
            write(name, seeds)
            held[name] = seeds
            writing.update([tmp_path / "s"], options(FakeEncoder()))
            shown = [index.picture(number) for number in index.store.ids().tolist()]
            assert sorted(shown) == sorted(png(seed) for seeds in held.values() for seed in seeds)


def test_streamed_shards_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import SimpleHTTPRequestHandler

    write_tar(tmp_path / "0.tar", {"a.png": png(1), "a.txt": b"a dog", "b.png": png(2), "b.txt": b"a cat"})
    (tmp_path / "sizes.json").write_text('{"0.tar": 2}')
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given: object) -> None:
            super().__init__(*given, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *said: object) -> None:
            asked.append(self.path)

    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    with served(serving(Handler)) as address, Index.create(tmp_path / "i") as index:
        source = f"{address}/{{0..0}}.tar"
        assert index.update([source], options(FakeEncoder())).added == 2
        assert asked.count("/0.tar") == 1
        monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "another"))
        assert index.update([source], options(FakeEncoder())).unchanged == 2
        assert asked.count("/0.tar") == 1
        assert [item.path for item in index.items([1, 2])] == ["0.tar::a.png", "0.tar::b.png"]
        assert index.picture(1) == png(1) and asked.count("/0.tar") == 2
        (tmp_path / "0.tar").unlink()
        monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "third"))
        asked.clear()
        summary = index.update([source], options(FakeEncoder("second", seed=1)))
        assert summary.faults == {"missing image": 2} and len(index) == 2
        assert asked.count("/0.tar") == 2  # a request, and its error: not one for each picture


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_data_set_with_its_pictures_inside(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pictures = [{"bytes": png(i), "path": None} for i in range(5)] + [{"bytes": None, "path": "beside.png"}, None]
    write_noise(tmp_path / "data" / "beside.png", 9)
    table = pa.table(
        {
            "mask": [png(9)] * 7,
            "image": pa.array(pictures, kinds),
            "text": [f"number {i}" for i in range(7)],
            "label": list(range(7)),
        }
    )
    how = ScanOptions(image_column="image")
    path = tmp_path / "data" / f"train.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    assert left_out(path, image_column="image", exclude=("train.*",)) == {"excluded": 1}
    found = scanned(path, image_column="image")
    assert found[f"train.{kind}::3"] == ("number 3", {"label": 3}) and len(found) == 7
    with Index.create(tmp_path / "i") as index:
        summary = index.update([path], replace(options(FakeEncoder(), workers=2), scan=how))
        assert summary.added == 6 and summary.faults == {"missing image": 1}
        assert index.picture(4) == png(3)  # which of the columns it was is not in the index
        monkeypatch.setattr(Inside, "read", None)  # what has no picture is not looked at again
        summary = index.update([path], replace(options(FakeEncoder()), scan=how))
        assert summary.unchanged == 6 and summary.faults == {"missing image": 1}


def test_a_picture_that_a_row_of_a_folder_names_is_shown(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 1)
    (tmp_path / "rows").mkdir()
    parquet.write_table(pa.table({"file": ["../a.png"], "text": ["a dog"]}), tmp_path / "rows" / "0.parquet")
    with Index.create(tmp_path / "i") as index:
        index.update([tmp_path / "rows"], replace(options(FakeEncoder()), scan=ScanOptions(image_column="file")))
        assert index.picture(1) == png(1)


def test_a_file_of_a_folder_that_lacks_the_pictures_lists_its_own_columns(tmp_path: Path) -> None:
    picture = {"bytes": png(1), "path": None}
    parquet.write_table(pa.table({"image": [picture], "text": ["a dog"]}), tmp_path / "0.parquet")
    parquet.write_table(pa.table({"photo": [picture], "text": ["a cat"]}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet has no column 'image'; its columns: photo, text$"):
        open_collection(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_picture_that_a_row_names_is_looked_at_again(tmp_path: Path, kind: str) -> None:
    write_noise(tmp_path / "data" / "a.png", 1)
    kinds = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pictures = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}, {"bytes": png(2), "path": "c.png"}]
    table = pa.table({"image": pa.array(pictures, kinds)})
    path = tmp_path / "data" / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    with Index.create(tmp_path / "i") as index:
        summary = index.update([path], options(FakeEncoder()))
        assert summary.added == 2 and summary.faults == {"missing image": 1}
        write_noise(tmp_path / "data" / "a.png", 3)
        write_noise(tmp_path / "data" / "b.png", 4)
        summary = index.update([path], options(FakeEncoder()))
        assert (summary.changed, summary.added, summary.unchanged) == (1, 1, 1) and not summary.faults
        (tmp_path / "data" / "a.png").unlink()
        assert index.update([path], options(FakeEncoder())).faults == {"missing image": 1} and len(index) == 2


def test_decimals_are_numbers(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 1)
    prices = pa.array([Decimal("12.50")], pa.decimal128(10, 2))
    counts = pa.array([Decimal("12.00")], pa.decimal128(10, 2))
    parquet.write_table(pa.table({"filepath": ["a.png"], "price": prices, "n": counts}), tmp_path / "t.parquet")
    assert scanned(tmp_path / "t.parquet")["a.png"][1] == {"price": 12.5, "n": 12}


def test_dates_of_a_column_have_the_year_first_and_others_are_counted(tmp_path: Path) -> None:
    dates = {"20240601": "2024-06-01", "2024-6-1": "2024-06-01", "2024/06/01 7:30": None, "05/31/2024": None}
    dates |= {"2024.01.02 07:30": "2024-01-02T07:30", "2024-05": "2024-05", "2024-13-01": None, "": None}
    rows = ["filepath,date"]
    for seed, date in enumerate(dates):
        write_noise(tmp_path / f"{seed}.png", seed)
        rows.append(f"{seed}.png,{date}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (tmp_path / "floats.csv").write_text("filepath,date\n0.png,2024.0\n1.png,2023.5\n2.png,\n3.png,20240601\n")
    for name, expected in (("t.csv", list(dates.values())), ("floats.csv", ["2024", None, None, "2024-06-01"])):
        with Index.create(tmp_path / f"{name}.idx") as index:
            summary = index.update([tmp_path / name], options(FakeEncoder()))
            assert [item.date for item in index.items(index.store.ids().tolist())] == expected
            assert summary.left_out.counts == {"date that cannot be read": 3 if name == "t.csv" else 1}


def test_a_table_in_a_folder_is_read_whatever_the_form_of_its_accents(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    composed, apart = (unicodedata.normalize(form, "\u00e9t\u00e9.png") for form in ("NFC", "NFD"))
    write_noise(folder / "0" / composed, 0)
    write_noise(folder / "1" / apart, 1)
    rows = ["file_name,text", f"0/{apart},0", f"1/{composed},1", "gone.png,x", "out.png,y"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    assert [caption for caption, _ in scanned(folder).values()] == ["0", "1"]
    said = {"file of another kind": 1, "row of the folder's table that names no picture of it": 2}
    assert left_out(folder) == said
    assert left_out(folder, exclude=("out.png",))["row of the folder's table that names no picture of it"] == 1


def test_what_exif_says(tmp_path: Path) -> None:
    dates = {
        "taken.jpg": ({0x8769: {0x9003: "2021:03:04 05:06:07"}, 0x0132: "2022:01:01 00:00:00"}, "2021-03-04T05:06:07"),
        "changed.jpg": ({0x0132: "2022:01:02 03:04:05"}, "2022-01-02T03:04:05"),
        "unset.jpg": ({0x0132: "0000:00:00 00:00:00"}, None),
        "odd.jpg": ({0x0132: "yesterday"}, None),
        "turned.jpg": ({0x0112: 6}, None),
    }
    for seed, (name, (tags, _)) in enumerate(dates.items()):
        exif = Image.Exif()
        exif.update(tags)
        write_noise(tmp_path / "p" / name, seed, exif=exif)
    with Index.create(tmp_path / "i") as index:
        index.update([tmp_path / "p"], options(FakeEncoder()))
        items = {Path(item.path).name: item for item in index.items(index.store.ids().tolist())}
    assert {name: item.date for name, item in items.items()} == {name: date for name, (_, date) in dates.items()}
    assert (items["taken.jpg"].width, items["taken.jpg"].height) == (12, 10)
    assert (items["turned.jpg"].width, items["turned.jpg"].height) == (10, 12)


def test_one_source_inside_another(tmp_path: Path) -> None:
    write_noise(tmp_path / "p" / "sub" / "a.png", 1)
    with Index.create(tmp_path / "i") as index:
        with pytest.raises(InputError, match="lies in"):
            index.update([tmp_path / "p", tmp_path / "p" / "sub"], options(FakeEncoder()))
        index.update([tmp_path / "p" / "sub"], options(FakeEncoder()))
        with pytest.raises(InputError, match="holds"):
            index.update([tmp_path / "p"], options(FakeEncoder()))
        for link, to in (("same", "p/sub"), ("around", "p")):
            (tmp_path / link).symlink_to(to)
            with pytest.raises(InputError, match="which is a source of this index"):
                index.update([tmp_path / link], options(FakeEncoder()))
        with pytest.raises(InputError, match="no such file"):
            index.update([tmp_path / "q"], UpdateOptions(model=FakeEncoder()))


def test_a_pattern_that_was_typed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "0.tar", {"a.png": png(1)})
    pattern = tmp_path / "{0..0}.tar"
    with Index.create(tmp_path / "index") as index:
        index.update([pattern], options(FakeEncoder()))
        for note in (tmp_path / "cache" / "addresses").iterdir():
            note.unlink()  # as in an index of an earlier version
        with pytest.raises(InputError, match="type it once: cloob index 'PATTERN'"):
            index.picture(1)
        assert index.update([pattern], options(FakeEncoder())).unchanged == 1
        assert index.picture(1) == png(1)
        (tmp_path / "0.tar").unlink()
        assert list(index.update([], options(FakeEncoder())).refused) == [str(pattern)]


def test_a_source_is_not_opened_anew_for_what_cannot_be_read_now(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_source(name: str, options: object) -> object:
        opened.append(name)
        return object()

    def read(collection: object, path: str, content: str) -> bytes:
        raise ReadFailed("missing image", path, "not reached")

    monkeypatch.setattr("cloob.search.scan.open.open_named", open_source)
    monkeypatch.setattr("cloob.search.scan.open._read", read)
    pictures = Pictures()
    for _ in range(3):
        with pytest.raises(ReadFailed):
            pictures.read("s", "s/0.tar::a.png", "")
    assert opened == ["s"]


def test_an_address_that_was_typed_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", {"a.png": png(1)})
    (tmp_path / "sizes.json").write_text('{"a.tar": 1}')
    address = f"pipe:cat {tmp_path}/a.tar"
    with Index.create(tmp_path / "index") as index:
        index.update([address], options(FakeEncoder()))
        assert index.picture(1) == png(1)
        assert index.update([], options(FakeEncoder())).unchanged == 1
        shutil.rmtree(tmp_path / "cache")  # the note is gone with it
        with pytest.raises(InputError, match="type it once"):
            index.update([], options(FakeEncoder()))


def test_a_shard_that_could_not_be_fetched_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fetch() -> Path:
        asked.append(1)
        if len(asked) == 1:
            raise InputError("not reached")
        return write_tar(tmp_path / "0.tar", {"a.png": png(1)})

    collection = shards.Shards("s", [shards.Shard("0.tar", fetch, local=False, samples=1)])
    (found,) = collection.scan(["0.tar::a.png"])
    for _ in range(2):
        with pytest.raises(ReadFailed, match="not reached"):
            collection.read(found)
    assert len(asked) == 1
    monkeypatch.setattr(shards, "_FAILED_SECONDS", 0.0)
    assert collection.read(found) == png(1)


def test_streamed_shards_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {"a.png": png(1)})
        (tmp_path / name / "sizes.json").write_text('{"0.tar": 1}')
    with pytest.raises(InputError, match=r"2 shards are called 0\.tar; index each folder by itself"):
        open_collection(f"pipe:cat {tmp_path}/{{a,b}}/0.tar")


def test_where_the_cache_cannot_be_written_it_is_said_what_that_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    remember("https://example.org/a.tar")
    assert "the index alone will not use it; CLOOB_CACHE names another folder" in caplog.text
