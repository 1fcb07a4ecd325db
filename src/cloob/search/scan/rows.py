"""The rows of a file of vectors, each with a label."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from torch import Tensor

from cloob.data.vectors import as_floats, read_ids_of, read_matrix, rows_of
from cloob.models.aligned.model import Side, embed_rows
from cloob.models.encoder import DualEncoder
from cloob.search.scan.collection import Collection, Found


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
