"""Two indices in one, and exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from index_fakes import FakeEncoder, options, write_noise
from PIL import Image
from pyarrow import parquet

from cloob.errors import InputError
from cloob.search.index import Index


def make(folder: Path, pictures: dict[str, int], *encoders: FakeEncoder) -> Index:
    for path, seed in pictures.items():
        write_noise(folder / "p" / path, seed)
    index = Index.create(folder / "index")
    for encoder in encoders:
        index.update([folder / "p"], options(encoder))
    return index


def test_a_merge_adds_what_is_not_there_and_keeps_what_is_said_here(tmp_path: Path) -> None:
    first, second = FakeEncoder(), FakeEncoder("second", seed=1, dim=5)
    here = make(tmp_path / "a", {"x.png": 1, "y.png": 2}, first)
    there = make(tmp_path / "b", {"u.png": 2, "v.png": 3}, FakeEncoder("other name"), second)
    (tmp_path / "a" / "p" / "x.txt").write_text("said later")
    write_noise(tmp_path / "a" / "p" / "y.png", 5)
    there.update([tmp_path / "a" / "p"], options(second))
    for added, vectors in ((2, 5), (0, 0)):  # the other y.png stays as it is here
        done = here.merge(there)
        assert (done.added, done.vectors, done.present, done.other) == (added, vectors, 3 - added, 1)
    assert [model.name for model in here.models] == ["fake", "second"]
    items = {Path(item.path).name: item for item in here.items(here.store.ids())}
    ids = [items[name].id for name in ("x.png", "y.png", "u.png", "v.png")]
    assert items["x.png"].caption is None and len(items) == 4
    assert np.isfinite(here.store.vectors("fake", ids)).all()
    assert np.isfinite(here.store.vectors("second", ids)).all(1).tolist() == [True, False, True, True]
    assert here.store.nearest("fake", here.store.vectors("fake", ids[-1:])[0], 1).ids.tolist() == ids[-1:]


def test_vectors_of_two_models_never_mix_and_no_picture_is_there_twice(tmp_path: Path) -> None:
    here = make(tmp_path / "a", {"x.png": 1}, FakeEncoder())
    there = make(tmp_path / "b", {"u.png": 2}, FakeEncoder(seed=1))
    before = here.revision()
    with pytest.raises(InputError, match="another model 'fake'"):
        here.merge(there)
    with pytest.raises(InputError, match="--replace-model"):
        here.update([tmp_path / "a" / "p"], options(FakeEncoder(seed=1)))
    with pytest.raises(InputError, match="other weights"):
        here.use("fake", FakeEncoder(seed=1))
    assert here.revision() == before
    (tmp_path / "a" / "p" / "sub").mkdir()
    write_noise(tmp_path / "a" / "p" / "sub" / "b.png", 3)
    inside = Index.create(tmp_path / "inside")
    inside.update([tmp_path / "a" / "p" / "sub"], options(FakeEncoder("second", seed=2)))
    with pytest.raises(InputError, match="which is a source of this index"):
        here.merge(inside)
    assert here.revision() == before and len(here.models) == 1


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
