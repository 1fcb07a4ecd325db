"""Matrices in memory, whatever holds them, and the pairs of their rows."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cloob.data.matrices import checked_weights
from cloob.data.rows import Side
from cloob.data.table import Matrix, Table, Unencoded, is_table
from cloob.data.vectors import VectorPairs, usable_pairs
from cloob.errors import InputError, counted

MISSING = ("None", "nan", "NaT", "<NA>")


def pairs_of(
    a: object,
    b: object,
    ids: object = None,
    groups: object = None,
    weights: object = None,
    names: tuple[str, str] = ("a", "b"),
) -> VectorPairs:
    """The pairs of two matrices; InputError for a row that cannot be used."""
    side_a = Side(names[0], as_rows(names[0], a))
    side_b = Side(names[1], as_rows(names[1], b))
    n = len(side_a)
    if weights is not None:
        weights = checked_weights("weights", as_array(weights), n)
    pairs = usable_pairs(
        side_a,
        side_b,
        None if ids is None else texts_of("ids", ids, n),
        groups=None if groups is None else texts_of("groups", groups, n),
        weights=weights,
    )
    if pairs.skipped:
        first = pairs.skipped[0]
        raise InputError(
            f"{pairs.name}: {counted(len(pairs.skipped), 'rows')} of {n:,} cannot be"
            f" used, such as {first.key}: {first.detail}"
        )
    return pairs


def texts_of(name: str, values: object, n: int) -> list[str]:
    """Ids or groups as texts; InputError where one is missing."""
    entries = np.atleast_1d(np.asarray(values, object)).tolist()
    if len(entries) != n:
        raise InputError(f"{name} has {len(entries):,} entries for {n:,} rows")
    texts = [str(entry) for entry in entries]
    for row, text in enumerate(texts):
        is_missing = text in MISSING and not isinstance(entries[row], str)
        if is_missing or not text:
            raise InputError(
                f"{name}: row {row} has none; give every row one, a unique one where it"
                " is unknown"
            )
    return texts


def as_rows(name: str, rows: object) -> Matrix | Unencoded:
    """An array of numbers, perhaps mapped, scipy's sparse rows, or a table; a vector is
    one column.

    Args:
        name: What an error calls the matrix.
        rows: A tensor, an array of any byte order, strides or type, a list, a data
            frame, a table of Arrow, or a sparse matrix.
    """
    if isinstance(rows, Unencoded):
        return rows
    if is_table(rows):
        return Table.of(name, rows)
    if hasattr(rows, "tocsr"):
        sparse: Matrix = rows.tocsr()
        return sparse
    array = as_array(rows)
    if array.ndim == 1:
        array = array.reshape(-1, 1)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise InputError(
            f"{name} is {array.dtype} {array.shape}; a matrix (n, F) of numbers is"
            " expected"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def as_array(rows: object) -> np.ndarray:
    """An array of what is no sparse matrix; bfloat16 becomes float32."""
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu()
        is_half = rows.is_floating_point() and rows.element_size() == 2
        rows = (rows.float() if is_half else rows).numpy()
    return np.asarray(rows)
