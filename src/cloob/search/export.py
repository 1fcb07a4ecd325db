"""An index as a Parquet table."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from cloob.errors import InputError
from cloob.search.find import pages
from cloob.search.plane import SAMPLE, fit_plane, sample
from cloob.search.records import IndexedModel, Item, valid
from cloob.search.store import Store, Vectors
from cloob.search.where import Filter


def export(store: Store, model: IndexedModel, path: Path, condition: Filter | None) -> int:
    """See :meth:`cloob.search.index.Index.export`."""
    rows = store.vectors(model.name, sample(store.ids(condition), SAMPLE).tolist())
    place = fit_plane(rows[np.isfinite(rows).all(1)])
    schema = _schema(model.dim).with_metadata({"model": model.name, "fingerprint": model.fingerprint})
    count = 0
    temporary = path.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parquet.ParquetWriter(temporary, schema) as writer:
            for ids in pages(store, condition):
                items = store.items(ids)
                vectors = store.vectors(model.name, [item.id for item in items])
                known = np.isfinite(vectors).all(1)
                items = [items[place] for place in np.flatnonzero(known)]
                if items:
                    writer.write_table(_table(items, vectors[known], place(vectors[known]), schema))
                count += len(items)
        if count == 0:
            raise InputError(f"{store.address}: no picture with a vector of {model.name} to write to {path}")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count


def _schema(dim: int) -> pa.Schema:
    texts = {name: pa.string() for name in ("path", "source", "caption", "date")}
    sizes = {"width": pa.int32(), "height": pa.int32(), "bytes": pa.int64()}
    vector = {"vector": pa.list_(pa.float32(), dim), "x": pa.float32(), "y": pa.float32()}
    return pa.schema({"id": pa.int64()} | texts | sizes | {"columns": pa.string()} | vector)


def _table(items: Sequence[Item], vectors: Vectors, places: Vectors, schema: pa.Schema) -> pa.Table:
    columns = {
        "id": [item.id for item in items],
        "path": [valid(item.path) for item in items],
        "source": [valid(item.source) for item in items],
        "caption": [None if item.caption is None else valid(item.caption) for item in items],
        "date": [None if item.date is None else valid(item.date) for item in items],
        "width": [item.width for item in items],
        "height": [item.height for item in items],
        "bytes": [item.bytes for item in items],
        "columns": [json.dumps(dict(item.columns)) for item in items],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
        "x": places[:, 0],
        "y": places[:, 1],
    }
    return pa.Table.from_pydict(columns, schema=schema)
