"""Pairs of two files of vectors (n rows of F numbers): row by row, or joined by ids; a
``.npy`` file is mapped.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv, parquet
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloob.data.batch import Skip
from cloob.data.source import Fingerprint, digest, linked, spread
from cloob.data.sources.files import reading
from cloob.errors import InputError, first_of, require
from cloob.functional.ids import id_digest

FORMS = (
    "FILE.npy, FILE.csv, FILE.parquet[:COLUMN], FILE.npz[:NAME], FILE.safetensors:NAME"
    " or FILE.h5:NAME"
)
_HDF5 = (".h5", ".hdf5", ".h5ad")
_TABLES = (".csv", ".parquet")
_SUFFIXES = (".npy", ".npz", ".safetensors", *_TABLES, *_HDF5)
_IN_CACHE = 256  # rows that are looked at together
_FEW_IDS = 20  # fewer would be labels, not ids
_FEW_ROWS = 20  # of one id, in however few pairs
logger = logging.getLogger(__name__)


def read_matrix(spec: str) -> Any:
    """The (n, F) numbers of a file, given as one of ``FORMS``; sparse where scipy wrote
    them so. Nothing is unpickled.
    """
    return _read(
        spec,
        2,
        "biuf",
        "a row of numbers for every item is expected, as float32 (1000, 384)",
    )


def read_weights(spec: str, n: int) -> np.ndarray:
    """(n,) numbers of 0 or more: lines of a text, or a column in one of ``FORMS``."""
    path, name = _split(spec)
    if path.suffix in _SUFFIXES and (name or path.suffix != ".csv"):
        column: Any = _read(spec, 1, "biuf", "one number a row is expected")
    else:
        lines = read_ids(spec)
        try:
            column = np.array([float(line) for line in lines])
        except ValueError as error:
            raise InputError(f"{spec}: {error}; a number a line is expected") from None
    weights = np.asarray(column, np.float64)
    if len(weights) != n:
        raise InputError(f"{spec} has {len(weights):,} numbers for {n:,} pairs")
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        row = int(bad.argmax())
        raise InputError(f"{spec}: row {row} is {weights[row]:g}; 0 or more is right")
    return weights


def read_ids(spec: str) -> list[str]:
    """The ids in a file: lines of a text, or a column of texts or integers in one of
    ``FORMS``.
    """
    path, name = _split(spec)
    if path.suffix in _SUFFIXES and (name or path.suffix != ".csv"):
        column = _read(
            spec, 1, "iuUO", "one text or integer a row is expected"
        ).tolist()
        ids = ["" if value is None else str(value) for value in column]
    else:
        with reading(Path(spec)):
            text = Path(spec).read_text(encoding="utf-8-sig")
            ids = (
                text.removesuffix("\n").split("\n") if text else []
            )  # an id may hold other line breaks of Unicode
    if "" in ids:
        raise InputError(f"{spec}: row {ids.index('')} has no id")
    return ids


def _split(spec: str) -> tuple[Path, str]:
    """The file and the name inside it."""
    place, _, name = spec.rpartition(":")
    return (
        (Path(place), name) if Path(place).suffix in _SUFFIXES[1:] else (Path(spec), "")
    )


def _read(spec: str, dimensions: int, kinds: str, expected: str) -> Any:
    path, name = _split(spec)
    array: Any = None
    with reading(
        path, ValueError, TypeError, EOFError, zipfile.BadZipFile, SafetensorError
    ):
        if path.suffix == ".npy":
            try:
                array = np.asarray(
                    np.load(path, mmap_mode="r", allow_pickle=False)
                )  # rows of a memmap come slower
            except ValueError as error:
                if "Python objects" not in str(error):
                    raise
                advice = (
                    "Python objects, which are not read; save numbers, or texts as"
                    " numpy.array(texts, str)"
                )
                raise InputError(f"{path}: holds {advice}") from None
        elif path.suffix == ".npz" and not name and _is_sparse(path):
            scipy: Any = require("scipy.sparse", "train")
            array = scipy.load_npz(path).tocsr()
        elif path.suffix == ".npz" and name:
            with np.load(path, allow_pickle=False) as archive:
                array = archive[_known(name, archive.files, path)]
        elif path.suffix == ".safetensors" and name:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(_known(name, file.keys(), path))
            array = (
                tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            ).numpy()
        elif path.suffix in _HDF5 and name:
            h5py: Any = require("h5py", "h5py")
            with h5py.File(path) as file:
                names: list[str] = []
                file.visititems(
                    lambda key, part: (
                        names.append(key) if isinstance(part, h5py.Dataset) else None
                    )
                )
                part = file[_known(name.strip("/"), names, path)]
                array = (part.asstr() if h5py.check_string_dtype(part.dtype) else part)[
                    ()
                ]
        elif path.suffix in _TABLES:
            array = _of_table(path, name)
    if array is None:
        wrong = f"vectors come as {FORMS}"
    elif array.ndim != dimensions or 0 in array.shape or array.dtype.kind not in kinds:
        wrong = f"holds {array.dtype} {array.shape}; {expected}"
    else:
        return array
    raise InputError(f"{spec}: {wrong}")


def _is_sparse(path: Path) -> bool:
    """Whether scipy's ``save_npz`` wrote an archive."""
    with np.load(path, allow_pickle=False) as archive:
        return {"format", "shape", "data"} <= set(archive.files)


