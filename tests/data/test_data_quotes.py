"""Tables with one quote too many: which rows it hides, and what a user sees of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloob import cli
from cloob.data.batch import BadSample
from cloob.data.open import open_source
from cloob.data.sources import quotes
from cloob.data.sources.quotes import find_swallowed, has_long_fields
from cloob.data.sources.table import TableSource
from cloob.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, image: Callable[..., bytes]) -> Path:
    (tmp_path / "img").mkdir()
    for i in range(64):
        (tmp_path / "img" / f"{i}.png").write_bytes(image(i))
    return tmp_path


def table(path: Path, changes: dict[int, str], end: str = "\n", rows: int = 64) -> Path:
    """64 rows with captions of their own; ``changes`` replaces captions, by row from 1."""
    lines = ["filepath,title", *(f"img/{i - 1}.png,{changes.get(i, f'caption {i}')}" for i in range(1, rows + 1))]
    path.write_bytes((end.join(lines) + end).encode())
    return path


def bad_rows(source: TableSource) -> dict[str, tuple[str, str]]:
    found = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except BadSample as bad:
            found[bad.key] = (bad.reason, bad.detail)
    return found


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("row", [4, 41, 63])
def test_a_quote_that_is_never_closed_hides_no_row(folder: Path, row: int, end: str) -> None:
    source = TableSource(table(folder / "t.csv", {row: '"oh no'}, end))
    assert len(source) == 64 and source.shard_sizes == (64,) and source.pairs == row - 1
    bad = bad_rows(source)
    lost = [f"row {row} of t.csv", *(f"line {line} of t.csv" for line in range(row + 2, 66))]
    assert list(bad) == lost
    rows = f"the {64 - row} rows after it" if row < 63 else "the row after it"
    for reason, detail in bad.values():
        assert reason == "stray quote"
        assert detail.endswith(f"the quote that opens in line {row + 1} takes in {rows} to the end of the file")


def test_captions_of_several_lines_are_no_fault(folder: Path) -> None:
    captions = {
        3: '"two\nlines, with a comma"',
        5: '"a ""quoted"" word\r\n\r\nafter an empty line"',
        7: '"' + "\n".join(f"verse {i}, and on it goes, and on" for i in range(200)) + '"',
        9: '"see a.png\nand b.png, which is blue"',
        64: '"the last\none"',
    }
    source = TableSource(table(folder / "t.csv", captions))
    assert source.swallowed == () and len(source) == source.pairs == 64 and bad_rows(source) == {}
    assert source.read(4).caption == 'a "quoted" word\r\n\r\nafter an empty line'


CELLS = st.text(st.sampled_from('ab,"\n\r .;'), max_size=12)


@given(st.lists(st.tuples(st.sampled_from(["x", "y z"]), CELLS), min_size=1, max_size=8), st.integers(1, 40))
def test_rows_are_counted_as_a_csv_reader_does(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], chunk: int
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_MINIMAL).writerows([("filepath", "title"), *rows])
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quotes, "_CHUNK", chunk + 1)
        count, swallowed = find_swallowed(path, ",", ["filepath", "title"], "filepath")
        assert (count, swallowed) == (len(rows), [])
        assert has_long_fields(path, len(rows)) == any("\n" in cell or "\r" in cell for _, cell in rows)


def test_where_the_columns_no_longer_fit_the_quote_is_named(folder: Path) -> None:
    path = table(folder / "t.csv", {41: '"oh no', 50: '"red, and blue"'})
    with pytest.raises(InputError) as caught:
        open_source(path)
    said = "the quote that opens in line 42 takes in the 9 rows after it; close it, or double it"
    assert str(caught.value) == f"{path}: {said}"


WORDS = "--model tiny-vit --image-size 32 --epochs 1 --batch-size 16 --workers 0 --device cpu"


@pytest.mark.parametrize(("row", "code", "pairs"), [(4, 2, 3), (41, 2, 40), (62, 0, 61)])
def test_what_a_user_sees(
    folder: Path,
    row: int,
    code: int,
    pairs: int,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to the share that may be bad the rows are left out and named; above it the run ends."""
    monkeypatch.chdir(folder)
    table(folder / "t.csv", {row: '"oh no'})
    assert cli.main(["train", "--data", "t.csv", "--out", "run", *WORDS.split()]) == code
    told = f"the quote that opens in line {row + 1} takes in the {64 - row} rows after it"
    assert caplog.messages[0].startswith(f"t.csv: 64 rows, {pairs} pairs; {told}")
    assert f"these {65 - row} rows are left out" in caplog.messages[0]
    err = capsys.readouterr().err
    if code:
        assert "stray quote" in err
    else:
        skipped = [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
        assert {(each["key"], each["reason"]) for each in skipped} == {
            ("row 62 of t.csv", "stray quote"),
            ("line 64 of t.csv", "stray quote"),
            ("line 65 of t.csv", "stray quote"),
        }
