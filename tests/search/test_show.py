"""Maps and exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from index_fakes import FakeEncoder, options
from PIL import Image
from pyarrow import parquet

from cloob.search.index import Index
from cloob.search.records import IndexedModel, Item


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def index_of(place: Path, rows: np.ndarray) -> Index:
    """An index with these vectors, of pictures that do not exist."""
    index = Index.create(place)
    index.store.add_model(IndexedModel("m", "m", "f" * 32, rows.shape[1]))
    items = [Item(0, "s", f"{i}.png", str(i), 1, 0, 1, 1) for i in range(len(rows))]
    index.store.write(items, "m", rows.astype(np.float32))
    return index


def test_maps(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = unit(generator.standard_normal((40, 6)) * [9, 5, 1, 1, 1, 1])
    with index_of(tmp_path / "wide", rows) as index:
        ids, places = index.map()
        assert places.min(0).tolist() == [0, 0] and places.max(0).tolist() == [1, 1]
        centred = rows - rows.mean(0)
        for axis, direction in enumerate(np.linalg.svd(centred)[2][:2]):
            assert abs(np.corrcoef(centred @ direction, places[:, axis])[0, 1]) > 0.9999
        np.testing.assert_array_equal(places, index.map()[1])
        some = index.map(sample=10)[0].tolist()
        assert len(some) == 10 and some == sorted(set(some)) == index.map(sample=10)[0].tolist()
        assert index.map(where="id <= 4")[0].tolist() == [1, 2, 3, 4] and ids.tolist() == list(range(1, 41))
        assert index.map(where="id = 1")[1].tolist() == [[0.5, 0.5]]
    groups = unit(np.repeat(np.eye(3, 12), 10, axis=0) + 0.05 * generator.standard_normal((30, 12)))
    with index_of(tmp_path / "groups", groups) as index:  # t-SNE keeps groups together, the same each time
        places = index.map(method="tsne")[1]
        np.testing.assert_array_equal(places, index.map(method="tsne")[1])
        distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(30)
        assert (distance.argmin(1) // 10 == np.arange(30) // 10).all()


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
