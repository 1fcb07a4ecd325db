"""A Parquet table of the pictures of a view, the same for the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from cloob.files import write_whole
from cloob.search.records import Value
from cloob.search.view import View

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


def export(view: View, path: Path) -> int:
    """Writes the table, and returns the number of rows."""
    items, rows = view.pictures()
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
    about = {"model": view.model.name, "fingerprint": view.model.fingerprint}
    table = pa.table(arrays).replace_schema_metadata(about)
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    write_whole(path, sink.getvalue())
    return len(items)


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
