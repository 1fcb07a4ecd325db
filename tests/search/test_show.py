"""Exports."""

from __future__ import annotations

import json
from pathlib import Path

from index_fakes import FakeEncoder, options
from PIL import Image
from pyarrow import parquet

from cloob.search.index import Index


def test_an_export_has_the_columns_of_the_source(tmp_path: Path) -> None:
    rows = [
        {"filepath": "a.png", "year": 2020, "id": 2**60, "column_id": "x", "score": 1, "mixed": True, "new": False},
        {"filepath": "b.png", "year": 2021, "id": 7, "column_id": "y", "score": 0.5, "mixed": "no"},
    ]
    for row, colour in zip(rows, ("red", "blue"), strict=True):
        Image.new("RGB", (7, 5), colour).save(tmp_path / row["filepath"])
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with Index.create(tmp_path / "index") as index:
        index.update([tmp_path / "t.jsonl"], options(FakeEncoder()))
        assert index.export(tmp_path / "all.parquet") == 2
        assert index.export(tmp_path / "some.parquet", where="year > 2020") == 1
    table = parquet.read_table(tmp_path / "all.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names[9:]} == {
        "column_id": "string",
        "column_column_id": "int64",
        "mixed": "string",
        "new": "bool",
        "score": "double",
        "year": "int64",
    }
    found = table.to_pydict()
    assert found["id"] == [1, 2] and found["column_column_id"] == [2**60, 7] and found["column_id"] == ["x", "y"]
    assert found["score"] == [1.0, 0.5] and found["new"] == [False, None] and found["year"] == [2020, 2021]
    assert found["mixed"] == ["true", "no"]
    assert "new" not in parquet.read_table(tmp_path / "some.parquet").column_names
