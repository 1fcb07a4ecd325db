"""Searches and exports the pictures that a filter lets through.

A hit's margin is (s − m) / d: s is the query's score, m and d are the mean and standard
deviation of the scores of unrelated queries of the same shape for that picture. Hits
below the cutoff are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.search.matrix import Ids, Vectors
from cloob.search.models import Models
from cloob.search.query import AnyQuery, Query, Term, Vector, picture_of, weighted_row
from cloob.search.records import Hit, IndexedModel, Item, Results
from cloob.search.store import Store
from cloob.search.where import Filter

CUTOFF = 3.0  # of a query with words
PICTURE_CUTOFF = 2.0  # of a query of pictures alone, whose scores spread more
# nearest pictures that the cutoff looks at, at least: the nearest of all need not be
# the one that fits
LOOKED_AT = 200
_DRAWN = 256  # pictures of the index that stand for unrelated pictures
_MIN_PICTURES = 20
_MIN_DEVIATION = 1e-3  # of cosines
_MEMOIZED = 64

_TYPES: dict[str, tuple[set[type], Callable[[Any], Any]]] = {
    "bool": ({bool}, bool),
    "int64": ({int}, int),
    "double": ({int, float}, float),
    "string": (
        {bool, int, float, str},
        lambda value: value if isinstance(value, str) else json.dumps(value),
    ),
}  # Arrow's types of the sources' columns: what they hold, and what makes a value one

T = TypeVar("T")
Cutoff = float | Literal["auto"] | None
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
    """The pictures of an index that a filter lets through, as one of its models sees
    them.
    """

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
        if not self.store.count():
            return "the index is empty"
        if not self.store.count(self.where):
            return "the filter lets none through"
        name = self.model.name
        return (
            f"none has a vector of {name}; cloob index --name {name} --out"
            f" {self.store.address}"
        )

    def check_some(self, count: int) -> None:
        """Raises InputError where there is no picture to work on."""
        if not count:
            raise InputError(f"no picture: {self.why_none()}")

    def row(self, query: AnyQuery, row: Vector | None = None) -> Vector:
        """The unit row (D,) of a query; ``row`` if that is known."""
        if isinstance(query, Query) and not any(term.weight for term in query.terms):
            raise InputError(
                "an empty query; give words or a picture a weight other than 0"
            )
        if row is None and not isinstance(query, np.ndarray):
            terms = Query.of(query).terms
            row = weighted_row(
                [term.weight for term in terms], list(map(self._term_row, terms))
            )
        row = np.asarray(query if row is None else row, np.float32)
        length = float(np.linalg.norm(row))
        if row.shape != (self.model.dim,) or not 0 < length < np.inf:
            expected = f"({self.model.dim},) is expected, not 0"
            raise InputError(
                f"a query of shape {row.shape} for the model {self.model.name!r};"
                f" {expected}"
            )
        return row / length

    def _term_row(self, term: Term) -> Vector:
        row: Vector
        if not isinstance(term.what, int):
            embedder, is_words = self.models.embedder(self.model), term.kind == "words"
            (row,) = (
                embedder.texts([str(term.what)])
                if is_words
                else embedder.pictures([picture_of(term)])
            )
            return np.asarray(row, np.float32)
        (row,) = self.vectors([term.what])
        if not np.isfinite(row).all():
            no_vector = f"has no vector of the model {self.model.name!r}"
            raise InputError(
                f"picture {term.what}"
                f" {no_vector if self.items([term.what]) else 'is not in this index'}"
            )
        return row

    def text_rows(self) -> Vectors:
        """(B, D) unit rows of the background's texts; cached on disk."""
        cache, texts = (
            Cache(),
            Path(__file__)
            .with_name("background.txt")
            .read_text(encoding="utf-8")
            .splitlines(),
        )
        name = (
            hashlib.sha256(
                "\n".join((self.model.fingerprint, *texts)).encode()
            ).hexdigest()
            + ".npy"
        )
        rows: Vectors
        with contextlib.suppress(
            ValueError, EOFError, OSError
        ):  # a damaged file is made again
            if (cached := cache.find("embeddings", name)) is not None:
                rows = np.load(cached, allow_pickle=False)
                return rows
        rows = self.models.embedder(self.model).texts(texts)
        np.save(stream := io.BytesIO(), rows, allow_pickle=False)
        with contextlib.suppress(InputError):  # the next process makes them again
            cache.put("embeddings", name, stream.getvalue())
        return rows

    def unrelated_rows(self, query: Query) -> Vectors | None:
        """(B, D) unit rows of unrelated queries of a query's shape; None if the index
        has too few pictures for it.
        """
        shape = tuple((term.kind == "words", term.weight) for term in query.terms)
        has_pictures = not all(is_words for is_words, _ in shape)

        def draw() -> Vectors | None:
            generator = np.random.default_rng(0)
            texts = (
                self.text_rows()
                if any(is_words for is_words, _ in shape)
                else np.empty((_DRAWN, 0))
            )
            ids = np.sort(self.store.ids(limit=_DRAWN * has_pictures, order="chance"))
            drawn = self.vectors(np.random.default_rng(0).permutation(ids))
            pictures = drawn[np.isfinite(drawn).all(1)]
            if has_pictures and len(pictures) < _MIN_PICTURES:
                return None
            total, largest = np.zeros(1), max(abs(weight) for _, weight in shape)
            for place, (is_words, weight) in enumerate(shape):
                pool = texts if is_words else pictures
                alone = place == 0 and is_words
                rows = (
                    np.arange(len(texts))
                    if alone
                    else generator.integers(len(pool), size=len(texts))
                )
                total = total + weight / largest * pool[rows]
            lengths = np.linalg.norm(total, axis=1)
            kept = lengths > 1e-6
            return np.asarray(total[kept] / lengths[kept, None], np.float32)

        return self.memo.of(
            ("unrelated", self.model, shape, has_pictures and self.store.revision()),
            draw,
        )


