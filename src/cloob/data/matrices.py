"""Matrices and columns in files: vectors, ids, weights."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv, parquet

from cloob.data.sources.files import reading
from cloob.data.table import Matrix, SparseRows, Table
from cloob.errors import InputError, first_of, require

FORMS = "FILE.npy, FILE.csv, FILE.tsv, FILE.parquet[:COLUMN] or FILE.npz[:NAME]"
_DELIMITED = (".csv", ".tsv")
_TABLES = (*_DELIMITED, ".parquet")
_FAULTS = (ValueError, TypeError, EOFError, zipfile.BadZipFile)
_ROWS = "a row of numbers for every item is expected, as float32 (1000, 384)"


def read_rows(spec: str, drop: Sequence[str] = ()) -> Matrix | Table:
    """The (n, F) numbers of a file, given as one of ``FORMS``, sparse where scipy wrote
    them so; or a table without the columns to drop. Nothing is unpickled.
    """
    path, name = split_spec(spec)
    if path.suffix in _TABLES and not name:
        with reading(path, ValueError, TypeError):
            if path.suffix in _DELIMITED:
                table = _read_delimited(path, has_missing=True)
            else:
                table = parquet.read_table(path)
            return Table.of(spec, table, drop)
    if path.suffix == ".npz" and not name:
        return _read_sparse(path)
    return _read_array(spec, 2, "biuf", _ROWS)


def read_ids(spec: str) -> list[str]:
    """The ids in a file: lines of a text, or a column of texts or integers in one of
    ``FORMS``.
    """
    values = _read_values(spec, "iuUO", "one text or integer a row is expected")
    ids = ["" if value is None else str(value) for value in values]
    if "" in ids:
        raise InputError(f"{spec}: row {ids.index('')} is empty")
    return ids


def read_ids_of(spec: str, rows: int, matrix: str) -> list[str]:
    """The ids in a file, one per row of a matrix."""
    ids = read_ids(spec)
    if len(ids) != rows:
        raise InputError(
            f"{spec} has {len(ids):,} ids, {matrix} has {rows:,} rows; one id a row is"
            " expected"
        )
    return ids


def read_weights(spec: str, n: int) -> np.ndarray:
    """(n,) numbers of 0 or more: lines of a text, or a column in one of ``FORMS``."""
    values = _read_values(spec, "biuf", "one number a row is expected")
    return checked_weights(spec, values, n)


def checked_weights(name: str, values: npt.ArrayLike, n: int) -> np.ndarray:
    """(n,) float64 weights of 0 or more, of numbers or texts of such; InputError for
    others, or where fewer than two are not 0.
    """
    try:
        weights = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}; a number a row is expected") from None
    if weights.shape != (n,):
        raise InputError(f"{name} has shape {weights.shape}; ({n},) is expected")
    is_bad = ~(np.isfinite(weights) & (weights >= 0))
    if is_bad.any():
        row = int(is_bad.argmax())
        raise InputError(f"{name}: row {row} is {weights[row]:g}; 0 or more is right")
    if not (weights > 0).sum() > 1:
        raise InputError(
            f"{name}: fewer than two weights are not zero; nothing can be learned"
        )
    return weights


def split_spec(spec: str) -> tuple[Path, str]:
    """The file and the name inside it."""
    file, _, name = spec.rpartition(":")
    is_named = Path(file).suffix in (".npz", *_TABLES)
    return (Path(file), name) if is_named else (Path(spec), "")


def _read_values(spec: str, kinds: str, expected: str) -> list[str] | np.ndarray:
    """Ids or weights: lines of a text, or a column of one of numpy's kinds. A CSV
    without a column's name is lines, too.
    """
    path, name = split_spec(spec)
    is_column = bool(name) if path.suffix in _DELIMITED else path.suffix in _READERS
    if is_column:
        return _read_array(spec, 1, kinds, expected)
    with reading(Path(spec)):
        text = Path(spec).read_text(encoding="utf-8-sig")
    # an id may hold other line breaks of Unicode
    return text.removesuffix("\n").split("\n") if text else []


def _read_array(spec: str, dimensions: int, kinds: str, expected: str) -> np.ndarray:
    """An array in a file, of so many dimensions and one of numpy's kinds; errors say
    what is ``expected``.
    """
    path, name = split_spec(spec)
    if path.suffix not in _READERS or (path.suffix == ".npz" and not name):
        raise InputError(f"{spec}: vectors come as {FORMS}")
    with reading(path, *_FAULTS):
        array = _READERS[path.suffix](path, name)
    if array.ndim != dimensions or 0 in array.shape or array.dtype.kind not in kinds:
        raise InputError(f"{spec}: holds {array.dtype} {array.shape}; {expected}")
    return array


def _read_npy(path: Path, _: str) -> np.ndarray:
    # rows of a memmap come slower
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _read_npz(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        _check_name(name, archive.files, path)
        return np.asarray(archive[name])


def _read_sparse(path: Path) -> SparseRows:
    """The matrix that scipy's ``save_npz`` wrote."""
    sparse = require("scipy.sparse", "train")
    with reading(path, *_FAULTS, KeyError):
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
        if "format" not in names:
            raise InputError(
                f"{path}: holds {first_of(names)}: give one as {path}:NAME"
            )
        matrix = sparse.load_npz(path)
        if hasattr(matrix, "check_format"):
            matrix.check_format()  # scipy would write wherever the file says
        rows: SparseRows = matrix.tocsr()
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "biuf":
        raise InputError(f"{path}: holds {rows.dtype} {rows.shape}; {_ROWS}")
    return rows


