"""What an index hands out: a Parquet table of it, the same for the same rows."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloob.search.find import View

_KINDS: dict[str, tuple[set[type], Callable[[Any], Any]]] = {
    "bool": ({bool}, bool),
    "int64": ({int}, int),
    "double": ({int, float}, float),
    "string": ({bool, int, float, str}, lambda value: value if isinstance(value, str) else json.dumps(value)),
}  # Arrow's types of the sources' columns: what they hold, and what makes a value one


def export(view: View, path: Path) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    model = view.model
    types = {"id": pa.int64()} | dict.fromkeys(("path", "source", "caption", "date"), pa.string())
    types |= {"width": pa.int32(), "height": pa.int32(), "bytes": pa.int64()}
    fields = list(types)
    types |= {"vector": pa.list_(pa.float32(), model.dim)}
    result: dict[str, set[type]] = defaultdict(set)
    for items, _ in view.blocks():
        for item in items:
            for name, value in item.columns.items():
                result[name].add(type(value))
    converts = {}
    for name in sorted(result):
        title = name
        while title in types:
            title = f"column_{title}"
        kind = next(kind for kind, (types_of, _) in _KINDS.items() if result[name] <= types_of)
        types[title], converts[title] = pa.type_for_alias(kind), (name, _KINDS[kind][1])
    schema = pa.schema(types).with_metadata({"model": model.name, "fingerprint": model.fingerprint})
    count = 0
    temporary = path.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parquet.ParquetWriter(temporary, schema) as writer:
            for items, rows in view.blocks():
                table: dict[str, Any] = {name: [getattr(item, name) for item in items] for name in fields}
                for title, (name, convert) in converts.items():
                    values = (item.columns.get(name) for item in items)
                    table[title] = [None if value is None else convert(value) for value in values]
                table["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), model.dim)
                writer.write_table(pa.Table.from_pydict(table, schema=schema))
                count += len(items)
        view.check_some(count)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count
