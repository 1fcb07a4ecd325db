"""The pictures of an index that a filter lets through, as one of its models sees them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cloob.errors import InputError
from cloob.search import background
from cloob.search.models import Models
from cloob.search.query import AnyQuery, Query, Vector, embed_query
from cloob.search.records import IndexedModel, Item
from cloob.search.store import Ids, Store, Vectors
from cloob.search.where import Filter

T = TypeVar("T")
Where = str | Filter | None
_MEMOIZED = 64


class Memo(dict[Hashable, Any]):
    """A small cache; two threads may compute the same value at once."""

    def of(self, key: Hashable, compute: Callable[[], T]) -> T:
        value: T | None = self.get(key)
        if value is None:
            value = compute()
            if len(self) >= _MEMOIZED:
                self.clear()
            self[key] = value
        return value


@dataclass(frozen=True)
class View:
    """The pictures of an index that a filter lets through, as one of its models sees them."""

    store: Store
    models: Models
    memo: Memo
    model: IndexedModel
    where: Filter | None = None

    def vectors(self, ids: Sequence[int] | Ids) -> Vectors:
        """(n, D) in the order asked for; rows of NaN where there is no vector."""
        return self.store.vectors(self.model.name, ids)

    def items(self, ids: Sequence[int] | Ids) -> dict[int, Item]:
        """Items by id, in the order asked for; others were removed meanwhile."""
        return {item.id: item for item in self.store.items(ids)}

    def blocks(self) -> Iterator[tuple[list[Item], Vectors]]:
        """All pictures that have a vector, with it, some thousands at a time."""
        for ids in self.store.pages(self.where):
            rows, items = self.vectors(ids), self.items(ids)
            known = np.isfinite(rows).all(1) & np.array([id_ in items for id_ in ids])
            if known.any():
                yield [items[ids[place]] for place in np.flatnonzero(known)], rows[known]

    def why_none(self) -> str:
        store = self.store
        if not store.count():
            return "the index is empty"
        if not store.count(self.where):
            return "the filter lets none through"
        return f"none has a vector of {self.model.name}; cloob index --name {self.model.name} --out {store.address}"

    def check_some(self, found: int) -> None:
        """Raises InputError where no picture was found to work on."""
        if not found:
            raise InputError(f"no picture: {self.why_none()}")

    def row(self, query: AnyQuery, known: Vector | None = None) -> Vector:
        """The unit row (D,) of a query; ``known`` if that is known."""
        if isinstance(query, Query):
            query.check()
        if known is None and not isinstance(query, np.ndarray):
            known = embed_query(Query.of(query), lambda: self.models.embedder(self.model), self._item_row)
        row = np.asarray(query if known is None else known, np.float32)
        length = float(np.linalg.norm(row))
        if row.shape != (self.model.dim,) or not 0 < length < np.inf:
            wanted = f"({self.model.dim},) is wanted, not 0"
            raise InputError(f"a query of shape {row.shape} for the model {self.model.name!r}; {wanted}")
        return row / length

    def _item_row(self, id_: int) -> Vector:
        row: Vector = self.vectors([id_])[0]
        if not np.isfinite(row).all():
            why = f"has no vector of the model {self.model.name!r}" if self.items([id_]) else "is not in this index"
            raise InputError(f"picture {id_} {why}")
        return row

    def text_rows(self) -> Vectors:
        return background.background_rows(lambda: self.models.embedder(self.model), self.model.fingerprint)

    def drawn_rows(self) -> Vectors:
        """Vectors of pictures of the index, in the place of unrelated pictures."""
        rows = self.vectors(np.random.default_rng(0).permutation(self.store.sample(background.DRAWN)))
        return rows[np.isfinite(rows).all(1)]

    def unrelated_rows(self, query: Query) -> Vectors | None:
        """(B, D) unrelated queries of the query's shape; None where there is nothing to draw them from."""
        shape = tuple((term.kind == "words", term.weight) for term in query.terms)
        key = ("unrelated", self.model, shape, None if all(words for words, _ in shape) else self.store.revision())
        return self.memo.of(key, lambda: background.unrelated(query, self.text_rows, self.drawn_rows))
