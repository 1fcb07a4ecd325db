"""Tables with one quote too many, which takes rows into one field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cloob import cli, open_source
from cloob.data.batch import BadSample
from cloob.errors import InputError

WORDS = "--model tiny-vit --image-size 32 --epochs 1 --batch-size 31 --workers 0 --device cpu"


@pytest.fixture
def folder(tmp_path: Path, image: Callable[..., bytes]) -> Path:
    (tmp_path / "img").mkdir()
    for i in range(64):
        (tmp_path / "img" / f"{i}.png").write_bytes(image(i))
    return tmp_path


def table(path: Path, changes: dict[int, str], end: str = "\n", turned: bool = False) -> Path:
    """64 rows with captions of their own; ``changes`` replaces captions, by row from 1."""
    rows = [("filepath", "title"), *((f"img/{i - 1}.png", changes.get(i, f"caption {i}")) for i in range(1, 65))]
    path.write_bytes((end.join(",".join(row[::-1] if turned else row) for row in rows) + end).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("row", [4, 41, 63])
def test_a_quote_that_is_never_closed(folder: Path, row: int, end: str) -> None:
    source = open_source(table(folder / "t.csv", {row: '"oh no'}, end))
    assert len(source) == row and source.read(row - 2).caption == f"caption {row - 1}"
    lines = f"{64 - row} lines" if row < 63 else "1 line"
    with pytest.raises(
        BadSample, match=rf"row {row} of t\.csv: a field takes in {lines} that look like rows"
    ) as caught:
        source.read(row - 1)
    assert caught.value.reason == "stray quote"


def test_captions_before_paths(folder: Path) -> None:
    source = open_source(table(folder / "t.csv", {9: 'a "nice', 10: '"oh', 20: 'no"'}, turned=True))
    with pytest.raises(BadSample, match=r"row 10 of t\.csv: a field takes in 10 lines"):
        source.read(9)
    assert len(source) == 54 and source.read(8).caption == 'a "nice' and source.read(10).caption == "caption 21"


def test_captions_of_several_lines_are_no_fault(folder: Path) -> None:
    captions = {
        3: '"two\nlines, with a comma"',
        5: '"a ""quoted"" word\r\n\r\nafter an empty line"',
        7: '"' + "\n".join(f"verse {i}, and on it goes, and on" for i in range(200)) + '"',
        9: '"see a.png\nand b.png, which is blue"',
        64: '"the last\none"',
    }
    source = open_source(table(folder / "t.csv", captions))
    assert [bool(source.read(i).caption) for i in range(64)] == [True] * 64
    assert source.read(4).caption == 'a "quoted" word\r\n\r\nafter an empty line'


def test_where_the_columns_no_longer_fit_the_row_is_named(folder: Path) -> None:
    path = table(folder / "t.csv", {41: '"oh no', 50: '"red, and blue"'})
    with pytest.raises(InputError, match=r"got 3: img/40\.png.*a quote that is not closed takes in the rows after it"):
        open_source(path)


def test_what_a_user_sees(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    table(folder / "t.csv", {62: '"oh no'})
    assert cli.main(["train", "--data", "t.csv", "--out", "run", *WORDS.split()]) == 0
    said = "t.csv: 62 rows, 61 pairs; stray quotes in 1 row, the first in row 62, take in 2 lines that look like rows"
    assert caplog.messages[0].startswith(said)
    (skipped,) = [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["key"], skipped["reason"]) == ("row 62 of t.csv", "stray quote")
