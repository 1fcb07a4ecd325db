"""A side's pipeline of scikit-learn, fitted to the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.base import clone
from sklearn.utils import _safe_indexing, check_array

from cloob.data.rows import row_digests
from cloob.data.table import Encoding, Matrix, TableEncoding, Transformer, Unencoded
from cloob.errors import InputError
from cloob.functional.ids import id_digest


@dataclass(frozen=True, eq=False)
class PipedRows(Unencoded):
    """Rows of any kind, and the transformer that makes numbers of them."""

    name: str
    rows: object
    pipeline: Transformer
    cells: np.ndarray

    def fit(self, rows: np.ndarray) -> Transformer:
        """A fitted clone of the pipeline."""
        fitted: Transformer = clone(self.pipeline)
        return fitted.fit(_safe_indexing(self.rows, rows))

    def numbers(self, encoding: Encoding | None) -> Matrix:
        """What a fitted pipeline makes of the rows."""
        assert encoding is not None and not isinstance(encoding, TableEncoding)
        rows: Matrix = check_array(encoding.transform(self.rows), accept_sparse="csr")
        return rows


def piped_rows(name: str, rows: object, pipeline: object) -> PipedRows:
    """The rows of a side; equal ones are told before the pipeline is fitted."""
    if not isinstance(pipeline, Transformer):
        setting = f"{name.lower()}_pipeline"
        raise InputError(f"{setting} is {pipeline!r}, which has no transform")
    if hasattr(rows, "tocsr"):
        digests = row_digests(rows.tocsr())
    else:
        array = np.asarray(rows)
        if array.dtype.kind in "biuf":
            digests = row_digests(array.reshape(len(array), -1))
        else:
            digests = np.array([id_digest(repr(entry)) for entry in array.tolist()])
    return PipedRows(name, rows, pipeline, digests[:, None])
