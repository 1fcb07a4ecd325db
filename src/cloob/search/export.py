"""A Parquet table of the pictures of a view, the same for the same rows."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from cloob.search.matrix import Vectors
from cloob.search.records import Item, Value
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


@dataclass(frozen=True)
class Column:
    """A column of the sources."""

    name: str
    title: str  # in the table: with a prefix where the name is taken
    type: pa.DataType

    def array(self, items: Sequence[Item]) -> pa.Array:
        values = [item.columns.get(self.name) for item in items]
        if self.type == pa.string():
            values = [_as_text(value) for value in values]
        return pa.array(values, self.type)


def export(view: View, path: Path) -> int:
    """Writes the table, and returns the number of rows."""
    columns = _columns(view)
    types = dict(_FIELDS)
    types["vector"] = pa.list_(pa.float32(), view.model.dim)
    types |= {column.title: column.type for column in columns}
    about = {"model": view.model.name, "fingerprint": view.model.fingerprint}
    schema = pa.schema(types).with_metadata(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        table = Path(folder) / "table"
        with parquet.ParquetWriter(table, schema) as writer:
            for items, rows in view.blocks():
                writer.write_table(_table(items, rows, columns, schema))
                count += len(items)
        view.check_some(count)
        table.replace(path)
    return count


def _table(
    items: Sequence[Item], rows: Vectors, columns: Sequence[Column], schema: pa.Schema
) -> pa.Table:
    arrays = {
        name: pa.array([getattr(item, name) for item in items], kind)
        for name, kind in _FIELDS.items()
    }
    flat = pa.array(rows.reshape(-1))
    arrays["vector"] = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    arrays |= {column.title: column.array(items) for column in columns}
    return pa.Table.from_pydict(arrays, schema=schema)


def _columns(view: View) -> list[Column]:
    """The columns that the pictures have, by name."""
    held: dict[str, set[type]] = defaultdict(set)
    for items, _ in view.blocks():
        for item in items:
            for name, value in item.columns.items():
                held[name].add(type(value))
    taken = {*_FIELDS, "vector"}
    columns = []
    for name in sorted(held):
        title = name
        while title in taken:
            title = f"column_{title}"
        taken.add(title)
        columns.append(Column(name, title, _type_of(held[name])))
    return columns


def _type_of(kinds: set[type]) -> pa.DataType:
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else pa.string()


def _as_text(value: Value) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)
