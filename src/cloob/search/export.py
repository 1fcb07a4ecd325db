"""What an index hands out: a Parquet table of it, and a map, the same for the same rows."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cloob.errors import require
from cloob.search.store import Ids, Vectors
from cloob.search.view import View

Method = Literal["pca", "tsne"]
SAMPLE = 5000  # pictures on a map by default; t-SNE takes some ten seconds for so many on one core
_COMPONENTS = 50  # principal components that t-SNE starts from, as its authors advise
_PERPLEXITY = 30.0
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
    found: dict[str, set[type]] = defaultdict(set)
    for items, _ in view.blocks():
        for item in items:
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
            for items, rows in view.blocks():
                table: dict[str, Any] = {name: [getattr(item, name) for item in items] for name in fields}
                for title, (name, convert) in own.items():
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


def map_of(view: View, most: int | None, method: Method) -> tuple[Ids, Vectors]:
    most = SAMPLE if most is None else most
    ids = view.store.ids(view.where)
    if len(ids) > most:
        ids = np.sort(np.random.default_rng(0).choice(ids, most, replace=False))
    rows = view.vectors(ids)
    known = np.isfinite(rows).all(1)
    return ids[known], _layout(rows[known], method)


def _layout(rows: Vectors, method: Method) -> Vectors:
    """Places of (n, D) rows on a map: (n, 2) in [0, 1], each axis from end to end; 0.5 where nothing differs."""
    if len(rows) < 2:
        return np.full((len(rows), 2), 0.5, np.float32)
    by_tsne = method == "tsne" and len(rows) >= 4
    components = min(_COMPONENTS if by_tsne else 2, *rows.shape)
    pca = require("sklearn.decomposition", "train").PCA(components, svd_solver="covariance_eigh")
    places = pca.fit_transform(rows.astype(np.float64))
    if by_tsne:
        with require("threadpoolctl", "train").threadpool_limits(1):  # sums in one order
            perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
            tsne = require("sklearn.manifold", "train").TSNE(perplexity=perplexity, random_state=0, n_jobs=1)
            places = tsne.fit_transform(places.astype(np.float32))
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    low, span = places.min(0), np.ptp(places, axis=0)
    moved = np.where(span > 1e-9, (places - low) / np.where(span > 1e-9, span, 1), 0.5)
    return np.asarray(moved.clip(0, 1), np.float32)
