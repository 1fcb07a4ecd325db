"""Parquet files as tables: what pyarrow reads, but never more than a file of its size may come to."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import cloob.data.sources.parquet as unpacking
from cloob.cache import Cache
from cloob.data.open import open_source
from cloob.data.sources.pages import DELTA_BYTE_ARRAY, Page, read_pages
from cloob.data.sources.parquet import open_parquet, read_columns, read_schema
from cloob.errors import InputError

TEXTS = st.lists(st.none() | st.sampled_from(["", "a", "b"]) | st.text(max_size=9), max_size=30)


@given(TEXTS, st.booleans(), st.booleans(), st.integers(1, 40))
def test_columns_are_what_pyarrow_reads(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], stored: bool, dictionary: bool, group: int
) -> None:
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    columns = {
        "text": pa.array(texts, pa.string()),
        "large": pa.array(texts, pa.large_string()),
        "category": pa.array(texts, pa.string()).dictionary_encode(),
        "bytes": pa.array([None if text is None else text.encode("utf-16") for text in texts], pa.binary()),
        "list": pa.array([None if text is None else list(text) for text in texts], pa.list_(pa.string())),
        "struct": pa.array(
            [{"path": text, "n": 1} for text in texts], pa.struct({"path": pa.string(), "n": pa.int8()})
        ),
        "number": pa.array(range(len(texts)), pa.int32()),
    }
    table = pa.table(columns)
    parquet.write_table(table, path, store_schema=stored, use_dictionary=dictionary, row_group_size=group)
    asked = ["list", "text", "bytes", "number", "struct", "large", "category"]
    found = read_columns(path, asked)
    assert found.column_names == asked and found.to_pylist() == table.select(asked).to_pylist()
    assert found["text"].type == pa.large_string() and found["bytes"].type == pa.large_binary()
    assert read_schema(path) == parquet.read_schema(path)


def write_bomb(path: Path, kind: str, rows: int, letters: int) -> None:
    """A few hundred bytes whose rows all refer to one long text."""
    column: Any = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * letters]))
    if kind == "list":
        column = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), column.dictionary_decode())
    table = pa.table({"filepath": ["a.png"] * rows, "title": column})
    parquet.write_table(table, path, store_schema=False, compression="zstd")


@pytest.mark.parametrize("kind", ["text", "list"])
def test_a_text_that_all_rows_refer_to_is_not_spelled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(unpacking, "MAX_IMAGE_BYTES", 1 << 20)
    path = tmp_path / "t.parquet"
    write_bomb(path, kind, 2000, 20_000)
    assert path.stat().st_size < 2000
    before, now = pa.default_memory_pool().max_memory(), pa.total_allocated_bytes()
    with pytest.raises(InputError, match=r"t\.parquet unpacks to more than 1,\d\d\d,\d\d\d bytes"):
        read_columns(path, ["filepath", "title"])
    assert pa.default_memory_pool().max_memory() <= max(before, now + 4 * 2**20)
    write_bomb(path, kind, 20, 20_000)
    told = read_columns(path, ["title"])["title"][19].as_py()
    assert told == ("x" * 20_000 if kind == "text" else ["x" * 20_000])


def test_what_a_file_states_is_enough_to_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MAX_IMAGE_BYTES", 1 << 10)
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"filepath": ["a.png"] * 100_000, "title": ["x"] * 100_000}), path)
    monkeypatch.setattr(parquet.ParquetFile, "read", None)
    with pytest.raises(InputError, match="unpacks to more than"):
        read_columns(path, ["filepath", "title"])


def number(value: int) -> bytes:
    """As Thrift's compact protocol writes one without a sign."""
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def test_a_list_that_claims_a_million_columns_takes_no_memory_for_them(tmp_path: Path) -> None:
    version, schema, rows = b"\x15\x02", b"\x19\x1c\x48\x01r\0", b"\x16\0"
    groups = b"\x19\x1c" + b"\x19\xfc" + number(999_999)  # one group, whose list of columns ends behind the file
    end = version + schema + rows + groups + bytes(64)
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1" + end + struct.pack("<I", len(end)) + b"PAR1")
    with pytest.raises(OSError, match="Exceeded size limit"):
        open_parquet(path)
    with pytest.raises(InputError, match=r"t\.parquet cannot be read"):
        open_source(path)


def pages_of(path: Path) -> dict[str, list[Page]]:
    """What the headers of all pages say, by column; each column's walk ends where the column does."""
    about, data = parquet.read_metadata(path), path.read_bytes()
    found: dict[str, list[Page]] = {}
    for group in map(about.row_group, range(about.num_row_groups)):
        for chunk in map(group.column, range(about.num_columns)):
            start = min(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at)
            end = start + chunk.total_compressed_size
            pages = list(read_pages(data, start, end, chunk.num_values))
            assert pages == list(read_pages(data, start, end, 10**15))
            headers = chunk.total_uncompressed_size - sum(page.unpacked for page in pages)
            assert 8 * len(pages) <= headers <= 100 * len(pages)
            found.setdefault(chunk.path_in_schema, []).extend(pages)
    return found


