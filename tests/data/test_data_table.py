"""Tables of paths and captions, also with one quote too many, which takes rows into one field."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from cloob import open_source
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample
from cloob.errors import InputError
from make import noise, write_table

ROWS = [{"title": f"caption {i}", "filepath": f"img/{i}.png", "n": i} for i in range(4)]
FORMATS = ("t.csv", "t.tsv", "t.parquet", "t.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    for i in range(64):
        (tmp_path / "img" / f"{i}.png").write_bytes(noise(i))
    return tmp_path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(folder: Path, name: str) -> None:
    path = write_table(folder / name, [*ROWS, {**ROWS[0], "filepath": str(folder / "img" / "0.png")}])
    source = open_source(path)
    assert len(source) == 5 and source.shard_sizes == (5,) and source.name.endswith(name)
    for i in (3, 0):
        sample = source.read(i)
        assert (sample.key, sample.caption, sample.image) == (f"img/{i}.png", f"caption {i}", noise(i))
    assert source.read(4).image == noise(0)  # an absolute path is taken as it is
    assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)
    assert open_source(path, caption_column="filepath").read(1).caption == "img/1.png"  # one column can be both


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("cc3m.csv", '\ttitle\tfilepath\n0\ta "fine", red flag\timg/0.png\n1\t"two\nlines"\timg/1.png\n', None),
        ("t.csv", "filepath, title,n\nimg/0.png,a,1\nimg/1.png,b,1\n", ["a", "b"]),
        ("t.csv", " title ,filepath , n\na,img/0.png,1\nb,img/1.png,1\n", ["a", "b"]),
        ("t.csv", "\ufefftitle;filepath\r\nw\xfcrfel;img/0.png\r\nb;img/1.png\r\n", ["w\xfcrfel", "b"]),
        ("t.csv", "title,filepath\ra,img/0.png\rb,img/1.png\r", ["a", "b"]),
        ("t.jsonl", "".join(json.dumps(row) + "\r" for row in ROWS), [f"caption {i}" for i in range(4)]),
    ],
)
def test_delimiters_headers_and_line_ends(folder: Path, name: str, content: str, captions: list[str] | None) -> None:
    (folder / name).write_bytes(content.encode())
    source = open_source(folder / name)
    expected = captions or ['a "fine", red flag', "two\nlines"]  # tab-separated with a csv name, as the authors have it
    assert [source.read(i).caption for i in range(len(source))] == expected


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_bad_rows_are_counted_by_reason(folder: Path, name: str) -> None:
    bad = [
        ("gone", "img/99.png", "missing image"),
        (" ", "img/0.png", "empty caption"),
        ("no path", "", "missing image"),
        ("a" * (MAX_CAPTION_BYTES + 1), "img/0.png", "caption too long"),
        ("a folder", "img", "missing image"),
        ("b" * 1_000_000, "img/0.png", "caption too long"),
    ]
    rows = [*ROWS, *({"title": title, "filepath": path, "n": 0} for title, path, _ in bad)]
    source = open_source(write_table(folder / name, rows))
    for i, (_, _, reason) in enumerate(bad, 4):
        with pytest.raises(BadSample, match=f"row {i + 1} of {name}") as caught:
            source.read(i)
        assert caught.value.reason == reason


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names are text here")
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_what_is_not_utf8(folder: Path, name: str) -> None:
    """A caption spoils its own row; a path is read, and its key is UTF-8."""
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(noise(7))
    path = write_table(folder / name, [*ROWS, *({**ROWS[0], "filepath": path} for path in ("CAFE.png", "no-CAFE"))])
    path.write_bytes(path.read_bytes().replace(b"CAFE", b"caf\xe9").replace(b"caption 2", b"caf\xe9"))
    source = open_source(path)
    with pytest.raises(BadSample, match="caption not UTF-8"):
        source.read(2)
    assert source.read(3).caption == "caption 3"
    assert (source.read(4).key, source.read(4).image) == ("caf\N{REPLACEMENT CHARACTER}.png", noise(7))
    with pytest.raises(BadSample) as caught:
        source.read(5)
    assert caught.value.key == "no-caf\N{REPLACEMENT CHARACTER}"


def test_captions_that_are_no_text(folder: Path) -> None:
    captions = [7, "caf\xe9", 1.5, True, None]
    rows = [{"filepath": "img/0.png"}, *({**ROWS[0], "title": caption} for caption in captions)]
    source = open_source(write_table(folder / "t.jsonl", rows))
    assert [source.read(i).caption for i in range(1, 5)] == ["7", "caf\xe9", "1.5", "true"]
    missing = open_source(write_table(folder / "t.parquet", [*ROWS, {"title": None, "filepath": "img/0.png", "n": 0}]))
    for each, row in ((source, 0), (source, 5), (missing, 4)):
        with pytest.raises(BadSample, match="missing caption"):
            each.read(row)
    rows = [{"title": [1, 2], "filepath": "img/0.png"}]
    with pytest.raises(InputError, match=r"column 'title' holds list<.*>, not text"):
        open_source(write_table(folder / "t.parquet", rows))
    source = open_source(write_table(folder / "t.jsonl", rows))  # a list of captions is as many rows
    assert [source.read(i).caption for i in range(2)] == ["1", "2"]


def quoted(path: Path, changes: dict[int, str], end: str = "\n", turned: bool = False) -> Path:
    """64 rows with captions of their own; ``changes`` replaces captions, by row from 1."""
    rows = [("filepath", "title"), *((f"img/{i - 1}.png", changes.get(i, f"caption {i}")) for i in range(1, 65))]
    path.write_bytes((end.join(",".join(row[::-1] if turned else row) for row in rows) + end).encode())
    return path


@pytest.mark.parametrize(("row", "end"), [(4, "\n"), (41, "\r\n"), (63, "\r")])
def test_a_quote_that_is_never_closed(folder: Path, row: int, end: str) -> None:
    source = open_source(quoted(folder / "t.csv", {row: '"oh no'}, end))
    assert len(source) == row and source.read(row - 2).caption == f"caption {row - 1}"
    with pytest.raises(BadSample, match="stray quote") as caught:
        source.read(row - 1)
    assert f"row {row} of t.csv" in str(caught.value)


def test_captions_of_several_lines_are_no_fault(folder: Path) -> None:
    captions = {
        3: '"two\nlines, with a comma"',
        5: '"a ""quoted"" word\r\n\r\nafter an empty line"',
        7: '"' + "\n".join(f"verse {i}, and on it goes, and on" for i in range(200)) + '"',
        9: '"see a.png\nand b.png, which is blue"',
        64: '"the last\none"',
    }
    source = open_source(quoted(folder / "t.csv", captions))
    assert [bool(source.read(i).caption) for i in range(64)] == [True] * 64
    assert source.read(4).caption == 'a "quoted" word\r\n\r\nafter an empty line'
