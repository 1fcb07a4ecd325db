"""A matrix of numbers, whatever holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from cloob.errors import InputError


def as_matrix(name: str, rows: Any) -> Any:
    """An array of numbers, perhaps mapped, or scipy's sparse rows; a vector is one
    column.

    Args:
        name: What an error calls the matrix.
        rows: A tensor, an array of any byte order, strides or type (objects that are
            numbers, too), a list, a data frame, a table of Arrow, or a sparse matrix.
    """
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu()
        is_half = rows.is_floating_point() and rows.element_size() == 2
        rows = (rows.float() if is_half else rows).numpy()
    if hasattr(rows, "toarray"):
        return rows.tocsr()
    rows = np.asarray(rows)
    if rows.dtype.kind == "O":
        try:
            rows = rows.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} holds what is no number: {error}") from None
    if rows.ndim == 1:
        rows = rows.reshape(-1, 1)
    if rows.ndim != 2 or rows.dtype.kind not in "biuf":
        raise InputError(
            f"{name} is {rows.dtype} {rows.shape}; a matrix (n, F) of numbers is"
            " expected"
        )
    native = rows.dtype.newbyteorder("=")
    return rows if rows.dtype == native else rows.astype(native)