def _of_table(path: Path, name: str) -> np.ndarray:
    """A column of a table, (n, F) of lists of equal length without gaps; without a name
    its columns side by side.
    """
    if not name:
        return np.column_stack([column.to_numpy() for column in _table(path).columns])
    table = _table(path, name)
    column, shape = table[name].combine_chunks(), [-1]
    if "list" in str(column.type).partition("<")[0]:
        flat = column.flatten()
        widths = {len(row) for row in column}
        if not column.null_count and not flat.null_count and len(widths) == 1:
            column, shape = flat, [len(column), -1]
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(shape)


def _table(path: Path, name: str = "") -> pa.Table:
    """A column of a table, or all of them, which must be numbers then."""
    if path.suffix == ".csv":
        table = _read_csv(path)
    else:
        names = parquet.read_schema(path).names
        columns = [_known(name, names, path)] if name else None
        table = parquet.read_table(path, columns=columns)
    if name:
        _known(name, table.column_names, path)
        return table
    for number, field in enumerate(table.schema, 1):
        if field.name in ("", "__index_level_0__"):
            # row numbers, the same in both files, would give the pairs away
            raise InputError(
                f"{path}: column {number} is an index of pandas; save the table with"
                " index=False"
            )
    return table


def _read_csv(path: Path) -> pa.Table:
    """A table of commas or semicolons, with a header unless its first line is numbers;
    after semicolons a number may have a decimal comma.
    """
    with path.open(encoding="utf-8-sig") as file:
        lines = [file.readline().strip(), file.readline().strip()]
    by_semicolons = ";" in lines[0] and lines[0].count(";") == lines[1].count(";")
    delimiter = ";" if by_semicolons else ","
    has_commas = by_semicolons and any("," in line for line in lines)
    cells = lines[0].split(delimiter)
    try:
        numbers = [float(c.replace(",", ".") if has_commas else c) for c in cells]
    except ValueError:
        has_header = True
    else:  # the numbers 0, 1, 2 … are names that pandas gives to columns
        has_header = len(cells) > 1 and numbers == [*range(len(cells))]
    return csv.read_csv(
        path,
        csv.ReadOptions(autogenerate_column_names=not has_header),
        csv.ParseOptions(delimiter=delimiter),
        csv.ConvertOptions(decimal_point="," if has_commas else "."),
    )


class Side(NamedTuple):
    """A matrix, and the names of its columns where it is a table."""

    matrix: Any
    names: tuple[str, ...] = ()


