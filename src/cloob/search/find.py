"""The pictures that fit a query best; what unrelated queries reach as well is left
out.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from cloob.errors import InputError
from cloob.search.matrix import Ids, Vectors
from cloob.search.query import AnyQuery, Query, Vector
from cloob.search.records import Hit, Results
from cloob.search.unrelated import margins, unrelated_rows
from cloob.search.view import View

CUTOFF = 3.0  # of a query with words
PICTURE_CUTOFF = 2.0  # of a query of pictures alone, whose scores spread more
# nearest pictures that the cutoff looks at, at least: the nearest of all need not be
# the one that fits
LOOKED_AT = 200

Cutoff = float | Literal["auto"] | None


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
    unrelated = unrelated_rows(view, terms) if terms else None
    if cutoff == "auto":
        cutoff = default_cutoff(terms)
    if unrelated is None:  # then no hit has a margin
        cutoff = None
    n_candidates = top if cutoff is None else max(top, LOOKED_AT)
    queried = item_terms(terms)
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
    if cutoff is not None:
        fits = above >= cutoff
    hits = _hits(view, ids[fits][:top], scores[fits], above[fits])
    return Results(hits, neighbours.searched, int((~fits[:top]).sum()), view.model.name)


def default_cutoff(query: Query | None) -> float:
    """The cutoff of a query's kind; scores of pictures spread more."""
    has_words = query is not None and any(term.kind == "words" for term in query.terms)
    return CUTOFF if has_words else PICTURE_CUTOFF


def item_terms(query: Query | None) -> list[int]:
    """The pictures of the index in a query."""
    if query is None:
        return []
    return [term.what for term in query.terms if isinstance(term.what, int)]


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
