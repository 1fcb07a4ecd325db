"""The pictures of an index that a filter lets through, as one of its models sees them, and whether anything fits.

A cosine depends on the model, on the words, and on pictures that are near to everything. So a hit has a *margin*: with
s the query's score and m, d the mean and standard deviation of the scores of B unrelated queries **for that picture**,
it is (s − m) / d. Hits below the cutoff are left out; if none is left nothing fits. An unrelated query has the query's
shape: words become a line of ``background.txt``, a picture becomes one drawn from the index, the weights stay.
The page “Search and sort pictures” has measurements of the cutoff.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.search.models import Models
from cloob.search.query import AnyQuery, Query, Term, Vector, picture_of, weighted_row
from cloob.search.records import IndexedModel, Item
from cloob.search.store import Ids, Store, Vectors
from cloob.search.where import Filter

CUTOFF = 3.0  # of a query with words
PICTURE_CUTOFF = 2.0  # of a query of pictures alone, whose scores spread more
_DRAWN = 256  # pictures of the index that stand for unrelated pictures
_MIN_PICTURES = 20
_MIN_DEVIATION = 1e-3  # of cosines
_MEMOIZED = 64

T = TypeVar("T")
Where = str | Filter | None


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
        """(n, D) in the order of the ids; rows of NaN where there is no vector."""
        return self.store.vectors(self.model.name, ids)

    def items(self, ids: Sequence[int] | Ids) -> dict[int, Item]:
        """Items by id, in the order of the ids; others were removed meanwhile."""
        return {item.id: item for item in self.store.items(ids)}

    def blocks(self) -> Iterator[tuple[list[Item], Vectors]]:
        """All pictures that have a vector, with it, some thousands at a time."""
        for ids in self.store.pages(self.where):
            rows, items = self.vectors(ids), self.items(ids)
            kept = np.isfinite(rows).all(1) & np.array([id_ in items for id_ in ids])
            if kept.any():
                yield [items[ids[place]] for place in np.flatnonzero(kept)], rows[kept]

    def why_none(self) -> str:
        store = self.store
        if not store.count():
            return "the index is empty"
        if not store.count(self.where):
            return "the filter lets none through"
        return f"none has a vector of {self.model.name}; cloob index --name {self.model.name} --out {store.address}"

    def check_some(self, count: int) -> None:
        """Raises InputError where there is no picture to work on."""
        if not count:
            raise InputError(f"no picture: {self.why_none()}")

    def row(self, query: AnyQuery, row: Vector | None = None) -> Vector:
        """The unit row (D,) of a query; ``row`` if that is known."""
        if isinstance(query, Query):
            query.check()
        if row is None and not isinstance(query, np.ndarray):
            terms = Query.of(query).terms
            row = weighted_row([term.weight for term in terms], list(map(self._term_row, terms)))
        row = np.asarray(query if row is None else row, np.float32)
        length = float(np.linalg.norm(row))
        if row.shape != (self.model.dim,) or not 0 < length < np.inf:
            expected = f"({self.model.dim},) is wanted, not 0"
            raise InputError(f"a query of shape {row.shape} for the model {self.model.name!r}; {expected}")
        return row / length

    def _term_row(self, term: Term) -> Vector:
        row: Vector
        if not isinstance(term.what, int):
            embedder = self.models.embedder(self.model)
            is_words = term.kind == "words"
            (row,) = embedder.texts([str(term.what)]) if is_words else embedder.pictures([picture_of(term)])
            return np.asarray(row, np.float32)
        (row,) = self.vectors([term.what])
        if not np.isfinite(row).all():
            no_vector = f"has no vector of the model {self.model.name!r}"
            raise InputError(f"picture {term.what} {no_vector if self.items([term.what]) else 'is not in this index'}")
        return row

    def text_rows(self) -> Vectors:
        """(B, D) unit rows of the background's texts; cached on disk."""
        cache, texts = Cache(), Path(__file__).with_name("background.txt").read_text(encoding="utf-8").splitlines()
        name = hashlib.sha256("\n".join((self.model.fingerprint, *texts)).encode()).hexdigest() + ".npy"
        rows: Vectors
        with contextlib.suppress(ValueError, EOFError, OSError):  # a damaged file is made again
            if (cached := cache.find("embeddings", name)) is not None:
                rows = np.load(cached, allow_pickle=False)
                return rows
        rows = self.models.embedder(self.model).texts(texts)
        np.save(stream := io.BytesIO(), rows, allow_pickle=False)
        with contextlib.suppress(InputError):  # the next process makes them again
            cache.put("embeddings", name, stream.getvalue())
        return rows

    def unrelated_rows(self, query: Query) -> Vectors | None:
        """(B, D) unit rows of unrelated queries of the query's shape.

        None if a term is a picture, and the index has too few to compare with.
        """
        shape = tuple((term.kind == "words", term.weight) for term in query.terms)
        key = ("unrelated", self.model, shape, None if all(words for words, _ in shape) else self.store.revision())
        return self.memo.of(key, lambda: self._unrelated(shape))

    def _unrelated(self, shape: Sequence[tuple[bool, float]]) -> Vectors | None:
        generator, pools = np.random.default_rng(0), {True: self.text_rows()} if (True in dict(shape)) else {}
        if False in dict(shape):
            rows = self.vectors(np.random.default_rng(0).permutation(self.store.sample(_DRAWN)))
            pools[False] = rows[np.isfinite(rows).all(1)]
            if len(pools[False]) < _MIN_PICTURES:
                return None
        count = len(pools[True]) if True in pools else _DRAWN
        total, largest = np.zeros(1), max(abs(weight) for _, weight in shape)
        for place, (is_words, weight) in enumerate(shape):
            pool = pools[is_words]
            drawn = np.arange(count) if place == 0 and is_words else generator.integers(len(pool), size=count)
            total = total + weight / largest * pool[drawn]
        lengths = np.linalg.norm(total, axis=1)
        kept = lengths > 1e-6
        return np.asarray(total[kept] / lengths[kept, None], np.float32)


def margins(scores: Vectors, pictures: Vectors, others: Vectors) -> Vectors:
    """How many standard deviations scores, (n,) or (n, C), lie above those of (B, D) unrelated queries."""
    reached = pictures @ others.T
    mean, deviation = reached.mean(1), np.maximum(reached.std(1), _MIN_DEVIATION)
    return np.asarray(((scores.T - mean) / deviation).T, np.float32)
