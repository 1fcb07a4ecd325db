"""A side's pipeline of scikit-learn, fitted to the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import _safe_indexing, check_array

from cloob.data.table import Coded
from cloob.data.vectors import row_digests
from cloob.errors import InputError
from cloob.functional.ids import id_digest


@dataclass(frozen=True, eq=False)
class PipedRows(Coded):
    """Rows of any kind, and the transformer that makes numbers of them."""

    name: str
    rows: Any
    pipeline: Any
    cells: np.ndarray

    def fit(self, rows: np.ndarray) -> Any:
        """A fitted clone of the pipeline."""
        return clone(self.pipeline).fit(_safe_indexing(self.rows, rows))

    def numbers(self, encoding: Any) -> Any:
        """What a fitted pipeline makes of the rows."""
        return check_array(encoding.transform(self.rows), accept_sparse="csr")


def piped_rows(name: str, rows: Any, pipeline: Any) -> PipedRows:
    """The rows of a side; equal ones are told before the pipeline is fitted."""
    if not hasattr(pipeline, "transform"):
        setting = f"{name.lower()}_pipeline"
        raise InputError(f"{setting} is {pipeline!r}, which has no transform")
    entries = rows.to_numpy() if hasattr(rows, "to_numpy") else rows
    if hasattr(entries, "tocsr"):
        digests = row_digests(entries.tocsr())
    elif isinstance(entries, np.ndarray) and entries.dtype.kind in "biuf":
        digests = row_digests(entries.reshape(len(entries), -1))
    else:
        listed = entries.tolist() if hasattr(entries, "tolist") else entries
        digests = np.array([id_digest(repr(entry)) for entry in listed])
    return PipedRows(name, rows, pipeline, digests[:, None])
