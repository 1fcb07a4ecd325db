"""What an index hands out: a Parquet table of it, and a contact sheet of search results."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from cloob.errors import InputError
from cloob.search.find import View
from cloob.search.records import valid

_TEXTS = ("path", "source", "caption", "date")


def export(view: View, path: Path) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    model = view.model
    types = {"id": pa.int64()} | dict.fromkeys(_TEXTS, pa.string())
    types |= {"width": pa.int32(), "height": pa.int32(), "bytes": pa.int64(), "columns": pa.string()}
    types |= {"vector": pa.list_(pa.float32(), model.dim)}
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
                table: dict[str, Any] = {name: [getattr(item, name) for item in items] for name in list(types)[:-1]}
                table |= {name: [None if text is None else valid(text) for text in table[name]] for name in _TEXTS}
                table["columns"] = [json.dumps(dict(item.columns)) for item in items]
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
