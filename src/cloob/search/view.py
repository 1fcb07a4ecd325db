"""The pictures of an index that a filter lets through, as one of its models sees
them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cloob.errors import InputError
from cloob.search.matrix import Ids, Vectors
from cloob.search.models import Models
from cloob.search.query import AnyQuery, Query, Term, Vector, weighted_row
from cloob.search.records import IndexedModel, Item
from cloob.search.store import Store
from cloob.search.where import Filter

_MEMOIZED = 64
T = TypeVar("T")


class Memo(dict[Hashable, Any]):
    """A small cache; two threads may compute the same value at once."""

    def of(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value under a key, computed if it is not remembered."""
        value: T | None = self.get(key)
        if value is None:
            value = compute()
            if len(self) >= _MEMOIZED:
                self.clear()
            self[key] = value
        return value


@dataclass(frozen=True)
class View:
    store: Store
    models: Models
    memo: Memo
    model: IndexedModel
    where: Filter | None = None

    def vectors(self, ids: Sequence[int] | Ids) -> Vectors:
        """(n, D) in the order of the ids; rows of NaN where there is no vector."""
        return self.store.vectors(self.model.name, ids)

    def items(self, ids: Sequence[int] | Ids) -> dict[int, Item]:
        """Items by id, in the order of the ids; others were removed meanwhile."""
        return {item.id: item for item in self.store.items(ids)}

    def pictures(self) -> tuple[list[Item], Vectors]:
        """All pictures that have a vector, and these (n, D); InputError if none has."""
        items = self.store.items(self.store.ids(self.where))
        rows = self.vectors([item.id for item in items])
        has_row = np.isfinite(rows).all(1)
        if not has_row.any():
            raise InputError(f"no picture: {self.why_none()}")
        return [items[place] for place in np.flatnonzero(has_row)], rows[has_row]

    def why_none(self) -> str:
        """Why no picture has a row here, in a sentence."""
        if not self.store.count():
            return "the index is empty"
        if not self.store.count(self.where):
            return "the filter lets none through"
        name = self.model.name
        again = f"cloob index --name {name} --out {self.store.address}"
        return f"none has a vector of {name}; {again}"

    def row(self, query: AnyQuery, row: Vector | None = None) -> Vector:
        """The unit row (D,) of a query; ``row`` if that is known."""
        if isinstance(query, np.ndarray):
            row = query
        else:
            terms = Query.of(query).terms
            if not any(term.weight for term in terms):
                raise InputError(
                    "an empty query; give words or a picture a weight other than 0"
                )
            if row is None:
                weights = [term.weight for term in terms]
                row = weighted_row(weights, [self._term_row(term) for term in terms])
        row = np.asarray(row, np.float32)
        length = float(np.linalg.norm(row))
        if row.shape != (self.model.dim,) or not 0 < length < np.inf:
            raise InputError(
                f"a query of shape {row.shape} for the model {self.model.name!r};"
                f" ({self.model.dim},) is expected, not 0"
            )
        return row / length

    def _term_row(self, term: Term) -> Vector:
        if isinstance(term.what, int):
            return self._item_row(term.what)
        return self.models.row(self.model, term)

    def _item_row(self, id_: int) -> Vector:
        """The vector of a picture; refused if it has none."""
        row: Vector = self.vectors([id_])[0]
        if np.isfinite(row).all():
            return row
        if self.items([id_]):
            raise InputError(
                f"picture {id_} has no vector of the model {self.model.name!r}"
            )
        raise InputError(f"picture {id_} is not in this index")
