"""Searches: the nearest pictures above a cutoff, more like a picture, and look-alikes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from cloob.errors import InputError
from cloob.search import background
from cloob.search.query import AnyQuery, Query, Vector, embed_query
from cloob.search.records import Hit, IndexedModel, Item, Results
from cloob.search.store import Ids, Store, Vectors
from cloob.search.where import Filter, parse

if TYPE_CHECKING:
    from cloob.search.index import Index

Cutoff = float | Literal["auto"] | None
Where = str | Filter | None

DUPLICATE = 0.97  # cosine from which two pictures look alike

LOOKED_AT = 200
"""Nearest pictures that the cutoff looks at, at least: the nearest of all need not be the one that fits."""

_BLOCK = 256  # pictures that are compared at once
_PAGE = 4096  # ids of a statement


def search(
    index: Index,
    query: AnyQuery,
    top: int,
    condition: Filter | None,
    asked: IndexedModel,
    cutoff: Cutoff = None,
    row: Vector | None = None,
) -> Results:
    """See :meth:`cloob.search.index.Index.search`."""
    row = query_row(index, query, asked, row)
    own: list[object] = []
    others = least = None
    if not isinstance(query, np.ndarray):
        query = Query.of(query)
        own = [term.what for term in query.terms if term.kind == "item"]
        others = unrelated_rows(index, query, asked)
        least = background.default_cutoff(query) if cutoff == "auto" else cutoff
    looked = top if others is None or least is None else max(top, LOOKED_AT)
    near = index.store.nearest(asked.name, row, looked + len(own), condition)
    places = [place for place, id_ in enumerate(near.ids.tolist()) if id_ not in own][:looked]
    ids, scores = near.ids[places], near.scores[places]
    margins: list[float | None] = [None] * len(ids)
    if others is not None and len(ids):
        margins = background.margins(scores, index.store.vectors(asked.name, ids.tolist()), others).tolist()
    index.model(asked)  # the store looks vectors up by name: none of these are of other weights
    kept = [place for place, margin in enumerate(margins) if least is None or margin is None or margin >= least]
    cut = min(top, len(ids)) - sum(place < top for place in kept)
    items = {item.id: item for item in index.store.items(ids[kept[:top]].tolist())}  # others were removed meanwhile
    shown = [place for place in kept[:top] if int(ids[place]) in items]
    hits = [Hit(items[int(ids[place])], float(scores[place]), margins[place]) for place in shown]
    return Results(tuple(hits), near.searched, cut, asked.name)


def read_filter(index: Index, where: Where) -> Filter | None:
    """A filter of text, or as it is."""
    return parse(where, index.columns()) if isinstance(where, str) else where


def refuse_none(index: Index, asked: IndexedModel, condition: Filter | None, found: int) -> None:
    """Raises InputError where no picture was found to work on."""
    if not found:
        raise InputError(f"no picture: {why_none(index.store, asked.name, condition)}")


def why_none(store: Store, model: str, condition: Filter | None) -> str:
    """Why there is no picture to choose from."""
    if not store.count():
        return "the index is empty"
    if not store.count(condition):
        return "the filter lets none through"
    return f"none has a vector of {model}; cloob index --name {model} --out {store.address} makes them"


def query_row(index: Index, query: AnyQuery, asked: IndexedModel, row: Vector | None = None) -> Vector:
    """The unit row (D,) of a query by a model of the index; ``row`` if it is known."""
    if row is None and not isinstance(query, np.ndarray):
        row = embed_query(Query.of(query), lambda: index.embedder(asked), lambda id_: _item_row(index, id_, asked))
    row = np.asarray(query if row is None else row, np.float32)
    length = float(np.linalg.norm(row))
    if row.shape != (asked.dim,) or not 0 < length < np.inf:
        raise InputError(f"a query of shape {row.shape} for the model {asked.name!r}; ({asked.dim},) is wanted, not 0")
    return row / length


def _item_row(index: Index, id_: int, asked: IndexedModel) -> Vector:
    row: Vector = index.store.vectors(asked.name, [id_])[0]
    if not np.isfinite(row).all():
        known = bool(index.store.items([id_]))
        why = f"has no vector of the model {asked.name!r}" if known else "is not in this index"
        raise InputError(f"picture {id_} {why}")
    return row


def text_rows(index: Index, asked: IndexedModel) -> Vectors:
    """(B, D) of the background's texts by a model of the index."""
    return background.background_rows(lambda: index.embedder(asked), asked.fingerprint)


