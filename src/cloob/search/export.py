"""What an index hands out: a Parquet table of it."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cloob.errors import InputError
from cloob.search.find import View
from cloob.search.records import valid

_TEXTS = ("path", "source", "caption", "date")
_KINDS: dict[str, tuple[set[type], Callable[[Any], Any]]] = {
    "bool": ({bool}, bool),
    "int64": ({int}, int),
    "double": ({int, float}, float),
    "string": ({bool, int, float, str}, lambda value: value if isinstance(value, str) else json.dumps(value)),
}  # Arrow's types of the sources' columns: what they hold, and what makes a value one


def export(view: View, path: Path) -> int:
    """See :meth:`cloob.search.index.Index.export`."""
    import pyarrow as pa
    from pyarrow import parquet

    model = view.model
    types = {"id": pa.int64()} | dict.fromkeys(_TEXTS, pa.string())
    types |= {"width": pa.int32(), "height": pa.int32(), "bytes": pa.int64()}
    fields = list(types)
    types |= {"vector": pa.list_(pa.float32(), model.dim)}
    found: dict[str, set[type]] = defaultdict(set)
    for ids in view.index.store.pages(view.where):
        for item in view.items(ids).values():
            for name, value in item.columns.items():
                found[name].add(type(value))
    own = {}
    for name in sorted(found):
        title = name
        while title in types:
            title = f"column_{title}"
        kind = next(kind for kind, (held, _) in _KINDS.items() if found[name] <= held)
        types[title], own[title] = pa.type_for_alias(kind), (name, _KINDS[kind][1])
    schema = pa.schema(types).with_metadata({"model": model.name, "fingerprint": model.fingerprint})
    count = 0
    temporary = path.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parquet.ParquetWriter(temporary, schema) as writer:
            for ids in view.index.store.pages(view.where):
                rows = dict(zip(ids, view.vectors(ids), strict=True))
                items = [item for item in view.items(ids).values() if np.isfinite(rows[item.id]).all()]
                if not items:
                    continue
                table: dict[str, Any] = {name: [getattr(item, name) for item in items] for name in fields}
                table |= {name: [None if text is None else valid(text) for text in table[name]] for name in _TEXTS}
                for title, (name, convert) in own.items():
                    values = (item.columns.get(name) for item in items)
                    table[title] = [None if value is None else convert(value) for value in values]
                vectors = pa.array(np.concatenate([rows[item.id] for item in items]))
                table["vector"] = pa.FixedSizeListArray.from_arrays(vectors, model.dim)
                writer.write_table(pa.Table.from_pydict(table, schema=schema))
                count += len(items)
        view.check_some(count)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count
