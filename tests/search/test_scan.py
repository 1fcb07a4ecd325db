"""What sources name: folders, tables, shards, data sets."""

import io
import json
import os
import sqlite3
import unicodedata
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest
from index_fakes import FakeEncoder, options, write_noise
from PIL import Image

from cloob.data.batch import BadSample
from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.records import INDEX_FILE
from cloob.search.scan.collection import FoundPicture, ScanOptions
from cloob.search.scan.open import open_collection
from cloob.search.update import UpdateOptions
from make import (
    encoded,
    noise_image,
    write_arrow,
    write_table,
    write_tar,
)


def png(seed):
    return encoded(noise_image(seed))


def scanned(source, **how):
    """Caption and columns by name."""
    collection = open_collection(source, ScanOptions(**how))
    return {
        Path(found.path).name: collection.describe(found) for found in collection.scan()
    }


def left_out(source, **how):
    collection = open_collection(source, ScanOptions(**how))
    list(collection.scan())
    return collection.left_out.counts


def test_a_folder(tmp_path):
    folder = tmp_path / "p"
    for name in (
        "a.png",
        "B.JPG",
        "sub/c.png",
        ".hidden.png",
        ".dir/d.png",
        "other/e.png",
        "idx/thumb.png",
    ):
        write_noise(folder / name, 1)
    Index.create(folder / "idx").close()
    (folder / "other" / "index.sqlite").write_text("of another program")
    (folder / "a.txt").write_text("a dog")
    (folder / "B.TXT").write_text("a cat")
    (folder / "film.mp4").touch()
    (folder / "alone.txt").touch()
    for name in ("@eaDir", "#recycle", "System Volume Information", "sub/node_modules"):
        write_noise(folder / name / "small.png", 1)
    assert scanned(folder) == {
        "a.png": ("a dog", {}),
        "B.JPG": ("a cat", {}),
        "c.png": (None, {}),
        "e.png": (None, {}),
    }
    index = {"folder with an index of its own": 1}
    assert left_out(folder) == {"file of another kind": 2} | index
    assert set(scanned(folder, exclude=("sub", "*.JPG"))) == {"a.png", "e.png"}
    assert left_out(folder, exclude=("sub", "*.JPG")) == index | {
        "excluded": 2,
        "file of another kind": 2,
    }
    assert left_out(folder, exclude=("a.*", "alone.txt")) == index | {
        "excluded": 1,
        "file of another kind": 2,
    }
    assert set(scanned(folder, exclude=("sub/*",))) == {"a.png", "B.JPG", "e.png"}


def test_a_tar_beside_pictures_makes_no_folder_of_shards(tmp_path, index):
    folder, encoder = tmp_path / "p", FakeEncoder()
    for seed in range(3):
        write_noise(folder / "sub" / f"{seed}.png", seed)
    write_tar(folder / "backup.tar", {"x.png": png(9)})
    (folder / "rows.parquet").write_bytes(b"")
    assert set(scanned(folder)) == {"0.png", "1.png", "2.png"}
    assert left_out(folder) == {"tar or Arrow file beside pictures": 2}
    assert set(scanned(folder, exclude=("sub",))) == {"backup.tar::x.png"}
    assert index.update([folder], options(encoder)).added == 3


def test_links_and_pipes(tmp_path):
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
    links = {
        "link that leads out of the folder, not followed": 1,
        "linked folder, not followed": 2,
    }
    assert left_out(folder) == links | {"pipe or device": 2}


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_a_table(tmp_path, kind, index):
    write_noise(tmp_path / "a.png", 1)
    rows = [
        {
            "filepath": "a.png",
            "title": "a dog",
            "year": 2020,
            "score": 0.5,
            "place": "Linz",
        },
        {
            "filepath": "a.png",
            "title": "an animal",
            "year": 1,
            "score": 1.0,
            "place": "x",
        },
        {"filepath": "gone.png", "title": "", "year": 2021, "score": 1.5, "place": ""},
    ]
    found = scanned(path := write_table(tmp_path / f"t.{kind}", rows))
    assert found["a.png"] == (
        "a dog\nan animal",
        {"year": 2020, "score": 0.5, "place": "Linz"},
    )
    assert found["gone.png"][0] is None and found["gone.png"][1]["year"] == 2021
    summary = index.update([path], options(FakeEncoder()))
    assert summary.added == 1 and summary.faults == {"missing image": 1}
    assert index.update([path], options(FakeEncoder())).unchanged == 1
    write_noise(tmp_path / "gone.png", 3)  # what was missing has come
    assert index.update([path], options(FakeEncoder())).added == 1
    assert index.columns() == {"place": "text", "score": "number", "year": "number"}
    with pytest.raises(InputError, match="no column 'picture'"):
        open_collection(path, ScanOptions(image_column="picture"))