def read_side(spec: str, drop: Sequence[str] = ()) -> Side:
    """The numbers of a file without the columns to drop, and the names of a table's
    columns.
    """
    path, name = _split(spec)
    if path.suffix not in _TABLES or name:
        return Side(read_matrix(spec))
    with reading(path, ValueError, TypeError):
        table = _table(path)
        kept = [name for name in table.column_names if name not in drop]
        table = table.select(kept)
    for field in table.schema:
        kind = field.type
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not is_number and not pa.types.is_boolean(kind):
            raise InputError(
                f"{path}: column {field.name!r} holds {kind}; without :COLUMN all must"
                f" be numbers (--drop {field.name!r} leaves it out)"
            )
    if not kept or not len(table):
        raise InputError(f"{spec}: has no rows of numbers")
    columns = [column.to_numpy() for column in table.columns]
    return Side(np.column_stack(columns), tuple(kept))


def refuse_shared(a: Side, b: Side, names: tuple[str, str]) -> None:
    """Refuses a column of numbers that are nearly all different and the same in both
    tables: an id or a row number gives the pairs away.
    """
    if not (a.names and b.names) or len(a.matrix) != len(b.matrix):
        return
    others: dict[bytes, str] = {}
    for name, column in zip(b.names, b.matrix.T, strict=True):
        others[column.astype(np.float64).tobytes()] = name
    for name, column in zip(a.names, a.matrix.T, strict=True):
        other = others.get(column.astype(np.float64).tobytes())
        if other is not None and len(np.unique(column)) >= 0.99 * len(column):
            raise InputError(
                f"column {name!r} of {names[0]} is column {other!r} of {names[1]}, row"
                f" by row, and gives the pairs away: --drop {name} leaves it out"
                " (--a-ids and --b-ids join rows by ids)"
            )


def _known(name: str, names: Sequence[str], path: Path) -> str:
    if name not in names:
        raise InputError(f"{path}: has no {name!r}; it has {first_of(names)}")
    return name


