"""Vectors that exist already: a column of Parquet, taken into an index without a model run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from cloob.data.sources.paths import check_name
from cloob.data.vectors import as_floats
from cloob.errors import InputError, one_line
from cloob.search.build import Summary
from cloob.search.records import IndexedModel, Item, Value
from cloob.search.scan.collection import CAPTION_COLUMNS, Collection, as_list, values
from cloob.search.store import Store, Vectors
from cloob.search.where import equals

PATH_COLUMNS = ("path", "filepath", "file_name", "key", "id")  # of which the first that is there names a row
_ROWS = 4096  # of a transaction


class _Row(NamedTuple):
    path: str
    caption: str | None
    columns: dict[str, Value]


class VectorFile(Collection):
    """A Parquet file, or a folder of them, with a column of vectors; it stays the source for updates and removals."""

    def __init__(self, name: str, column: str, path_column: str | None, caption_column: str | None) -> None:
        super().__init__(name)
        try:
            self._data = ds.dataset(name, format="parquet")
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{name}: no Parquet of vectors ({one_line(error)})") from None
        names = self._data.schema.names
        for column_name, what in ((column, "vectors"), (path_column, "path"), (caption_column, "caption")):
            if column_name is not None:
                check_name(Path(name), names, column_name, what)
        self.column = column
        self._path = path_column or next((each for each in PATH_COLUMNS if each in names), None)
        self._caption = caption_column or next((each for each in CAPTION_COLUMNS if each in names), None)
        types = (self._data.schema.field(each).type for each in names)
        is_list = [pa.types.is_nested(kind) or pa.types.is_binary(kind) for kind in types]
        self._others = [each for each, skip in zip(names, is_list, strict=True) if not skip]
        self._others = [each for each in self._others if each not in (column, self._path, self._caption)]

    def check(self, encoder: Any) -> None:
        """Any model may have made them; their width is compared."""

    def count(self) -> int:
        return int(self._data.count_rows())

    def batches(self) -> Iterator[tuple[list[_Row], Vectors]]:
        columns = [self.column, *filter(None, (self._path, self._caption)), *self._others]
        start = 0
        scanner = self._data.scanner(columns, batch_size=_ROWS, batch_readahead=2, fragment_readahead=1)
        for batch in scanner.to_batches():
            yield list(self._said(batch, start)), self._vectors(batch.column(0))
            start += len(batch)

    def _vectors(self, cells: pa.Array) -> Vectors:
        count = len(cells)
        flat = cells.flatten().to_numpy(zero_copy_only=False)
        if not count or flat.ndim != 1 or flat.dtype.kind not in "fiu" or len(flat) % count:
            raise InputError(f"{self.name}: {self.column!r} has no row of numbers of one width for each row")
        return as_floats(flat.reshape(count, -1)).numpy()

    def _said(self, batch: pa.RecordBatch, start: int) -> Iterator[_Row]:
        cells = {name: batch.column(name) for name in (self._path, self._caption, *self._others) if name}
        texts = {name: as_list(column) for name, column in cells.items()}
        for row in range(len(batch)):
            path = texts[self._path][row] if self._path else None
            caption = texts[self._caption][row] if self._caption else None
            columns = values({name: texts[name][row] for name in self._others})
            path = f"{self.name}::{start + row}" if path is None else str(path)
            said = None if caption is None else str(caption).strip() or None
            yield _Row(path, said, columns)


def take(
    store: Store,
    model: IndexedModel,
    file: VectorFile,
    done: Summary,
    remove_all: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes what is new or changed in a file, and removes what is not in it any more."""
    seen: set[int] = set()
    count, total = 0, file.count()
    whole = equals("source", file.name)
    if not total and store.count(whole) and not remove_all:
        done.refused[file.name] = "no row is in it any more, so nothing was removed; --remove-all removes them"
        return
    for rows, vectors in file.batches():
        if vectors.shape[1] != model.dim:
            wrong = f"{file.column!r} has {vectors.shape[1]} numbers a row, {model.name} {model.dim}"
            raise InputError(f"{file.name}: {wrong}")
        if not count:
            store.set_vectors(file.name, file.column, model)
        _write(store, model, file.name, rows, vectors, seen, done)
        count += len(rows)
        if progress is not None:
            progress(count, total)
    if store.count(whole) > len(seen):
        for page in list(store.pages(whole)):
            gone = [item.path for item in store.items(page) if hash(item.path) not in seen]
            store.remove(file.name, gone)
            done.removed += len(gone)


def _write(
    store: Store,
    model: IndexedModel,
    source: str,
    rows: Sequence[_Row],
    vectors: Vectors,
    seen: set[int],
    done: Summary,
) -> None:
    lengths = np.linalg.norm(vectors, axis=1)
    known = store.contents(source, [row.path for row in rows], model)
    items, places = [], []
    for place, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        if hash(row.path) in seen:
            done.left_out.add("row of a path that stood before", row.path)
        elif not 0 < length < np.inf:
            done.add_fault("vector not finite, or 0", row.path)
        else:
            seen.add(hash(row.path))
            content = hashlib.sha256(vectors[place].tobytes() + repr(row).encode("utf-8", "surrogatepass")).hexdigest()
            if known.get(row.path) == content:
                done.unchanged += 1
                continue
            done.added += row.path not in known
            done.changed += row.path in known
            items.append(Item(0, source, row.path, content, 0, None, 0, 0, None, row.caption, row.columns))
            places.append(place)
    if items:
        store.write(items, model, vectors[places] / lengths[places, None])
