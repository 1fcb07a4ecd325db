"""Pairs of rows of two matrices (n rows of F numbers): row by row, or joined by ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import Batch, Skip
from cloob.data.matrices import read_ids_of, read_rows, read_weights, split_spec
from cloob.data.pairs import Pairs
from cloob.data.rows import Side, as_numbers, digest_of, gather, row_digests
from cloob.data.source import Fingerprint, digest, linked_groups, spread
from cloob.data.table import Encodings, Matrix, Unencoded, check_dropped, refuse_shared
from cloob.errors import InputError, counted
from cloob.functional.ids import id_digest

_FEW_IDS = 20  # fewer would be labels, not ids
_FEW_ROWS = 20  # of one id, in however few pairs
logger = logging.getLogger(__name__)


Partners = tuple[np.ndarray, list[Skip]]
"""(n, 2) rows of a and of b that are pairs, and what has no partner."""
ALL = slice(None)


@dataclass(frozen=True)
class VectorPairs(Pairs):
    """The usable pairs of two matrices; pairs of equal id belong together."""

    name: str  # what reports call them
    a: Matrix  # (n, F) numbers of any type, an array or sparse by scipy
    b: Matrix  # (n', F') likewise
    rows: np.ndarray  # (N, 2) rows of a and of b that are pairs
    # (N,) digests of their ids: rows of one id are one sample
    ids: np.ndarray
    # the ids of the rows of a; None where a row's number is its id
    labels: Sequence[str] | None = None
    # rows with NaN or infinite numbers, or without a partner
    skipped: tuple[Skip, ...] = ()
    # (N,) digests of groups, which are held out whole; None: every id by itself
    group_ids: np.ndarray | None = None
    weights: np.ndarray | None = None  # (N,) float64, how much each pair counts
    # tables whose cells a and b are until they are encoded; None for a matrix
    unencoded: tuple[Unencoded | None, Unencoded | None] = (None, None)
    encodings: Encodings = (None, None)  # by which they were

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> Fingerprint:
        """What the pairs are: their number, their ids, and their rows (of very many a
        part).
        """
        rows_of_a, rows_of_b = self.rows[spread(len(self))].T
        found: Fingerprint = {
            "pairs": len(self),
            "ids": digest([self.ids]),
            "rows of a": digest_of(self.a, rows_of_a),
            "rows of b": digest_of(self.b, rows_of_b),
        }
        if self.group_ids is not None:
            found["groups"] = digest([self.group_ids])
        if self.weights is not None:
            found["weights"] = digest([self.weights])
        return found

    def batch(self, rows: np.ndarray | slice = ALL, epoch: int = 0) -> Batch:
        """Some pairs: (n, F) and (n, F') numbers as of ``as_numbers``, the same in
        every epoch.
        """
        rows_of_a, rows_of_b = self.rows[rows].T
        a = as_numbers(gather(self.a, rows_of_a))
        b = as_numbers(gather(self.b, rows_of_b))
        return Batch((a, b), torch.from_numpy(self.ids[rows]))

    def keys(self) -> list[str]:
        """What to call each pair in a log."""
        rows_of_a = self.rows[:, 0].tolist()
        if self.labels is None:
            return list(map(str, rows_of_a))
        return [self.labels[row] for row in rows_of_a]

    def only(self, places: np.ndarray) -> VectorPairs:
        """Some of the pairs."""
        return replace(
            self,
            rows=self.rows[places],
            ids=self.ids[places],
            group_ids=None if self.group_ids is None else self.group_ids[places],
            weights=None if self.weights is None else self.weights[places],
        )

    def at_most(self, n: int) -> VectorPairs:
        """So many of the pairs, evenly spread."""
        return self.only(np.array(spread(len(self), n)))

    def joined(self, other: VectorPairs) -> VectorPairs:
        """These pairs and others of the same two matrices."""
        return replace(
            self,
            rows=np.concatenate([self.rows, other.rows]),
            ids=np.concatenate([self.ids, other.ids]),
            group_ids=_joined_columns(self.group_ids, other.group_ids),
            weights=_joined_columns(self.weights, other.weights),
        )

    def encodings_by_rows(self) -> Encodings:
        """How the tables of both sides become numbers, as the rows of these pairs
        say.
        """
        refuse_shared(*self.unencoded)
        a, b = (
            None if side is None else side.fit(np.unique(rows))
            for side, rows in zip(self.unencoded, self.rows.T, strict=True)
        )
        return a, b

    def encoded(self, encodings: Encodings) -> VectorPairs:
        """The pairs with the numbers that a model takes in the place of tables."""
        a, b = (
            matrix if side is None else side.numbers(encoding)
            for matrix, side, encoding in zip(
                (self.a, self.b), self.unencoded, encodings, strict=True
            )
        )
        return replace(self, a=a, b=b, encodings=encodings)

    def split(self, share: float) -> tuple[VectorPairs, VectorPairs]:
        """The pairs without a share of the ids or groups, and those with them: always
        the same, however the rows are ordered.
        """
        if not 0 < share < 1:
            raise InputError(f"val_split is {share}; it must be a share below 1, or 0")
        units = self.groups()
        if len(np.unique(units)) < 4:
            raise InputError(
                f"{self.name}: {self.counted_units()}; 2 to train on and 2 to hold out"
                " are needed"
            )
        is_held_out = _held_out_places(units, share)
        held_out = self.only(is_held_out)
        name = f"{self.name} (held out)"
        return self.only(~is_held_out), replace(held_out, name=name, skipped=())

    def groups(self) -> np.ndarray:
        """(N,) numbers, equal for pairs that are held out together: those of one id or
        one group, and all that these are linked to.
        """
        if self.group_ids is None:
            return self.ids
        return linked_groups(self.group_ids, self.ids)

    def units_of_ids(self) -> Tensor:
        """(distinct ids, ascending) the unit of each, over which means are resampled;
        without groups the ids.
        """
        first = np.unique(self.ids, return_index=True)[1]
        return torch.from_numpy(self.groups()[first])

    def counted_units(self) -> str:
        """How many units there are, in words: ``20 ids``, ``4 groups``."""
        kind = "ids" if self.group_ids is None else "groups"
        return counted(len(np.unique(self.groups())), kind)


def hold_out(
    pairs: VectorPairs, held_out: VectorPairs | float = 0.0
) -> tuple[VectorPairs, VectorPairs | None]:
    """The training pairs and the held-out ones, which are others or a share of the
    pairs, with numbers in the place of tables as the training rows say.
    """
    if not held_out:
        return pairs.encoded(pairs.encodings_by_rows()), None
    if not isinstance(held_out, VectorPairs):
        training, _ = pairs.split(held_out)
        return pairs.encoded(training.encodings_by_rows()).split(held_out)
    training = pairs.encoded(pairs.encodings_by_rows())
    held_out = held_out.encoded(training.encodings)
    for side, matrix, expected in (
        ("a", held_out.a, training.a),
        ("b", held_out.b, training.b),
    ):
        if matrix.shape[1] != expected.shape[1]:
            raise InputError(
                f"{held_out.name}: {side} has {matrix.shape[1]:,} columns, not"
                f" {expected.shape[1]:,}"
            )
    return training, held_out


def _joined_columns(
    first: np.ndarray | None, second: np.ndarray | None
) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _held_out_places(units: np.ndarray, share: float) -> np.ndarray:
    """(N,) bool: a share of the units, two at least, by ascending number, which for
    digests is as good as chance; none that holds more than the share of all rows.
    """
    distinct, place, sizes = np.unique(units, return_inverse=True, return_counts=True)
    wanted = max(2, round(share * len(distinct)))
    small = np.flatnonzero(sizes <= max(1.0, share * len(units)))
    if len(small) < wanted:
        small = np.argsort(sizes, kind="stable")
    return np.isin(place, small[:wanted])


def open_vector_pairs(
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
    side_a = Side(a, read_rows(a, drop))
    side_b = Side(b, read_rows(b, drop))
    check_dropped(drop, (side_a.content, side_b.content))
    n = len(side_a)
    partners: Partners | None = None
    labels = None if ids is None else read_ids_of(ids, n, a)
    if a_ids is not None and b_ids is not None:
        labels = read_ids_of(a_ids, n, a)
        labels_b = read_ids_of(b_ids, len(side_b), b)
        partners = _partners_by_ids(labels, labels_b, b_ids)
    return usable_pairs(
        side_a,
        side_b,
        labels,
        groups=None if groups is None else read_ids_of(groups, n, a),
        weights=None if weights is None else read_weights(weights, n),
        partners=partners,
    )


def _partners_by_ids(
    labels_a: Sequence[str], labels_b: Sequence[str], spec: str
) -> Partners:
    """(n, 2) rows of equal labels, and the labels that one side lacks."""
    row_of_b = {label: row for row, label in enumerate(labels_b)}
    for row, label in enumerate(labels_b):
        if row_of_b[label] != row:
            raise InputError(
                f"{spec}: {label!r} stands at rows {row} and {row_of_b[label]}; once is"
                " right"
            )
    places = [row_of_b.get(label, -1) for label in labels_a]
    rows = np.stack([np.arange(len(places)), places], axis=1)
    labels = dict.fromkeys(labels_a)
    skipped = [_alone(label, "a") for label in labels if label not in row_of_b]
    skipped += [_alone(label, "b") for label in row_of_b if label not in labels]
    return rows[rows[:, 1] >= 0], skipped


def _alone(label: str, side: str) -> Skip:
    return Skip(label, "no partner", f"only {side} has this id")


def usable_pairs(
    a: Side,
    b: Side,
    labels: Sequence[str] | None = None,
    *,
    groups: Sequence[str] | None = None,
    weights: np.ndarray | None = None,
    partners: Partners | None = None,
) -> VectorPairs:
    """The pairs of rows (by position unless partners are given) whose numbers are
    finite; the labels of a's rows are their ids. Of a table cells may be missing, but
    not a row.
    """
    name = f"{split_spec(a.name)[0].name} and {split_spec(b.name)[0].name}"
    rows, skipped = _by_position(a, b) if partners is None else partners
    for column, side in enumerate((a, b)):
        is_unusable = side.is_unusable()
        skipped += map(side.skip, np.flatnonzero(is_unusable).tolist())
        rows = rows[~is_unusable[rows[:, column]]]
    rows_of_a = rows[:, 0]
    if labels is None:
        ids = scattered(rows_of_a[equal_rows(name, a.cells, b.cells, rows)])
    else:
        ids = _digests(labels, rows_of_a)
    return VectorPairs(
        name,
        a.cells,
        b.cells,
        rows,
        ids,
        labels,
        tuple(skipped),
        group_ids=None if groups is None else _digests(groups, rows_of_a),
        weights=None if weights is None else weights[rows_of_a],
        unencoded=(a.unencoded, b.unencoded),
    )


def _by_position(a: Side, b: Side) -> Partners:
    """Row i of a and row i of b."""
    n = len(a)
    if n != len(b) or not n:
        raise InputError(
            f"{a.name} has {n:,} rows, {b.name} has {len(b):,} rows; row i of one"
            " belongs to row i of the other (`cloob train vectors` joins them by"
            " --a-ids and --b-ids)"
        )
    return np.arange(n)[:, None].repeat(2, 1), []


def _digests(texts: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """(N,) int64 digests of the texts of some rows."""
    digests = (id_digest(texts[row]) for row in rows.tolist())
    return np.fromiter(digests, np.int64, len(rows))


def scattered(numbers: np.ndarray) -> np.ndarray:
    """Numbers in no order, one for one: the finaliser of SplitMix64."""
    x = numbers.astype(np.uint64) + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return np.asarray((x >> np.uint64(1)).view(np.int64))


def equal_rows(name: str, a: Matrix, b: Matrix, rows: np.ndarray) -> np.ndarray:
    """(N,) the first pair whose row of a or of b is the same, itself where none is.

    Where that would make one id of more than a tenth of the pairs, as rows of a few
    whole numbers do, the rows of the side with more distinct ones count alone; where
    these do too, none.
    """
    places = np.arange(len(rows))
    digests = [row_digests(a)[rows[:, 0]], row_digests(b)[rows[:, 1]]]
    more, less = sorted(digests, key=_n_distinct, reverse=True)  # distinct rows
    if _n_distinct(less) == len(rows):
        return places
    for columns in ((more, less), (more,)):
        first_pairs = linked_groups(places, *columns)
        if _could_be_ids(first_pairs):
            n_equal = int((first_pairs != places).sum())
            if n_equal:
                logger.info(
                    f"{name}: {n_equal:,} of {len(rows):,} rows are equal to others of"
                    " their side, and are one id with them (--ids says otherwise)"
                )
            return first_pairs
    logger.info("%s: rows are so often equal that every pair is an id", name)
    return places


def _n_distinct(column: np.ndarray) -> int:
    ordered = np.sort(column)  # numpy's unique takes forty times as long
    return min(1, len(column)) + int((ordered[1:] != ordered[:-1]).sum())


def _could_be_ids(first: np.ndarray) -> bool:
    """Whether no number has more than a tenth of the rows, and there are not few."""
    largest = np.bincount(first).max()
    limit = max(_FEW_ROWS, len(first) // 10)
    return bool(largest <= limit and _n_distinct(first) >= _FEW_IDS)