@dataclass(frozen=True)
class VectorPairs:
    """The usable pairs of two matrices; pairs of equal id belong together."""

    name: str  # what reports call them
    a: Any  # (n, F) numbers of any type, an array or sparse by scipy
    b: Any  # (n', F') likewise
    rows: np.ndarray  # (N, 2) rows of a and of b that are pairs
    # (N,) digests of their ids: rows of one id are one sample
    ids: np.ndarray
    labels: Sequence[str] | None = (
        None  # the ids of the rows of a; None where a row's number is its id
    )
    skipped: tuple[
        Skip, ...
    ] = ()  # rows with NaN or infinite numbers, or without a partner
    # (N,) digests of groups, which are held out whole; None: every id by itself
    groups: np.ndarray | None = None
    weights: np.ndarray | None = None  # (N,) float64, how much each pair counts

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> Fingerprint:
        """What the pairs are: their number, their ids, and their rows (of very many a
        part).
        """
        some, size = self.rows[spread(len(self))], _IN_CACHE
        blocks = [some[start : start + size].T for start in range(0, len(some), size)]
        of_a, of_b = (
            digest(gather(self.a, rows) for rows, _ in blocks),
            digest(gather(self.b, rows) for _, rows in blocks),
        )
        found: Fingerprint = {
            "pairs": len(self),
            "ids": digest([self.ids]),
            "rows of a": of_a,
            "rows of b": of_b,
        }
        if self.groups is not None:
            found["groups"] = digest([self.groups])
        if self.weights is not None:
            found["weights"] = digest([self.weights])
        return found

    def batch(self, places: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Some pairs: (n, F) and (n, F') numbers as of ``as_numbers``, and (n,) ids."""
        of_a, of_b = self.rows[places].T
        a, b = as_numbers(gather(self.a, of_a)), as_numbers(gather(self.b, of_b))
        return a, b, torch.from_numpy(self.ids[places])

    def take(
        self, places: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
        """As ``batch``, and what to call each in a log."""
        of_a = self.rows[places, 0].tolist()
        name = str if self.labels is None else self.labels.__getitem__
        return *self.batch(places), tuple(map(name, of_a))

    def only(self, places: np.ndarray) -> VectorPairs:
        """Some of the pairs."""
        return replace(
            self,
            rows=self.rows[places],
            ids=self.ids[places],
            groups=None if self.groups is None else self.groups[places],
            weights=None if self.weights is None else self.weights[places],
        )

    def joined(self, other: VectorPairs) -> VectorPairs:
        """These pairs and others of the same two matrices."""
        if self.a is not other.a or self.b is not other.b:
            raise InputError(
                f"{self.name} and {other.name}: pairs of other files cannot be joined"
            )
        return replace(
            self,
            rows=np.concatenate([self.rows, other.rows]),
            ids=np.concatenate([self.ids, other.ids]),
            groups=_after(self.groups, other.groups),
            weights=_after(self.weights, other.weights),
        )

    def split(self, share: float) -> tuple[VectorPairs, VectorPairs]:
        """The pairs without a share of the ids or groups, and those with them: always
        the same, however the rows are ordered.
        """
        is_held_out = held_out_places(self.units(), share)
        held_out = self.only(is_held_out)
        name = f"{self.name} (held out)"
        return self.only(~is_held_out), replace(held_out, name=name, skipped=())

    def units(self) -> np.ndarray:
        """(N,) numbers, equal for pairs that are held out together: those of one id or
        one group, and all that these are linked to.
        """
        if self.groups is None:
            return self.ids
        return linked(self.groups, self.ids)


def _after(first: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or other is None else np.concatenate([first, other])


def held_out_places(units: np.ndarray, share: float) -> np.ndarray:
    """(N,) bool: a share of the units, two at least, by ascending number, which for
    digests is as good as chance; none that holds more than the share of all rows.
    """
    distinct, place, sizes = np.unique(units, return_inverse=True, return_counts=True)
    wanted = max(2, round(share * len(distinct)))
    small = np.flatnonzero(sizes <= max(1.0, share * len(units)))
    if len(small) < wanted:
        small = np.argsort(sizes, kind="stable")
    chosen = np.zeros(len(distinct), bool)
    chosen[small[:wanted]] = True
    return chosen[place]


def open_pairs(
    a: str,
    b: str,
    ids: str | None = None,
    a_ids: str | None = None,
    b_ids: str | None = None,
    *,
    groups: str | None = None,
    weights: str | None = None,
    drop: Sequence[str] = (),
) -> VectorPairs:
    """Opens two files and pairs their rows: by position, or where both have ids by
    these, which are unique in b. Groups and weights are those of the rows of a.
    """
    side_a, side_b = read_side(a, drop), read_side(b, drop)
    left, right = side_a.matrix, side_b.matrix
    places = str(_split(a)[0]), str(_split(b)[0])
    check_dropped(drop, a, b)
    refuse_shared(side_a, side_b, places)
    n = left.shape[0]
    skipped: list[Skip] = []
    rows = None
    if a_ids is not None and b_ids is not None:
        labels: list[str] | None = read_ids_of(a_ids, n, a)
        assert labels is not None
        others = read_ids_of(b_ids, right.shape[0], b)
        row_of_b = rows_of(others, b_ids)
        skipped = alone("a", labels, row_of_b) + alone("b", others, set(labels))
        joined = [(i, row_of_b[x]) for i, x in enumerate(labels) if x in row_of_b]
        rows = np.array(joined, np.int64).reshape(-1, 2)
    else:
        check_lengths(left, right, a, b)
        labels = None if ids is None else read_ids_of(ids, n, a)
    name = f"{Path(places[0]).name} and {Path(places[1]).name}"
    pairs = usable_pairs((a, b), name, left, right, labels, rows, skipped)
    of_a = pairs.rows[:, 0]
    if groups is not None:
        digests = np.array([id_digest(x) for x in read_ids_of(groups, n, a)])
        pairs = replace(pairs, groups=digests[of_a])
    if weights is not None:
        pairs = replace(pairs, weights=read_weights(weights, n)[of_a])
    return pairs


def check_dropped(drop: Sequence[str], a: str, b: str) -> None:
    """Refuses the name of a column that neither table has."""
    known: list[str] = []
    for spec in (a, b):
        path, name = _split(spec)
        if drop and path.suffix in _TABLES and not name:
            known += _table(path).column_names
    for name in drop:
        if name not in known:
            raise InputError(f"drop: no table has the column {name!r}")


def check_lengths(left: Any, right: Any, a: str, b: str) -> None:
    """Refuses two matrices of other lengths."""
    if left.shape[0] == right.shape[0]:
        return
    both = f"{a} has {left.shape[0]:,} rows, {b} has {right.shape[0]:,} rows"
    if left.shape[0] == right.shape[1] or right.shape[0] == left.shape[1]:
        raise InputError(f"{both}; one of them is transposed")
    raise InputError(f"{both}; `cloob train vectors` joins them by --a-ids and --b-ids")


def alone(side: str, labels: Sequence[str], others: Container[str]) -> list[Skip]:
    """The ids of a side that the other one lacks."""
    missing = dict.fromkeys(label for label in labels if label not in others)
    detail = f"only {side} has this id"
    return [Skip(label, "no partner", detail) for label in missing]


def gather(side: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of a matrix, which may be sparse."""
    chosen: np.ndarray = (
        side[rows].toarray() if hasattr(side, "toarray") else side.take(rows, 0)
    )
    return chosen


def usable_pairs(
    specs: tuple[str, str],
    name: str,
    a: Any,
    b: Any,
    labels: list[str] | None,
    rows: np.ndarray | None = None,
    skipped: Sequence[Skip] = (),
) -> VectorPairs:
    """The pairs of rows (without them: by position) whose numbers are finite; the
    labels of a's rows are their ids.
    """
    rows = (
        np.broadcast_to(np.arange(a.shape[0])[:, None], (a.shape[0], 2))
        if rows is None
        else rows
    )
    skipped = list(skipped)
    for side, spec, place in ((a, specs[0], 0), (b, specs[1], 1)):
        bad = np.zeros(side.shape[0], bool)
        for start in range(0, 0 if side.dtype.kind in "biu" else len(bad), _IN_CACHE):
            some = side[start : start + _IN_CACHE]
            some = some.toarray() if hasattr(some, "toarray") else some
            if (
                some.dtype == np.float16
            ):  # by its bits five times as fast as np.isfinite
                wrong = some.view(np.uint16) & 0x7C00 == 0x7C00
            else:
                with np.errstate(over="ignore"):
                    wrong = ~np.isfinite(some.astype(np.float32))
            bad[start : start + _IN_CACHE] = wrong.any(1)
        what = "holds NaN, infinity or a number that float32 cannot hold"
        skipped += [
            Skip(f"{spec} row {row}", "not finite", what) for row in np.flatnonzero(bad)
        ]
        rows = rows[~bad[rows[:, place]]] if bad.any() else rows
    if labels is None:
        digests = scattered(rows[:, 0][equal_rows(name, a, b, rows)])
    else:
        of_rows = (id_digest(labels[row]) for row in rows[:, 0].tolist())
        digests = np.fromiter(of_rows, np.int64, len(rows))
    return VectorPairs(name, a, b, rows, digests, labels, tuple(skipped))


def scattered(numbers: np.ndarray) -> np.ndarray:
    """Numbers in no order, one for one: the finaliser of SplitMix64."""
    x = numbers.astype(np.uint64) + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return np.asarray((x >> np.uint64(1)).view(np.int64))


def equal_rows(name: str, a: Any, b: Any, rows: np.ndarray) -> np.ndarray:
    """(N,) the first pair whose row of a or of b is the same, itself where none is.

    Where that would make one id of more than a tenth of the pairs, as rows of a few
    whole numbers do, the rows of the side with more distinct ones count alone; where
    these do too, none.
    """
    places = np.arange(len(rows))
    of_a, of_b = row_digests(a)[rows[:, 0]], row_digests(b)[rows[:, 1]]
    if not (has_equal(of_a) or has_equal(of_b)):
        return places
    more, fewer = of_a, of_b
    if len(np.unique(of_b)) > len(np.unique(of_a)):
        more, fewer = of_b, of_a
    most = max(_FEW_ROWS, len(rows) // 10)
    for columns in ([more, fewer], [more]):
        first = linked(places, *columns)
        if np.bincount(first).max() <= most and len(np.unique(first)) >= _FEW_IDS:
            n_equal = int((first != places).sum())
            if n_equal:
                logger.info(
                    "%s: %s of %s rows are equal to others of their side, and are one"
                    " id with them (--ids says otherwise)",
                    name,
                    f"{n_equal:,}",
                    f"{len(rows):,}",
                )
            return first
    logger.info("%s: rows are so often equal that every pair is an id", name)
    return places


def has_equal(digests: np.ndarray) -> bool:
    """Whether a number is there twice."""
    ordered = np.sort(digests)
    return bool((ordered[1:] == ordered[:-1]).any())


def row_digests(side: Any) -> np.ndarray:
    """(n,) uint64 digests of the rows of a matrix, equal for equal bytes."""
    draws = np.random.PCG64(0)
    factors = np.zeros(0, np.uint64)
    parts = []
    for start in range(0, side.shape[0], _IN_CACHE):
        some = side[start : start + _IN_CACHE]
        some = some.toarray() if hasattr(some, "toarray") else np.asarray(some)
        content = np.ascontiguousarray(some).view(np.uint8)
        content = np.pad(content, ((0, 0), (0, -content.shape[1] % 8)))
        words = content.view(np.uint64)
        if not len(factors):
            factors = np.asarray(draws.random_raw(words.shape[1])) | np.uint64(1)
        mixed = words ^ (words >> np.uint64(32))
        parts.append((mixed * factors).sum(1, dtype=np.uint64))
    return np.concatenate(parts)


def read_ids_of(spec: str, rows: int, matrix: str) -> list[str]:
    """The ids in a file, one per row of a matrix."""
    ids = read_ids(spec)
    if len(ids) != rows:
        raise InputError(
            f"{spec} has {len(ids):,} ids, {matrix} has {rows:,} rows; one id a row is"
            " expected"
        )
    return ids


def rows_of(labels: Sequence[str], spec: str) -> dict[str, int]:
    """The row of every label, none of which may stand twice."""
    places: dict[str, int] = {}
    for row, label in enumerate(labels):
        if places.setdefault(label, row) != row:
            raise InputError(
                f"{spec}: {label!r} stands at rows {places[label]} and {row}; once is"
                " right"
            )
    return places


def as_floats(rows: np.ndarray | Tensor) -> Tensor:
    """Rows of any numbers as float32; memory is shared where it can be."""
    if isinstance(rows, Tensor):
        return rows.float()
    if rows.dtype == np.float16:  # a hundred times as fast as by numpy
        return torch.from_numpy(np.require(rows, None, ["C", "W"])).float()
    with np.errstate(over="ignore"):  # what becomes infinite is counted
        return torch.from_numpy(np.require(rows, np.float32, ["C", "W"]))


def as_numbers(rows: np.ndarray | Tensor) -> Tensor:
    """As ``as_floats``, but float64 of numbers of which float32 would lose digits
    before a head takes their mean away.
    """
    if isinstance(rows, Tensor):
        return rows if rows.dtype == torch.float64 else rows.float()
    if rows.dtype.itemsize < (4 if rows.dtype.kind in "iu" else 8):
        return as_floats(rows)
    return torch.from_numpy(np.require(rows, np.float64, ["C", "W"]))
