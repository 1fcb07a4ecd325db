"""Rows of numbers: those of a file of vectors with labels, and a column of Parquet with vectors that exist already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
from torch import Tensor

from cloob.data.sources.arrow import check_name
from cloob.data.vectors import as_floats, read_ids_of, read_matrix, rows_of
from cloob.errors import InputError, one_line
from cloob.models.aligned.model import Side, embed_rows
from cloob.models.encoder import DualEncoder
from cloob.search.records import SEPARATOR, Value
from cloob.search.scan.collection import CAPTION_COLUMNS, Collection, Found, plain, values

PATH_COLUMNS = ("path", "filepath", "file_name", "key", "id")  # of which the first that is there names a row
_BATCH = 4096


class Rows(Collection):
    """The rows of a file of vectors, for one head of a model of vectors; the path of a row is its label."""

    def __init__(self, side: Side, file: str, labels: str) -> None:
        """Opens files as ``cloob train vectors`` takes them for its rows and ids."""
        super().__init__(os.path.abspath(file))  # noqa: PTH100 - links in it stay
        self._side, self._matrix = side, read_matrix(file)
        self._labels = rows_of(read_ids_of(labels, len(self._matrix), file), labels)

    def scan(self, known: object = ()) -> Iterator[Found]:
        kind = f"{self._side} {self._matrix.dtype} ".encode()
        for label, row in self._labels.items():
            data = self._matrix[row].tobytes()
            yield Found(label, len(data), None, row, hashlib.sha256(kind + data).hexdigest())

    def row(self, number: int) -> Tensor:
        return as_floats(self._matrix[number : number + 1])[0]

    def check(self, encoder: DualEncoder) -> None:
        self.embed(encoder, self.row(0)[None])

    def embed(self, encoder: DualEncoder, batch: Tensor) -> Tensor:
        return embed_rows(encoder, self._side, batch)


class Row(NamedTuple):
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
        self._path = path_column or next((item for item in PATH_COLUMNS if item in names), None)
        self._caption = caption_column or next((item for item in CAPTION_COLUMNS if item in names), None)
        plain = [not pa.types.is_nested(kind) and not pa.types.is_binary(kind) for kind in self._data.schema.types]
        used = (column, self._path, self._caption)
        self._others = [item for item, is_plain in zip(names, plain, strict=True) if is_plain and item not in used]

    def check(self, encoder: Any) -> None:
        """Any model may have made them; their width is compared."""

    def count(self) -> int:
        return int(self._data.count_rows())

    def batches(self) -> Iterator[tuple[list[Row], npt.NDArray[np.float32]]]:
        """Rows and their vectors, as they are in the file."""
        columns, start = [self.column, *filter(None, (self._path, self._caption)), *self._others], 0
        scanner = self._data.scanner(columns, batch_size=_BATCH, batch_readahead=2, fragment_readahead=1)
        for batch in scanner.to_batches():
            if not len(batch):
                continue
            flat = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            if flat.ndim != 1 or flat.dtype.kind not in "fiu" or len(flat) % len(batch):
                raise InputError(f"{self.name}: {self.column!r} has no row of numbers of one width for each row")
            cells = {name: list(map(plain, batch.column(name))) for name in columns[1:]}
            rows = []
            for number in range(len(batch)):
                row = {name: column[number] for name, column in cells.items()}
                path = None if self._path is None else row.pop(self._path)
                caption = None if self._caption is None else row.pop(self._caption)
                path = f"{self.name}{SEPARATOR}{start + number}" if path is None else str(path)
                rows.append(Row(path, None if caption is None else str(caption).strip() or None, values(row)))
            yield rows, as_floats(flat.reshape(len(batch), -1)).numpy()
            start += len(batch)