def test_what_a_table_says_stays_what_it_says(tmp_path, index):
    write_noise(tmp_path / "a.png", 1)
    write_noise(tmp_path / "b.png", 2)
    rows = [
        "filepath,title,sku,ean,tweet,date,price,name,,title",
        "a.png,002,0002,12345678901234567890,1799999999999999999,2017,1.50,Shirt 1,,x",
        "b.png,10,0010,12345678901234567891,12,2018,2,Shirt 2,,y",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    said = {
        "sku": "0002",
        "ean": "12345678901234567890",
        "tweet": 1799999999999999999,
        "date": 2017,
    }
    said |= {"price": 1.5, "name": "Shirt 1"}
    assert scanned(tmp_path / "t.csv")["a.png"] == ("002", said)
    assert left_out(tmp_path / "t.csv") == {
        "from filters, a column of a name that all pictures have": 1
    }
    (tmp_path / "two.csv").write_text("filepath,title,caption\na.png,x,y\n")
    assert left_out(tmp_path / "two.csv") == {
        "from filters, a column of a name that all pictures have": 1
    }
    index.update([tmp_path / "t.csv"], options(FakeEncoder()))
    assert [item.date for item in index.items([1, 2])] == ["2017", "2018"]


def test_shards(tmp_path, index):
    members = {
        "a.png": png(1),
        "a.txt": b"a dog",
        "a.json": (
            json.dumps(
                {
                    "year": 2020,
                    "tags": ["x", "y"],
                    "nested": {"k": 1},
                    "nan": float("nan"),
                }
            ).encode()
        ),
        "b.png": png(2),
        "c.txt": b"no picture",
    }
    tar = write_tar(tmp_path / "0.tar", members)
    found = scanned(tmp_path)
    assert found["0.tar::a.png"] == (
        "a dog",
        {"year": 2020, "tags": "x, y", "nested": '{"k": 1}'},
    )
    assert found["0.tar::b.png"] == (None, {}) and left_out(tmp_path) == {
        "sample without a picture": 1
    }
    assert left_out(tmp_path, exclude=("0.*",)) == {"excluded": 1}
    assert index.update([tmp_path], options(FakeEncoder())).added == 2
    ids = index.store.ids().tolist()
    assert [index.picture(number) for number in ids] == [png(1), png(2)]
    write_tar(tar, members | {"b.png": png(3), "d.png": png(4)})
    os.utime(tar, ns=(10**18, 10**18))
    with pytest.raises(InputError, match="has changed since it was indexed"):
        index.picture(ids[1])
    summary = index.update([tmp_path], options(FakeEncoder()))
    assert (summary.added, summary.changed, summary.described, summary.embedded) == (
        1,
        1,
        1,
        2,
    )
    whole = tar.read_bytes()
    for content, said in (
        (whole[:1500], "truncated shard"),
        (b"no tar" * 999, "shard cannot be read"),
    ):
        tar.write_bytes(content)
        summary = index.update([tmp_path], options(FakeEncoder()))
        assert (
            summary.removed == 0
            and summary.left_out.counts == {said: 1}
            and len(index) == 3
        )


def test_an_index_is_of_files_of_this_machine(tmp_path, index):
    write_tar(tmp_path / "0.tar", {"a.png": png(1)})
    for source, said in (
        ("https://example.invalid/{0..9}.tar", "is an address"),
        ("pipe:echo x", "is an address"),
        (tmp_path / "*.tar", "no such file"),
    ):
        with pytest.raises(InputError, match=said):
            index.update([source], options(FakeEncoder()))
    tar = tmp_path / "0.tar"
    assert index.update([f"file://{tar}"], options(FakeEncoder())).added == 1
    assert index.items([1])[0].path == f"{tar}::a.png"


def test_a_stranger_s_index_that_names_an_address_fetches_nothing(tmp_path):
    folder = tmp_path / "p"
    write_noise(folder / "a.png", 1)
    with Index.create(tmp_path / "idx") as index:
        index.update([folder], options(FakeEncoder()))
    command = f"pipe:touch {tmp_path / 'was-here'}; cat a.tar"
    with closing(sqlite3.connect(tmp_path / "idx" / INDEX_FILE)) as file:
        file.execute("UPDATE cloob_sources SET path = ?", (command,))
        file.execute("UPDATE cloob_items SET path = ?", (f"{command}::a.png",))
        file.commit()
    with Index.open(tmp_path / "idx", writable=True) as index:
        with pytest.raises(InputError, match="is an address"):
            index.update([], options(FakeEncoder()))
        with pytest.raises(InputError, match="missing image"):
            index.picture(1)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_data_set_with_its_pictures_inside(tmp_path, kind, index):
    kinds = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pictures = [{"bytes": png(i), "path": None} for i in range(5)] + [
        {"bytes": None, "path": "beside.png"},
        None,
    ]
    write_noise(tmp_path / "data" / "beside.png", 9)
    table = pa.table(
        {
            "image": pa.array(pictures, kinds),
            "text": [f"number {i}" for i in range(7)],
            "label": list(range(7)),
        }
    )
    path = write_arrow(tmp_path / "data" / f"train.{kind}", table)
    assert left_out(path, exclude=("train.*",)) == {"excluded": 1}
    found = scanned(path)
    assert found[f"train.{kind}::3"] == ("number 3", {"label": 3}) and len(found) == 7
    summary = index.update([path], options(FakeEncoder(), workers=2))
    assert summary.added == 6 and summary.faults == {"missing image": 1}
    assert index.picture(4) == png(3)
    for row in ("7", "-1", "x"):
        with pytest.raises(BadSample, match="not in its source"):
            open_collection(path).read(FoundPicture(f"{path}::{row}", None, None))
    summary = index.update([path], options(FakeEncoder()))
    assert summary.unchanged == 6 and summary.faults == {"missing image": 1}


SECONDS = 10**9
TIME = datetime.fromtimestamp(SECONDS).isoformat()


def test_dates_of_a_column_have_the_year_first_and_others_are_counted(tmp_path):
    dates = {
        "20240601": "2024-06-01",
        "2024-6-1": "2024-06-01",
        "2024/06/01 7:30": None,
        "05/31/2024": None,
    }
    dates |= {
        "2024.01.02 07:30": "2024-01-02T07:30",
        "2024-05": "2024-05",
        "2024-13-01": None,
        "": TIME,
    }
    rows = ["filepath,date"]
    for seed, date in enumerate(dates):
        write_noise(tmp_path / f"{seed}.png", seed)
        os.utime(tmp_path / f"{seed}.png", (SECONDS, SECONDS))
        rows.append(f"{seed}.png,{date}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (tmp_path / "floats.csv").write_text(
        "filepath,date\n0.png,2024.0\n1.png,2023.5\n2.png,\n3.png,20240601\n"
    )
    for name, expected in (
        ("t.csv", list(dates.values())),
        ("floats.csv", ["2024", None, TIME, "2024-06-01"]),
    ):
        with Index.create(tmp_path / f"{name}.idx") as index:
            summary = index.update([tmp_path / name], options(FakeEncoder()))
            assert [
                item.date for item in index.items(index.store.ids().tolist())
            ] == expected
            assert summary.left_out.counts == {
                "date that cannot be read": 3 if name == "t.csv" else 1
            }


def test_an_imagefolder_whatever_the_form_of_its_accents(tmp_path):
    folder = tmp_path / "p"
    composed, apart = (
        unicodedata.normalize(form, "\u00e9t\u00e9.png") for form in ("NFC", "NFD")
    )
    for place, name in (("0", composed), ("1", apart), ("2", "unnamed.png")):
        write_noise(folder / place / name, int(place))
    rows = [
        "file_name,text,year",
        f"0/{apart},0,2020",
        f"1/{composed},1,2021",
        "gone.png,x,1",
        "out.png,y,1",
    ]
    (folder / "metadata.csv").write_text("\n".join(rows))
    assert list(scanned(folder).values()) == [
        ("0", {"year": 2020}),
        ("1", {"year": 2021}),
        (None, {}),
    ]
    unnamed = "row of the folder's table that names no picture of it"
    assert left_out(folder) == {"file of another kind": 1, unnamed: 2}
    assert left_out(folder, exclude=("out.png",))[unnamed] == 1


def test_a_date_is_that_of_exif_else_of_the_file(tmp_path, index):
    dates = {
        "taken.jpg": (
            {0x8769: {0x9003: "2021:03:04 05:06:07"}, 0x0132: "2022:01:01 00:00:00"},
            "2021-03-04T05:06:07",
        ),
        "changed.jpg": ({0x0132: "2022:01:02 03:04:05"}, "2022-01-02T03:04:05"),
        "odd.jpg": ({0x0132: "yesterday"}, TIME),
        "turned.jpg": ({0x0112: 6, 0x010F: "Canon"}, TIME),
        "IMG-20240101-WA0007.jpg": ({}, TIME),
        "midnight.jpg": ({0x0132: "2022:01:02 24:00:00"}, "2022-01-02"),
        "future.jpg": ({0x0132: "9999:01:01 00:00:00"}, TIME),
    }
    for seed, (name, (tags, _)) in enumerate(dates.items()):
        exif = Image.Exif()
        exif.update(tags)
        write_noise(tmp_path / "p" / name, seed, exif=exif)
        os.utime(tmp_path / "p" / name, (SECONDS, SECONDS))
    index.update([tmp_path / "p"], options(FakeEncoder()))
    items = {
        Path(item.path).name: item for item in index.items(index.store.ids().tolist())
    }
    small = Image.open(io.BytesIO(index.thumbnail(items["turned.jpg"].id)))
    assert small.size == (10, 12) and not small.getexif()
    assert {name: item.date for name, item in items.items()} == {
        name: date for name, (_, date) in dates.items()
    }
    assert (items["turned.jpg"].width, items["turned.jpg"].height) == (10, 12)
    assert [items[name].date_from for name in ("taken.jpg", "odd.jpg")] == [
        "exif",
        "file",
    ]


def test_a_caption_that_is_no_utf8_is_counted(tmp_path, index):
    for seed, name in enumerate(("wide", "latin", "none")):
        write_noise(tmp_path / "p" / f"{name}.jpg", seed)
    (tmp_path / "p" / "wide.txt").write_bytes("Straße".encode("utf-16"))
    (tmp_path / "p" / "latin.txt").write_bytes("Straße".encode("latin-1"))
    done = index.update([tmp_path / "p"], options(FakeEncoder()))
    assert done.left_out.counts == {"caption not UTF-8": 1}
    captions = {
        Path(item.path).stem: item.caption
        for item in index.items(index.store.ids().tolist())
    }
    assert captions == {"wide": "Straße", "latin": None, "none": None}
    (tmp_path / "p" / "none.txt").write_text("mine")
    assert index.update([tmp_path / "p"], options(FakeEncoder())).described == 1


def test_a_column_of_a_source_without_columns_is_refused(tmp_path):
    write_noise(tmp_path / "p" / "a.png", 1)
    write_tar(tmp_path / "t" / "0.tar", {"a.png": png(1)})
    for source in ("p", "p/a.png", "t"):
        for column in ("image_column", "caption_column"):
            named = ScanOptions(**{column: "x"})
            with pytest.raises(InputError, match="is no table"):
                open_collection(tmp_path / source, named)
    (tmp_path / "p" / "metadata.csv").write_text("file_name,said\na.png,a dog\n")
    assert scanned(tmp_path / "p", caption_column="said")["a.png"][0] == "a dog"


def test_one_source_inside_another(tmp_path, index):
    write_noise(tmp_path / "p" / "sub" / "a.png", 1)
    with pytest.raises(InputError, match="lies in"):
        index.update([tmp_path / "p", tmp_path / "p" / "sub"], options(FakeEncoder()))
    index.update([tmp_path / "p" / "sub"], options(FakeEncoder()))
    with pytest.raises(InputError, match="holds"):
        index.update([tmp_path / "p"], options(FakeEncoder()))
    for link, to in (("same", "p/sub"), ("around", "p")):
        (tmp_path / link).symlink_to(to)
    assert (
        index.update([tmp_path / "same"], options(FakeEncoder())).unchanged == 1
    )  # the same folder
    with pytest.raises(InputError, match="which is a source of this index"):
        index.update([tmp_path / "around"], options(FakeEncoder()))
    with pytest.raises(InputError, match="no such file"):
        index.update([tmp_path / "q"], UpdateOptions(model=FakeEncoder()))
