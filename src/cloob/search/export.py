"""A Parquet table of pictures, the same for the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from cloob.files import write_whole
from cloob.search.matrix import Vectors
from cloob.search.records import IndexedModel, Item, Value

_FIELDS = {
    "id": pa.int64(),
    "path": pa.string(),
    "source": pa.string(),
    "caption": pa.string(),
    "date": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "bytes": pa.int64(),
}


def export(
    path: Path, items: Sequence[Item], rows: Vectors, model: IndexedModel
) -> None:
    """Writes the table of pictures and their unit rows (n, D)."""
    arrays = {
        name: pa.array([getattr(item, name) for item in items], kind)
        for name, kind in _FIELDS.items()
    }
    flat = pa.array(rows.reshape(-1))
    arrays["vector"] = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    for name in sorted(set().union(*(item.columns for item in items))):
        title = name
        while title in arrays:
            title = f"column_{title}"
        arrays[title] = _array([item.columns.get(name) for item in items])
    about = {"model": model.name, "fingerprint": model.fingerprint}
    table = pa.table(arrays).replace_schema_metadata(about)
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    write_whole(path, sink.getvalue())


def _array(values: list[Value]) -> pa.Array:
    """A column of a source; text where it holds several kinds."""
    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) == 1 or kinds == {int, float}:
        return pa.array(values)
    texts = [
        value if isinstance(value, str | None) else json.dumps(value)
        for value in values
    ]
    return pa.array(texts, pa.string())
