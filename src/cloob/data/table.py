"""Tables as numbers: what the cells of a table are, and how training rows say that its
columns become those of a matrix.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, Self, runtime_checkable

import numpy as np
import pyarrow as pa
from pyarrow import compute

from cloob.data.source import digest
from cloob.errors import InputError, first_of


class SparseRows(Protocol):
    """A sparse matrix of scipy, by rows."""

    ndim: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def __getitem__(self, rows: slice | np.ndarray, /) -> SparseRows: ...

    def toarray(self) -> np.ndarray: ...


Matrix = np.ndarray | SparseRows
Kind = Literal["number", "date", "category", "empty"]
LEAST_TEXTS = 20  # different ones, above which a column may be free text
MAX_LEVELS = 1000  # of a category: each is a column
LEAVE_IT_OUT = "leave the column out (`cloob train vectors` by --drop)"
EPOCH, DAY = np.datetime64(0, "us"), np.timedelta64(1, "D")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """A column of a table, and how training rows say that it becomes numbers: a missing
    number or date is the median of theirs, a category a column for each of its levels.
    """

    name: str
    kind: Kind  # a boolean is a number; a column without any cell is empty
    levels: tuple[str, ...] = ()  # the texts of a category, sorted
    median: float = 0.0
    has_flag: bool = False  # a cell was missing: another column says where one is

    def encode(self, table: Table) -> list[np.ndarray]:
        """The (n, …) numbers of the column of a table."""
        if self.kind == "empty":
            return []
        place = table.places[self.name]
        cells = table.cells[:, place]
        is_missing = np.isnan(cells)
        if self.kind == "category":
            codes = np.nan_to_num(cells, nan=-1)
            place_of = {text: i for i, text in enumerate(table.columns[place].levels)}
            columns = [codes == place_of.get(level, -2) for level in self.levels]
        else:
            columns = [np.where(is_missing, self.median, cells)]
        if self.has_flag:
            columns.append(is_missing)
        return columns


class Unencoded(ABC):
    """Rows of which training rows say how they become numbers."""

    name: str  # what an error calls them
    cells: np.ndarray  # (n, C) numbers that are equal for equal rows

    @abstractmethod
    def fit(self, rows: np.ndarray) -> Encoding:
        """How all rows become numbers, as these say."""

    @abstractmethod
    def numbers(self, encoding: Encoding | None) -> Matrix:
        """The (n, F) numbers for a model, by what ``fit`` of its training rows gave."""


@dataclass(frozen=True, eq=False)
class Table(Unencoded):
    """A table with its cells as numbers: a date is days since 1970, a text its place
    among the levels.
    """

    name: str
    columns: tuple[Column, ...]
    cells: np.ndarray  # (n, C), NaN where a cell is missing
    dropped: tuple[str, ...] = ()  # columns that were left out

    @classmethod
    def of(cls, name: str, rows: object, drop: Sequence[str] = ()) -> Self:
        """The table of a data frame or a table of Arrow, without the columns to drop;
        InputError for a column that has neither numbers nor dates nor texts.
        """
        try:
            if hasattr(rows, "iloc"):  # of pandas
                table = pa.Table.from_pandas(rows, preserve_index=False)
            else:
                table = pa.table(rows)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise InputError(f"{name}: cannot be read as a table: {error}") from None
        names = [column for column in table.column_names if column not in drop]
        if not names or not len(table):
            raise InputError(f"{name}: has no rows of numbers")
        column, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise InputError(f"{name}: has several columns {column!r}")
        read = [read_column(name, column, table[column]) for column in names]
        columns, cells = zip(*read, strict=True)
        dropped = tuple(column for column in drop if column in table.column_names)
        return cls(name, columns, np.column_stack(cells), dropped)

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """The places of the columns by their names."""
        return {column.name: place for place, column in enumerate(self.columns)}

    def by_content(self) -> dict[str, str]:
        """The names of the columns by digests of their cells."""
        return {
            digest([*column.levels, cells.astype(np.float64)]): column.name
            for column, cells in zip(self.columns, self.cells.T, strict=True)
        }

    def is_nearly_distinct(self, name: str) -> bool:
        """Whether nearly all cells of a column are different."""
        cells = self.cells[:, self.places[name]]
        return len(np.unique(cells)) >= 0.99 * len(cells)

    def fit(self, rows: np.ndarray) -> TableEncoding:
        fitted = [
            fitted_column(self.name, column, cells, rows)
            for column, cells in zip(self.columns, self.cells[rows].T, strict=True)
        ]
        return TableEncoding(tuple(fitted))

    def numbers(self, encoding: Encoding | None) -> np.ndarray:
        """Those of a model that was trained on no table are the cells."""
        if isinstance(encoding, TableEncoding):
            return encoding.encode(self)
        for column in self.columns:
            if column.kind in ("date", "category"):
                raise InputError(
                    f"{self.name}: column {column.name!r} is a {column.kind}; the model"
                    " was trained on a matrix of numbers, not on a table"
                )
        return self.cells


def is_table(rows: object) -> bool:
    """Whether rows are a data frame or a table of Arrow."""
    return hasattr(rows, "columns")


Read = tuple["Column", np.ndarray]
"""A column, and its (n,) numbers."""


def read_column(table: str, name: str, cells: pa.ChunkedArray) -> Read:
    """What a column is, and its numbers."""
    if cells.null_count == len(cells):
        return Column(name, "empty"), np.full(len(cells), np.nan)
    for is_of_kind, read in READERS.items():
        if is_of_kind(cells.type):
            return read(name, cells)
    raise InputError(
        f"{table}: column {name!r} holds {cells.type}, which is no number, date or"
        f" category: {LEAVE_IT_OUT}"
    )


def read_numbers(name: str, cells: pa.ChunkedArray) -> Read:
    """A column of integers or floating-point numbers."""
    return Column(name, "number"), cells.to_numpy()


def read_as_numbers(name: str, cells: pa.ChunkedArray) -> Read:
    """A column of what is as good as a number."""
    return read_numbers(name, cells.cast(pa.float64()))


def read_texts(name: str, cells: pa.ChunkedArray) -> Read:
    """A column of texts: dates if all are, as in a CSV, else a category."""
    with contextlib.suppress(pa.ArrowInvalid):
        return read_dates(name, cells)
    return read_category(name, cells)


def read_dates(name: str, cells: pa.ChunkedArray) -> Read:
    """A column of dates or moments, and its days since 1970."""
    moments = cells.cast(pa.timestamp("us")).to_numpy()
    return Column(name, "date"), (moments - EPOCH) / DAY


def read_category(name: str, cells: pa.ChunkedArray) -> Read:
    """A column of texts, and the places of its cells among them."""
    texts = cells.cast(pa.string())
    levels = compute.unique(texts).drop_null().sort()
    places = compute.index_in(texts, value_set=levels).to_numpy()
    column = Column(name, "category", tuple(levels.to_pylist()))
    return column, places.astype(np.float64)


def read_dictionary(name: str, cells: pa.ChunkedArray) -> Read:
    """A category of Arrow or pandas."""
    return read_category(name, cells.cast(cells.type.value_type))


READERS: dict[Callable[[pa.DataType], bool], Callable[[str, pa.ChunkedArray], Read]] = {
    pa.types.is_integer: read_numbers,
    pa.types.is_floating: read_numbers,
    pa.types.is_boolean: read_as_numbers,
    pa.types.is_decimal: read_as_numbers,
    pa.types.is_date: read_dates,
    pa.types.is_timestamp: read_dates,
    pa.types.is_dictionary: read_dictionary,
    pa.types.is_string: read_texts,
    pa.types.is_large_string: read_texts,
    pa.types.is_string_view: read_texts,
}


def is_number(text: str) -> bool:
    """Whether a text writes a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def fitted_column(
    table: str, column: Column, cells: np.ndarray, rows: np.ndarray
) -> Column:
    """A column as the (n,) cells of training rows say; InputError for free text."""
    is_missing = np.isnan(cells)
    has_flag = bool(is_missing.any())
    present = cells[~is_missing]
    if not len(present):
        logger.warning("%s: column %r is empty; left out", table, column.name)
        return Column(column.name, "empty")
    if column.kind != "category":
        median = float(np.median(present))
        return Column(column.name, column.kind, (), median, has_flag)
    places = np.unique(present).astype(int)
    if len(places) > min(MAX_LEVELS, max(LEAST_TEXTS, len(cells) // 5)):
        refuse_texts(table, column, cells, rows)
    levels = tuple(column.levels[place] for place in places)
    return Column(column.name, "category", levels, has_flag=has_flag)


def refuse_texts(
    table: str, column: Column, cells: np.ndarray, rows: np.ndarray
) -> NoReturn:
    """Refuses a column of too many texts for categories, and names one that is no
    number.
    """
    words = [i for i, text in enumerate(column.levels) if not is_number(text)]
    is_word = np.isin(cells, words)
    if not is_word.any():
        raise InputError(
            f"{table}: column {column.name!r} holds numbers as texts, such as"
            f" {column.levels[0][:40]!r}: make numbers of them, or {LEAVE_IT_OUT}"
        )
    place = int(is_word.argmax())
    text = column.levels[int(cells[place])]
    raise InputError(
        f"{table}: column {column.name!r} holds {text[:40]!r} in row {rows[place]}, and"
        " so many different texts that they are no categories: where others hold"
        f" numbers leave that cell empty, else {LEAVE_IT_OUT}; a sentence encoder makes"
        " vectors of texts (`cloob train align` has one for captions)"
    )


@dataclass(frozen=True)
class TableEncoding:
    """How the columns of a table become those of a matrix, by their names."""

    columns: tuple[Column, ...]

    def encode(self, table: Table) -> np.ndarray:
        """(n, F) numbers for the rows of a table, in whichever order it has its
        columns; InputError where one is missing or of another kind.
        """
        self.check(table)
        parts = [part for column in self.columns for part in column.encode(table)]
        return np.column_stack(parts)

    def check(self, table: Table) -> None:
        """Refuses a table that lacks a column or has it of another kind; says which
        other columns are left out.
        """
        for fitted in self.columns:
            if fitted.name not in table.places:
                raise InputError(
                    f"{table.name}: has no column {fitted.name!r}, which the model was"
                    f" trained on; it has {first_of(list(table.places))}"
                )
            kind = table.columns[table.places[fitted.name]].kind
            if "empty" not in (kind, fitted.kind) and kind != fitted.kind:
                raise InputError(
                    f"{table.name}: column {fitted.name!r} is a {kind}; the model was"
                    f" trained on a {fitted.kind}"
                )
        names = {column.name for column in self.columns}
        unseen = [name for name in table.places if name not in names]
        if unseen:
            message = "%s: %s left out: the model was trained without"
            logger.warning(message, table.name, first_of(unseen))


@runtime_checkable
class Transformer(Protocol):
    """A transformer or pipeline of scikit-learn."""

    def fit(self, X: object, /) -> Self: ...

    def transform(self, X: object, /) -> Matrix: ...


Encoding = TableEncoding | Transformer
Encodings = tuple[Encoding | None, Encoding | None]


def read_encodings(content: object) -> Encodings:
    """Those of a model's file, which ``dataclasses.asdict`` wrote; pydantic's error for
    anything else.
    """
    from pydantic import TypeAdapter  # models of matrices do without its import

    stored = tuple[TableEncoding | None, TableEncoding | None]
    encodings: Encodings = TypeAdapter(stored).validate_python(content)
    return encodings


def refuse_shared(a: Unencoded | None, b: Unencoded | None) -> None:
    """Refuses a column that is nearly all different and the same in both tables: an id
    or a row number gives the pairs away.
    """
    if not (isinstance(a, Table) and isinstance(b, Table)):
        return
    columns_of_b = b.by_content()
    for content, column in a.by_content().items():
        other = columns_of_b.get(content)
        if other is not None and a.is_nearly_distinct(column):
            raise InputError(
                f"column {column!r} of {a.name} is column {other!r} of"
                f" {b.name}, row by row, and gives the pairs away: {LEAVE_IT_OUT}"
            )


def check_dropped(drop: Sequence[str], sides: Sequence[Matrix | Unencoded]) -> None:
    """Refuses the name of a column that no table has."""
    tables = [side for side in sides if isinstance(side, Table)]
    dropped = [name for table in tables for name in table.dropped]
    for column in drop:
        if column not in dropped:
            raise InputError(f"drop: no table has the column {column!r}")
