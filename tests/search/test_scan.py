"""What sources name: folders, pictures and tables."""

import io
import os
import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from index_fakes import FakeEncoder, options, write_noise
from PIL import Image

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.records import INDEX_FILE
from cloob.search.sources import LeftOut, open_collection
from make import write_table, write_tar

SECONDS = 10**9
TIME = datetime.fromtimestamp(SECONDS).isoformat()


def scanned(source, **columns):
    """Caption and columns by name."""
    collection = open_collection(str(source), LeftOut(), **columns)
    found = {Path(each.path).name: each for each in collection.scan()}
    described = {name: collection.describe(each) for name, each in found.items()}
    return {name: (each.caption, each.columns) for name, each in described.items()}


def left_out(source):
    counted = LeftOut()
    list(open_collection(str(source), counted).scan())
    return counted.counts


def items_by_name(index):
    items = index.items(index.store.ids())
    return {Path(item.path).name: item for item in items}


def test_a_folder(tmp_path):
    folder = tmp_path / "p"
    skipped = "@eaDir/s #recycle/s sub/node_modules/s .dir/d .hidden idx/thumb"
    for name in ("a", "sub/c", "other/e", *skipped.split()):
        write_noise(folder / f"{name}.png", 1)
    write_noise(folder / "B.JPG", 1)
    Index.create(folder / "idx").close()
    (folder / "other" / "index.sqlite").write_text("of another program")
    (folder / "a.txt").write_text("a dog")
    (folder / "B.TXT").write_text("a cat")
    for name in ("film.mp4", "shards.tar", "alone.txt"):
        (folder / name).touch()
    captions = {name: caption for name, (caption, _) in scanned(folder).items()}
    assert captions == {
        "a.png": "a dog",
        "B.JPG": "a cat",
        "c.png": None,
        "e.png": None,
    }
    assert left_out(folder) == {
        "folder with an index of its own": 1,
        "file of another kind": 3,
    }


def test_links_and_pipes(tmp_path):
    folder = tmp_path / "p"
    write_noise(folder / "a.png", 1)
    write_noise(tmp_path / "outside.png", 2)
    links = {
        "inside.png": "a.png",
        "out.png": tmp_path / "outside.png",
        "nowhere.png": "gone.png",
        "round": ".",
        "out": tmp_path,
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "a.txt")  # nor is a caption read from one
    assert scanned(folder) == {"a.png": (None, {}), "inside.png": (None, {})}
    assert left_out(folder) == {
        "link that leads out of the folder, not followed": 1,
        "linked folder, not followed": 2,
        "pipe or device": 2,
    }


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_a_table(tmp_path, kind, index):
    write_noise(tmp_path / "a.png", 1)
    names = ("filepath", "title", "year", "score", "place")
    rows = [
        ("a.png", "a dog", 2020, 0.5, "Linz"),
        ("a.png", "an animal", 1, 1.0, "x"),
        ("gone.png", "", 2021, 1.5, ""),
    ]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    path = write_table(tmp_path / f"t.{kind}", rows)
    found = scanned(path)
    columns = {"year": 2020, "score": 0.5, "place": "Linz"}
    assert found["a.png"] == ("a dog\nan animal", columns)
    assert found["gone.png"][0] is None
    assert found["gone.png"][1]["year"] == 2021
    summary = index.update([path], options(FakeEncoder()))
    assert summary.added == 1
    assert summary.faults == {"missing image": 1}
    assert index.update([path], options(FakeEncoder())).unchanged == 1
    write_noise(tmp_path / "gone.png", 3)  # what was missing has come
    assert index.update([path], options(FakeEncoder())).added == 1
    assert index.store.columns() == {
        "place": "text",
        "score": "number",
        "year": "number",
    }
    with pytest.raises(InputError, match="no column 'picture'"):
        scanned(path, image_column="picture")