def margins(scores: Vectors, pictures: Vectors, others: Vectors) -> Vectors:
    """How many standard deviations scores, (n,) or (n, C), lie above those of (B, D)
    unrelated queries.
    """
    reached = pictures @ others.T
    mean, deviation = reached.mean(1), np.maximum(reached.std(1), _MIN_DEVIATION)
    return np.asarray(((scores.T - mean) / deviation).T, np.float32)


def search(
    view: View,
    query: AnyQuery,
    top: int,
    cutoff: Cutoff = None,
    row: Vector | None = None,
) -> Results:
    """The nearest pictures whose margin reaches the cutoff."""
    if top < 1:
        raise InputError(f"top is {top}; at least one hit is needed")
    terms = None if isinstance(query, np.ndarray) else Query.of(query)
    row = view.row(query, row)
    unrelated = view.unrelated_rows(terms) if terms else None
    if cutoff == "auto":
        cutoff = default_cutoff(terms)
    queried = []
    if terms is not None:
        queried = [term.what for term in terms.terms if isinstance(term.what, int)]
    n_candidates = top
    if unrelated is not None and cutoff is not None:
        n_candidates = max(top, LOOKED_AT)
    neighbours = view.store.nearest(
        view.model.name, row, n_candidates + len(queried), view.where
    )
    is_other = ~np.isin(neighbours.ids, queried)
    ids = neighbours.ids[is_other][:n_candidates]
    scores = neighbours.scores[is_other][:n_candidates]
    above = np.full(len(ids), np.nan, np.float32)
    if unrelated is not None and len(ids):
        above = margins(scores, view.vectors(ids), unrelated)
    # refused where the model's name stands for other weights by now
    view.models.model(view.model)
    fits = np.ones(len(ids), bool)
    if cutoff is not None and unrelated is not None:
        fits = above >= cutoff
    hits = _hits(view, ids[fits][:top], scores[fits], above[fits])
    return Results(hits, neighbours.searched, int((~fits[:top]).sum()), view.model.name)


def default_cutoff(query: Query | None) -> float:
    """The cutoff of a query's kind; scores of pictures spread more."""
    has_words = query is not None and any(term.kind == "words" for term in query.terms)
    return CUTOFF if has_words else PICTURE_CUTOFF


def _hits(view: View, ids: Ids, scores: Vectors, above: Vectors) -> tuple[Hit, ...]:
    """Hits in the order of the ids, without pictures that were removed meanwhile."""
    items = view.items(ids)
    hits = []
    for id_, score, margin in zip(
        ids.tolist(), scores.tolist(), above.tolist(), strict=False
    ):
        if id_ in items:
            hits.append(Hit(items[id_], score, None if math.isnan(margin) else margin))
    return tuple(hits)


def export(view: View, path: Path) -> int:
    """Writes a Parquet table of the pictures, the same for the same rows."""
    import pyarrow as pa
    from pyarrow import parquet

    model = view.model
    types = {"id": pa.int64()} | dict.fromkeys(
        ("path", "source", "caption", "date"), pa.string()
    )
    types |= {"width": pa.int32(), "height": pa.int32(), "bytes": pa.int64()}
    fields = list(types)
    types |= {"vector": pa.list_(pa.float32(), model.dim)}
    held: dict[str, set[type]] = defaultdict(set)
    for name, value in (
        pair
        for items, _ in view.blocks()
        for item in items
        for pair in item.columns.items()
    ):
        held[name].add(type(value))
    converts = {}
    for name in sorted(held):
        title = name
        while title in types:
            title = f"column_{title}"
        kind = next(
            kind for kind, (types_of, _) in _TYPES.items() if held[name] <= types_of
        )
        types[title], converts[title] = pa.type_for_alias(kind), (name, _TYPES[kind][1])
    schema = pa.schema(types).with_metadata(
        {"model": model.name, "fingerprint": model.fingerprint}
    )
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        with parquet.ParquetWriter(Path(folder) / "table", schema) as writer:
            for items, rows in view.blocks():
                table: dict[str, Any] = {
                    name: [getattr(item, name) for item in items] for name in fields
                }
                for title, (name, convert) in converts.items():
                    values = (item.columns.get(name) for item in items)
                    table[title] = [
                        None if value is None else convert(value) for value in values
                    ]
                table["vector"] = pa.FixedSizeListArray.from_arrays(
                    pa.array(rows.reshape(-1)), model.dim
                )
                writer.write_table(pa.Table.from_pydict(table, schema=schema))
                count += len(items)
        view.check_some(count)
        (Path(folder) / "table").replace(path)
    return count
