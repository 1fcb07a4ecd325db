"""Parquet files as tables: what pyarrow reads."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cloob.data.sources.parquet import read_columns, read_schema

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


def number(value: int) -> bytes:
    """As Thrift's compact protocol writes one without a sign."""
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


UNPACKED, OF_GROUP, ROWS, ROWS_OF_GROUP = (4, 0, 1, 1, 3, 6), (4, 0, 2), (3,), (4, 0, 3)
