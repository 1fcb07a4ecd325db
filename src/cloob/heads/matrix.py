"""Matrices in memory, whatever holds them, and the pairs of their rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from cloob.data.matrices import checked_weights
from cloob.data.table import Coded, Table, is_table
from cloob.data.vectors import VectorPairs, n_rows, usable_pairs
from cloob.errors import InputError, counted

MISSING = ("None", "nan", "NaT", "<NA>")


def pairs_of(
    a: Any,
    b: Any,
    ids: Any = None,
    groups: Any = None,
    weights: Any = None,
    names: tuple[str, str] = ("a", "b"),
) -> VectorPairs:
    """The pairs of two matrices; InputError for a row that cannot be used."""
    sides = as_rows(names[0], a), as_rows(names[1], b)
    n = n_rows(sides[0])
    if weights is not None:
        weights = checked_weights("weights", as_array("weights", weights), n)
    pairs = usable_pairs(
        names,
        " and ".join(names),
        *sides,
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


def split(pairs: VectorPairs, share: float) -> tuple[VectorPairs, VectorPairs]:
    """The training pairs, and those of a share of the ids or groups."""
    if not 0 < share < 1:
        raise InputError(f"val_split is {share}; it must be a share below 1, or 0")
    n = len(np.unique(pairs.units()))
    if n < 4:
        kind = "ids" if pairs.groups is None else "groups"
        raise InputError(
            f"{pairs.name}: {counted(n, kind)}; 2 to train on and 2 to hold out are"
            " needed"
        )
    return pairs.split(share)


def texts_of(name: str, values: Iterable[Any], n: int) -> list[str]:
    """Ids or groups as texts; InputError where one is missing."""
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(values) != n:
        raise InputError(f"{name} has {len(values):,} entries for {n:,} rows")
    texts = [str(value) for value in values]
    missing = [
        row
        for row, text in enumerate(texts)
        if not text or (text in MISSING and not isinstance(values[row], str))
    ]
    if missing:
        raise InputError(
            f"{name}: row {missing[0]} has none; give every row one, a unique one where"
            " it is unknown"
        )
    return texts


def as_rows(name: str, rows: Any) -> Any:
    """An array of numbers, perhaps mapped, scipy's sparse rows, or a table; a vector is
    one column.

    Args:
        name: What an error calls the matrix.
        rows: A tensor, an array of any byte order, strides or type (objects that are
            numbers, too), a list, a data frame, a table of Arrow, or a sparse matrix.
    """
    if isinstance(rows, Coded):
        return rows
    if is_table(rows):
        return Table.of(name, rows)
    if hasattr(rows, "toarray"):
        return rows.tocsr()
    rows = as_array(name, rows)
    if rows.ndim == 1:
        rows = rows.reshape(-1, 1)
    if rows.ndim != 2 or rows.dtype.kind not in "biuf":
        raise InputError(
            f"{name} is {rows.dtype} {rows.shape}; a matrix (n, F) of numbers is"
            " expected"
        )
    native = rows.dtype.newbyteorder("=")
    return rows if rows.dtype == native else rows.astype(native)


def as_array(name: str, rows: Any) -> np.ndarray:
    """An array of what is no sparse matrix; bfloat16 becomes float32."""
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu()
        is_half = rows.is_floating_point() and rows.element_size() == 2
        rows = (rows.float() if is_half else rows).numpy()
    array: np.ndarray = np.asarray(rows)
    if array.dtype.kind != "O":
        return array
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} holds what is no number: {error}") from None
