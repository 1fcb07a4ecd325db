from __future__ import annotations

import json
import os
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample
from cloob.data.open import open_source
from cloob.data.sources.table import TableSource
from cloob.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, image: Callable[..., bytes]) -> Path:
    (tmp_path / "img").mkdir()
    for i in range(4):
        (tmp_path / "img" / f"{i}.png").write_bytes(image(i))
    return tmp_path


ROWS = [{"title": f"caption {i}", "filepath": f"img/{i}.png", "n": i} for i in range(4)]


def write(path: Path, rows: list[dict]) -> Path:
    """The rows in the format that the ending says; without pyarrow's writers where a person would not use them."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        tab = {".csv": ",", ".tsv": "\t"}[path.suffix]
        path.write_text(
            "\n".join(tab.join(map(str, row)) for row in [rows[0].keys(), *(r.values() for r in rows)]) + "\n"
        )
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl"])
def test_every_format_gives_the_same_pairs(folder: Path, image: Callable[..., bytes], name: str) -> None:
    source = open_source(write(folder / name, ROWS))
    assert len(source) == 4 and source.shard_sizes == (4,) and source.name.endswith(name)
    for i in (3, 0):
        sample = source.read(i)
        assert (sample.key, sample.caption, sample.image) == (f"img/{i}.png", f"caption {i}", image(i))


def test_tab_separated_with_a_csv_name_as_the_authors_have_it(folder: Path) -> None:
    path = folder / "cc3m.csv"
    path.write_text('\ttitle\tfilepath\n0\ta "fine", red flag\timg/0.png\n1\t"two\nlines"\timg/1.png\n')
    source = open_source(path)
    assert [source.read(i).caption for i in range(2)] == ['a "fine", red flag', "two\nlines"]


def test_column_names_can_be_chosen_and_a_byte_order_mark_is_no_part_of_them(folder: Path) -> None:
    path = folder / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfcap;img\r\nw\xc3\xbcrfel;img/0.png\r\nb;img/1.png\r\n")
    assert open_source(path, image_column="img", caption_column="cap").read(0).caption == "würfel"


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_old_mac_line_ends(folder: Path, name: str) -> None:
    path = write(folder / name, ROWS)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    source = open_source(path)
    assert [source.read(i).caption for i in range(len(source))] == [f"caption {i}" for i in range(4)]


def test_absolute_paths_are_taken_as_they_are(folder: Path, image: Callable[..., bytes]) -> None:
    (folder / "deep").mkdir()
    rows = [{"title": "a", "filepath": str(folder / "img" / f"{i}.png")} for i in range(2)]
    assert open_source(write(folder / "deep" / "t.csv", rows)).read(1).image == image(1)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_bad_rows_are_counted_by_reason(folder: Path, name: str) -> None:
    rows = [
        *ROWS,
        {"title": "gone", "filepath": "img/9.png"},
        {"title": " ", "filepath": "img/0.png"},
        {"title": "no path", "filepath": ""},
        {"title": "a" * (MAX_CAPTION_BYTES + 1), "filepath": "img/0.png"},
        {"title": "a folder", "filepath": "img"},
        {"title": "b" * 1_000_000, "filepath": "img/0.png"},
    ]
    source = TableSource(write(folder / name, [{"n": 0, **row} for row in rows]))
    found = []
    for i in range(len(source)):
        try:
            source.read(i)
            found.append("")
        except BadSample as bad:
            found.append(bad.reason if f"row {i + 1} of {name}" in bad.detail else bad.detail)
    assert found == [
        "",
        "",
        "",
        "",
        "missing image",
        "empty caption",
        "missing image",
        "caption too long",
        "missing image",
        "caption too long",
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_caption_that_is_not_utf8_spoils_its_own_row_only(folder: Path, name: str) -> None:
    path = write(folder / name, ROWS)
    path.write_bytes(path.read_bytes().replace(b"caption 2", b"caf\xe9"))
    source = open_source(path)
    with pytest.raises(BadSample, match="caption not UTF-8"):
        source.read(2)
    assert source.read(3).caption == "caption 3"


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names are text here")
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_path_that_is_not_utf8_is_read_and_has_a_key_that_is(
    folder: Path, image: Callable[..., bytes], name: str
) -> None:
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(image(7))
    path = write(folder / name, [*ROWS, {**ROWS[0], "filepath": "CAFE"}, {**ROWS[0], "filepath": "no-CAFE"}])
    path.write_bytes(path.read_bytes().replace(b"CAFE", b"caf\xe9.png"))
    source = open_source(path)
    assert (source.read(4).key, source.read(4).image) == ("caf\N{REPLACEMENT CHARACTER}.png", image(7))
    with pytest.raises(BadSample) as caught:
        source.read(5)
    assert caught.value.key == "no-caf\N{REPLACEMENT CHARACTER}.png"


def test_a_line_of_json_may_lack_a_column_that_others_have(folder: Path) -> None:
    source = open_source(write(folder / "t.jsonl", [{"filepath": "img/0.png"}, *ROWS]))
    assert source.read(1).caption == "caption 0"
    with pytest.raises(BadSample, match="missing caption"):
        source.read(0)


def test_numbers_are_captions_in_json_lines_too(folder: Path) -> None:
    captions = [7, "caf\xe9", 1.5, True, None]
    source = open_source(write(folder / "t.jsonl", [{**ROWS[0], "title": caption} for caption in captions]))
    assert [source.read(i).caption for i in range(4)] == ["7", "caf\xe9", "1.5", "true"]


@pytest.mark.parametrize("header", ["filepath, title,n", " title ,filepath , n"])
def test_spaces_around_the_names_in_a_header_are_no_part_of_them(folder: Path, header: str) -> None:
    rows = [(f"img/{i}.png", f"word {i}") if header[0] == "f" else (f"word {i}", f"img/{i}.png") for i in range(4)]
    (folder / "t.csv").write_text("\n".join([header, *(f"{first}, {second},1" for first, second in rows)]))
    source = open_source(folder / "t.csv")
    assert [source.read(i).caption for i in range(4)] == [f"word {i}" for i in range(4)]


def test_null_captions_are_missing(folder: Path) -> None:
    source = open_source(write(folder / "t.parquet", [*ROWS, {"title": None, "filepath": "img/0.png", "n": 0}]))
    with pytest.raises(BadSample, match="missing caption"):
        source.read(4)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl"])
def test_one_column_can_be_both(folder: Path, image: Callable[..., bytes], name: str) -> None:
    source = open_source(write(folder / name, ROWS), caption_column="filepath")
    assert (source.read(1).image, source.read(1).caption) == (image(1), "img/1.png")


def test_columns_that_hold_no_text(folder: Path) -> None:
    rows = [{"title": [1, 2], "filepath": "img/0.png"}]
    with pytest.raises(InputError, match=r"column 'title' holds list<.*>, not text"):
        open_source(write(folder / "t.parquet", rows))
    with pytest.raises(InputError, match=r"line 1: 'title' is \[1, 2\], not text"):
        open_source(write(folder / "t.jsonl", rows))


def test_rows_cost_their_bytes_and_no_python_objects(folder: Path) -> None:
    path = folder / "many.csv"
    path.write_text("title,filepath\n" + "".join(f"caption {i},img/0.png\n" for i in range(200_000)))
    tracemalloc.start()
    source = TableSource(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 200_000 and held < 1_000_000  # a str alone takes 50 bytes: that would be 20 MB
    assert source.read(199_999).caption == "caption 199999"


def test_a_copy_for_another_process_reads_the_same(folder: Path) -> None:
    source = open_source(write(folder / "t.csv", ROWS))
    assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)