def _read_column(path: Path, name: str) -> np.ndarray:
    """A column of a table, (n, F) of lists of equal length without gaps."""
    if path.suffix in _DELIMITED:
        table = _read_delimited(path, has_missing=False)
        _check_name(name, table.column_names, path)
    else:
        _check_name(name, parquet.read_schema(path).names, path)
        table = parquet.read_table(path, columns=[name])
    column = table[name].combine_chunks()
    if pa.types.is_struct(column.type) or pa.types.is_map(column.type):
        raise InputError(
            f"{path}: column {name!r} holds {column.type}, no numbers, texts or lists"
        )
    if pa.types.is_nested(column.type) and not column.null_count:
        flat = column.flatten()
        if not flat.null_count and len({len(row) for row in column}) == 1:
            numbers = flat.to_numpy(zero_copy_only=False)
            return np.asarray(numbers.reshape(len(column), -1))
    return np.asarray(column.to_numpy(zero_copy_only=False))


_READERS: dict[str, Callable[[Path, str], np.ndarray]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    **dict.fromkeys(_TABLES, _read_column),
}


def _read_delimited(path: Path, *, has_missing: bool) -> pa.Table:
    """A table of commas or tabs, whose first line may name the columns."""
    with path.open(encoding="utf-8-sig") as file:
        first_line = next((line.strip() for line in file if line.strip()), "")
    if not first_line:
        raise InputError(f"{path}: has no rows of numbers")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    has_names = _are_names(first_line.split(delimiter))
    return csv.read_csv(
        path,
        csv.ReadOptions(autogenerate_column_names=not has_names),
        csv.ParseOptions(delimiter=delimiter),
        csv.ConvertOptions(strings_can_be_null=has_missing),
    )


def _are_names(cells: Sequence[str]) -> bool:
    """Whether the cells of a first line name the columns: they are no numbers, or the
    numbers 0, 1, 2 …, as pandas calls columns.
    """
    try:
        numbers = list(map(float, cells))
    except ValueError:
        return True
    return len(cells) > 1 and numbers == [*range(len(cells))]


def _check_name(name: str, names: Sequence[str], path: Path) -> None:
    if name not in names:
        raise InputError(f"{path}: has no {name!r}; it has {first_of(list(names))}")
    if names.count(name) > 1:
        raise InputError(f"{path}: has several columns {name!r}; rename all but one")