def test_what_a_table_says_stays_what_it_says(tmp_path, index):
    for seed, name in enumerate("ab"):
        write_noise(tmp_path / f"{name}.png", seed)
    rows = [
        "filepath,title,sku,ean,tweet,date,price,name,,title",
        "a.png,002,0002,12345678901234567890,1799999999999999999,2017,1.50,Shirt 1,,x",
        "b.png,10,0010,12345678901234567891,12,2018,2,Shirt 2,,y",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    columns = {
        "sku": "0002",
        "ean": "12345678901234567890",
        "tweet": 1799999999999999999,
        "date": 2017,
        "price": 1.5,
        "name": "Shirt 1",
    }
    assert scanned(tmp_path / "t.csv")["a.png"] == ("002", columns)
    hidden = {"from filters, a column of a name that all pictures have": 1}
    assert left_out(tmp_path / "t.csv") == hidden
    (tmp_path / "two.csv").write_text("filepath,title,caption\na.png,x,y\n")
    assert left_out(tmp_path / "two.csv") == hidden
    index.update([tmp_path / "t.csv"], options(FakeEncoder()))
    found = [item.date for item in index.items([1, 2])]
    assert found == ["2017", "2018"]


def test_an_index_is_of_files_of_this_machine(tmp_path, index):
    tar = write_tar(tmp_path / "0.tar", {"a.png": b""})
    sources = {
        "https://example.invalid/{0..9}.tar": "is an address",
        tmp_path / "*.png": "no such file",
        tar: "unpack a tar",
    }
    for source, message in sources.items():
        with pytest.raises(InputError, match=message):
            index.update([source], options(FakeEncoder()))
    picture = write_noise(tmp_path / "a.png", 1)
    assert index.update([picture], options(FakeEncoder())).added == 1
    assert index.items([1])[0].path == str(picture)


def test_a_stranger_s_index_that_names_an_address_fetches_nothing(tmp_path):
    folder = tmp_path / "p"
    write_noise(folder / "a.png", 1)
    with Index.create(tmp_path / "idx") as index:
        index.update([folder], options(FakeEncoder()))
    address = "https://host.invalid/a.tar"
    with closing(sqlite3.connect(tmp_path / "idx" / INDEX_FILE)) as file:
        file.execute("UPDATE cloob_sources SET path = ?", (address,))
        file.execute("UPDATE cloob_items SET path = ?", (f"{address}::a.png",))
        file.commit()
    with Index.open(tmp_path / "idx", writable=True) as index:
        with pytest.raises(InputError, match="is an address"):
            index.update([], options(FakeEncoder()))
        with pytest.raises(InputError, match="missing image"):
            index.picture(1)


DATES = {
    "20240601": "2024-06-01",
    "2024-6-1": "2024-06-01",
    "2024/06/01 7:30": None,
    "05/31/2024": None,
    "2024.01.02 07:30": "2024-01-02T07:30",
    "2024-05": "2024-05",
    "2024-13-01": None,
    "": TIME,
}
FLOATS = {"2024.0": "2024", "2023.5": None, "": TIME, "20240601": "2024-06-01"}


@pytest.mark.parametrize("dates", [DATES, FLOATS])
def test_dates_of_a_column_have_the_year_first_and_others_are_counted(
    tmp_path, index, dates
):
    rows = ["filepath,date"]
    for seed, date in enumerate(dates):
        path = write_noise(tmp_path / f"{seed}.png", seed)
        os.utime(path, (SECONDS, SECONDS))
        rows.append(f"{path.name},{date}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    summary = index.update([tmp_path / "t.csv"], options(FakeEncoder()))
    items = items_by_name(index)
    found = [items[f"{seed}.png"].date for seed in range(len(dates))]
    assert found == list(dates.values())
    unread = list(dates.values()).count(None)
    assert summary.left_out.counts == {"date that cannot be read": unread}


def test_a_date_is_that_of_exif_else_of_the_file(tmp_path, index):
    taken = {0x8769: {0x9003: "2021:03:04 05:06:07"}, 0x0132: "2022:01:01 00:00:00"}
    dates = {
        "taken.jpg": (taken, "2021-03-04T05:06:07"),
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
        path = write_noise(tmp_path / "p" / name, seed, exif=exif)
        os.utime(path, (SECONDS, SECONDS))
    index.update([tmp_path / "p"], options(FakeEncoder()))
    items = items_by_name(index)
    expected = {name: date for name, (_, date) in dates.items()}
    assert {name: item.date for name, item in items.items()} == expected
    turned = items["turned.jpg"]
    small = Image.open(io.BytesIO(index.thumbnail(turned.id)))
    assert small.size == (turned.width, turned.height) == (10, 12)
    assert not small.getexif()


def test_a_caption_that_is_no_utf8_is_counted(tmp_path, index):
    for seed, name in enumerate(("wide", "latin", "none")):
        write_noise(tmp_path / "p" / f"{name}.jpg", seed)
    (tmp_path / "p" / "wide.txt").write_bytes("Straße".encode("utf-16"))
    (tmp_path / "p" / "latin.txt").write_bytes("Straße".encode("latin-1"))
    done = index.update([tmp_path / "p"], options(FakeEncoder()))
    assert done.left_out.counts == {"caption not UTF-8": 1}
    captions = {name: item.caption for name, item in items_by_name(index).items()}
    assert captions == {"wide.jpg": "Straße", "latin.jpg": None, "none.jpg": None}
    (tmp_path / "p" / "none.txt").write_text("mine")
    assert index.update([tmp_path / "p"], options(FakeEncoder())).described == 1


@pytest.mark.parametrize("column", ["image_column", "caption_column"])
def test_a_column_of_a_source_without_columns_is_refused(tmp_path, index, column):
    picture = write_noise(tmp_path / "a.png", 1)
    for source in (tmp_path, picture):
        with pytest.raises(InputError, match="is no table"):
            index.update([source], options(FakeEncoder(), **{column: "x"}))


def test_one_source_inside_another(tmp_path, index):
    outer = tmp_path / "p"
    inner = tmp_path / "p" / "sub"
    write_noise(inner / "a.png", 1)
    with pytest.raises(InputError, match="lies in"):
        index.update([outer, inner], options(FakeEncoder()))
    index.update([inner], options(FakeEncoder()))
    (tmp_path / "around").symlink_to("p")
    for source, message in (
        (outer, "holds"),
        (tmp_path / "around", "which is a source of this index"),
        (tmp_path / "q", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            index.update([source], options(FakeEncoder()))