@given(
    st.lists(st.none() | st.text(max_size=9), min_size=1, max_size=300),
    st.sampled_from(["1.0", "2.0"]),
    st.sampled_from(["snappy", "gzip", "zstd"]),
    st.booleans(),
    st.sampled_from([64, 1 << 20]),
    st.integers(20, 400),
)
def test_pages_are_found_in_what_pyarrow_writes(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    version: str,
    codec: str,
    dictionary: bool,
    page: int,
    group: int,
) -> None:
    folder = tmp_path_factory.mktemp("pages")
    table = pa.table(
        {
            "text": pa.array(texts, pa.string()),
            "list": pa.array([None if text is None else list(text) for text in texts], pa.list_(pa.string())),
            "struct": pa.array([{"n": text} for text in texts], pa.struct({"n": pa.string()})),
            "number": range(len(texts)),
        }
    )
    found = []
    for compression in (codec, "none"):
        path = folder / f"{compression}.parquet"
        parquet.write_table(
            table,
            path,
            data_page_version=version,
            compression=compression,
            use_dictionary=dictionary,
            data_page_size=page,
            row_group_size=group,
            write_batch_size=10,
            write_page_index=dictionary,
        )
        found.append(pages_of(path))
        assert read_columns(path, ["list", "text", "number"]).to_pylist() == table.select([1, 0, 3]).to_pylist()
    assert found[0] == found[1]
    assert sum(each.encoding is None for each in found[0]["text"]) == dictionary * -(-len(texts) // group)


def test_a_header_that_can_be_read_in_two_ways_is_refused() -> None:
    own, end = b"\x2c\x15\x02\x15\x00\x00", b"\x00"  # data page header: one value, plain
    good = b"\x15\x00\x15\x0a\x15\x0a" + own + end
    assert list(read_pages(good + bytes(5), 0, 99, 1)) == [Page(5, 0)]
    bad = {
        "cut": good[:-2],
        "empty": b"\x00",
        "size left out": b"\x15\x00\x25\x0a" + own + end,
        "size of 64 bits": b"\x15\x00\x16\x0a\x15\x0a" + own + end,
        "beyond 32 bits": b"\x15\x00\x15\x8a\x80\x80\x80\x10\x15\x0a" + own + end,
        "negative": b"\x15\x00\x15\x09\x15\x0a" + own + end,
        "goes back": b"\x15\x00\x15\x0a\x15\x09" + own + end,
        "no end of a number": b"\x15" + b"\xff" * 99,
        "number of a field beyond 16 bits": b"\x05\x82\x80\x08\x0a" + good,
        "lists": b"\x19\xf5\xff\xff\xff\x07" + good,
        "nested": b"\x1c" * 5000 + end * 5001,
        "fields": b"\x11" * 40_000 + end,
        "negative count": b"\x15\x00\x15\x0a\x15\x0a\x2c\x15\x01\x15\x00\x00" + end,
        "other kind": b"\x15\x00\x15\x0a\x15\x0a\x25\x02" + end,
    }
    for name, header in bad.items():
        with pytest.raises(pa.ArrowInvalid, match=r"the header of the page at byte 0 is damaged"):
            print(name, list(read_pages(header, 0, 10**9, 1)))
    with pytest.raises(pa.ArrowInvalid, match="byte -9 is damaged"):
        next(read_pages(good, -9, 99, 1))


@given(st.binary(max_size=60))
def test_any_bytes_are_pages_or_damaged(data: bytes) -> None:
    with contextlib.suppress(pa.ArrowInvalid):
        assert len(list(read_pages(data, 0, len(data), 10**9))) <= len(data)


def _number(end: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = end[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    value, written = (value << 1) ^ (value >> 63), bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])


def with_numbers(path: Path, changes: dict[tuple[int, ...], int]) -> None:
    """Writes other numbers into a file's end, by the fields on the way to them."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    end, places = whole[-8 - size : -8], {}

    def value(at: int, kind: int, way: tuple[int, ...]) -> int:
        if kind in (4, 5, 6):
            _, after = _number(end, at)
            places[way] = (at, after)
            return after
        if kind == 8:
            length, at = _number(end, at)
            return at + length
        if kind == 9:
            head, at = end[at], at + 1
            count = head >> 4
            if count == 15:
                count, at = _number(end, at)
            for i in range(count):
                at = value(at, head & 15, (*way, i))
            return at
        if kind == 12:
            return fields(at, way)
        return at + {1: 0, 2: 0, 3: 1, 7: 8}[kind]

    def fields(at: int, way: tuple[int, ...] = ()) -> int:
        number = 0
        while kind := (head := end[at]) & 15:
            at, number = at + 1, number + (head >> 4)
            at = value(at, kind, (*way, number))
        return at + 1

    fields(0)
    for way, new in sorted(changes.items(), key=lambda change: -places[change[0]][0]):
        begin, after = places[way]
        end = end[:begin] + _varint(new) + end[after:]
    path.write_bytes(whole[: -8 - size] + end + struct.pack("<I", len(end)) + whole[-4:])


UNPACKED, OF_GROUP, ROWS, ROWS_OF_GROUP = (4, 0, 1, 1, 3, 6), (4, 0, 2), (3,), (4, 0, 3)


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_that_unpacks_to_more_than_the_end_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool
) -> None:
    path = tmp_path / "t.parquet"
    texts = pa.table({"filepath": ["a", "b"], "title": [b"x", b"y" * (9 << 20)]})
    how: dict[str, Any] = {"use_dictionary": dictionary, "dictionary_pagesize_limit": 1 << 30, "compression": "zstd"}
    parquet.write_table(texts, path, **how)
    with_numbers(path, {UNPACKED: 300, OF_GROUP: 300})
    assert path.stat().st_size < 3000 and read_columns(path, ["title"]).num_rows == 2
    monkeypatch.setattr(unpacking, "MAX_IMAGE_BYTES", 8 << 20)
    assert read_columns(path, ["filepath"]).num_rows == 2
    before, now = pa.default_memory_pool().max_memory(), pa.total_allocated_bytes()
    for read in (lambda: read_columns(path, ["filepath", "title"]), lambda: list(unpacking.unpacked(path))):
        with pytest.raises(InputError, match=r"t\.parquet unpacks to more than 8,\d\d\d,\d\d\d bytes"):
            read()
    assert pa.default_memory_pool().max_memory() <= max(before, now + 2**20)


def test_values_that_begin_as_the_one_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"filepath": ["a.png"] * 500, "title": ["x" * 100_000] * 500})
    how: dict[str, Any] = {"use_dictionary": False, "compression": "zstd"}
    parquet.write_table(table, path, column_encoding={"title": "DELTA_BYTE_ARRAY"}, **how)
    assert path.stat().st_size < 9000 and {page.encoding for page in pages_of(path)["title"]} == {DELTA_BYTE_ARRAY}
    assert read_columns(path, ["title"]).equals(table.select(["title"]).cast(pa.schema({"title": pa.large_string()})))
    monkeypatch.setattr(unpacking, "MAX_IMAGE_BYTES", 2 << 20)
    before, now = pa.default_memory_pool().max_memory(), pa.total_allocated_bytes()
    with pytest.raises(InputError, match=r"t\.parquet unpacks to more than"):
        read_columns(path, ["filepath", "title"])
    assert pa.default_memory_pool().max_memory() <= max(before, now + (16 << 20))


def test_too_many_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"n": range(1000)})
    parquet.write_table(table, path, data_page_size=1, write_batch_size=1, use_dictionary=False)
    assert read_columns(path, ["n"]).equals(table)
    monkeypatch.setattr(unpacking, "_MOST_PAGES", 500)
    with pytest.raises(InputError, match=r"t\.parquet: is cut into too many small pages"):
        read_columns(path, ["n"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({ROWS: 1000}, "its end says 1,000 rows, and 3 in groups"),
        ({ROWS: 10**15}, "its end says"),
        ({ROWS: -5}, "its end says"),
        ({ROWS: -5, ROWS_OF_GROUP: -5}, "its end says -5 rows"),
        ({ROWS: 10**12, ROWS_OF_GROUP: 10**12}, "unpacks to more than"),
    ],
)
def test_numbers_of_rows_that_are_none(tmp_path: Path, changes: dict[tuple[int, ...], int], said: str) -> None:
    for name, content in (("filepath", ["a.png"] * 3), ("image", [b"a", b"b", b"c"])):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.table({name: content, "title": ["a", "b", "c"]}), path)
        with_numbers(path, changes)
        with pytest.raises(InputError, match=said):
            open_source(path)


def test_fewer_rows_than_the_end_says(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": [b"a", b"b", b"c"], "title": ["a", "b", "c"]}), path)
    with_numbers(path, {ROWS: 1000, ROWS_OF_GROUP: 1000})
    with pytest.raises(InputError, match=r"a\.parquet: its end says 1,000 rows, and it holds 3"):
        open_source(path, cache=Cache(tmp_path / "cache"))
