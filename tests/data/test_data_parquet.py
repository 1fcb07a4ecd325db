"""Parquet files as tables: what pyarrow reads, but never more than a file of its size may come to."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import cloob.data.sources.parquet as unpacking
from cloob.data.open import open_source
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
