"""An index as a Parquet table, for whoever wants to go on with its vectors elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from cloob.errors import InputError, one_line
from cloob.search.records import IndexedModel, Item, valid
from cloob.search.store import Ids, Store, Vectors
from cloob.search.where import Filter

_PAGE = 4096


def export(store: Store, model: IndexedModel, path: Path, where: Filter | None = None) -> int:
    """Writes the items that have a vector of a model; see :meth:`cloob.search.index.Index.export`."""
    plane = _Plane(model.dim)
    count = 0
    for _, vectors in _pages(store, model.name, where):
        plane.see(vectors)
        count += len(vectors)
    if count == 0:
        raise InputError(f"{store.address}: no picture with a vector of {model.name} to write to {path}")
    plane.fit()
    for _, vectors in _pages(store, model.name, where):
        plane.stretch(vectors)
    schema = _schema(model.dim).with_metadata({"model": model.name, "fingerprint": model.fingerprint})
    count = 0
    temporary = path.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parquet.ParquetWriter(temporary, schema) as writer:
            for ids, vectors in _pages(store, model.name, where):
                items = store.items(ids.tolist())
                rows = vectors[np.isin(ids, [item.id for item in items])]  # others were removed meanwhile
                writer.write_table(_table(items, rows, plane.place(rows), schema))
                count += len(items)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    except (pa.ArrowInvalid, OverflowError) as error:  # a size that no picture has
        raise InputError(f"{store.address}: is damaged ({one_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count


def is_export(path: Path) -> bool:
    """Whether a file is what :func:`export` writes."""
    try:
        return b"fingerprint" in (parquet.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _pages(store: Store, model: str, where: Filter | None) -> Iterator[tuple[Ids, Vectors]]:
    last = 0
    while len(ids := store.ids(where, after=last, limit=_PAGE)):
        last = int(ids[-1])
        vectors = store.vectors(model, ids.tolist())
        there = np.isfinite(vectors).all(1)
        yield ids[there], vectors[there]


def _schema(dim: int) -> pa.Schema:
    return pa.schema(
        {
            "id": pa.int64(),
            "path": pa.string(),
            "source": pa.string(),
            "caption": pa.string(),
            "date": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "bytes": pa.int64(),
            "columns": pa.string(),
            "vector": pa.list_(pa.float32(), dim),
            "x": pa.float32(),
            "y": pa.float32(),
        }
    )


def _table(items: list[Item], vectors: Vectors, places: Vectors, schema: pa.Schema) -> pa.Table:
    columns = [
        [item.id for item in items],
        [valid(item.path) for item in items],
        [valid(item.source) for item in items],
        [None if item.caption is None else valid(item.caption) for item in items],
        [None if item.date is None else valid(item.date) for item in items],
        [item.width for item in items],
        [item.height for item in items],
        [item.bytes for item in items],
        [json.dumps(dict(item.columns)) for item in items],
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
        places[:, 0],
        places[:, 1],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


class _Plane:
    """The two directions in which vectors differ most (PCA), over any number of pages; places lie in [0, 1]²."""

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._sum = np.zeros(dim)
        self._products = np.zeros((dim, dim))
        self._low = np.full(2, np.inf)
        self._high = np.full(2, -np.inf)

    def see(self, vectors: Vectors) -> None:
        """Adds a page."""
        rows = vectors.astype(np.float64)
        self._count += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows

    def fit(self) -> None:
        """Computes the directions from what was seen; the sign is that which makes the largest part positive."""
        self._mean = self._sum / self._count
        _, directions = np.linalg.eigh(self._products / self._count - np.outer(self._mean, self._mean))
        axes = directions[:, ::-1][:, :2]
        if axes.shape[1] < 2:
            axes = np.concatenate([axes, np.zeros_like(axes)], 1)
        self._axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]] + 1e-300)

    def stretch(self, vectors: Vectors) -> None:
        """Makes room for a page."""
        if len(vectors):
            flat = self._flat(vectors)
            self._low, self._high = np.minimum(self._low, flat.min(0)), np.maximum(self._high, flat.max(0))

    def place(self, vectors: Vectors) -> Vectors:
        """(n, 2) in [0, 1]."""
        span = np.where(self._high > self._low, self._high - self._low, 1)
        places: Vectors = ((self._flat(vectors) - self._low) / span).astype(np.float32)
        return places

    def _flat(self, vectors: Vectors) -> np.ndarray:
        flat: np.ndarray = (vectors.astype(np.float64) - self._mean) @ self._axes
        return flat