def unrelated_rows(index: Index, query: Query, asked: IndexedModel) -> Vectors | None:
    """(B, D) unrelated queries of the query's shape; None where there is nothing to draw them from."""
    shape = tuple((term.kind == "words", term.weight) for term in query.terms)
    words, shown = (any(is_words is wanted for is_words, _ in shape) for wanted in (True, False))

    def draw() -> Vectors | None:
        # Without words the number of rows matters alone.
        texts = text_rows(index, asked) if words else np.zeros((background.DRAWN, asked.dim), np.float32)
        pictures = np.empty((0, asked.dim), np.float32)
        if shown:
            drawn = np.random.default_rng(0).permutation(index.store.sample(background.DRAWN))
            pictures = index.store.vectors(asked.name, drawn.tolist())
        return background.unrelated(query, texts, pictures[np.isfinite(pictures).all(1)])

    revision = index.revision() if shown else None
    return index.memoize(("unrelated", asked.name, asked.fingerprint, revision, shape), draw)


def pages(store: Store, condition: Filter | None) -> Iterator[list[int]]:
    """The ids of all pictures that match, some thousands at a time."""
    last = 0
    while len(ids := store.ids(condition, after=last, limit=_PAGE)):
        last = int(ids[-1])
        yield ids.tolist()


def rows_in_blocks(index: Index, asked: IndexedModel, condition: Filter | None) -> Iterator[tuple[Ids, Vectors]]:
    """Ids and vectors of all pictures that match and have one, some thousands at a time."""
    for ids in pages(index.store, condition):
        rows = index.store.vectors(asked.name, ids)
        known = np.isfinite(rows).all(1)
        if known.any():
            yield np.array(ids)[known], rows[known]


def duplicates(
    index: Index, threshold: float, condition: Filter | None, model: str | None, *, exact: bool
) -> list[tuple[Hit, ...]]:
    """See :meth:`cloob.search.index.Index.duplicates`."""
    copies: dict[str, list[int]] = {}  # by content, best first; and so are the copies of each
    for *_, id_, content in sorted(_ranked(index.store, condition)):
        copies.setdefault(content, []).append(id_)
    classes = list(copies.values())
    alike = [[(place, 1.0)] for place in range(len(classes))]
    if not exact:
        asked = index.model(model)
        alike = _look_alikes(index.store.vectors(asked.name, [ids[0] for ids in classes]), threshold)
        index.model(asked)  # as in `search`
    scores = [{id_: score for place, score in group for id_ in classes[place]} for group in alike]
    scores = [group for group in scores if len(group) > 1]
    items = {item.id: item for item in index.store.items([id_ for group in scores for id_ in group])}
    files = ((group, _files([items[id_] for id_ in group if id_ in items])) for group in scores)
    groups = [tuple(Hit(item, group[item.id]) for item in some) for group, some in files if len(some) > 1]
    return sorted(groups, key=lambda group: -len(group))


def _ranked(store: Store, condition: Filter | None) -> Iterator[tuple[int, int, str, int, str]]:
    """What orders pictures from best to worst: pixels, bytes, date, number; and the content."""
    for ids in pages(store, condition):
        for item in store.items(ids):
            yield -item.width * item.height, -item.bytes, item.date or "~", item.id, item.content


def _look_alikes(rows: Vectors, threshold: float) -> list[list[tuple[int, float]]]:
    """A partition of unit rows into groups without a pair below the threshold: places, cosines with the first.

    The first row that is in no group yet takes the rows near to it, nearest first, that are near to all of its group.
    """
    rows = np.nan_to_num(rows)  # without a vector: near to none
    least = threshold - 1e-5  # a cosine of equal rows may be a rounding below 1
    free, groups = np.ones(len(rows), bool), []
    for start in range(0, len(rows), _BLOCK):
        scores = rows[start : start + _BLOCK] @ rows[start:].T
        for first, row in enumerate(scores, start):
            if not free[first]:
                continue
            free[first], group = False, [(first, 1.0)]
            near = np.flatnonzero((row >= least) & free[start:])
            near = near[np.argsort(-row[near], kind="stable")]
            while len(near):
                place = start + int(near[0])
                group.append((place, float(row[near[0]])))
                free[place] = False
                near = near[1:][rows[start + near[1:]] @ rows[place] >= least]
            groups.append(sorted(group))
    return groups


def _files(items: Sequence[Item]) -> list[Item]:
    """Each file once, by the name that is no link if there is one."""
    files: dict[str, Item] = {}
    for item in items:
        path = os.path.realpath(item.path)
        if path not in files or path == item.path:
            files[path] = item
    return list(files.values())
