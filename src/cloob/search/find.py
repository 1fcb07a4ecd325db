"""The pictures that fit a query best; what unrelated queries reach as well is left
out.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from cloob.errors import InputError
from cloob.search.matrix import Ids, Vectors
from cloob.search.models import LoadedModel
from cloob.search.query import AnyQuery, Query, Term, Vector, weighted_row
from cloob.search.records import Hit, Results
from cloob.search.unrelated import margins, unrelated_rows
from cloob.search.where import Filter

CUTOFF = 3.0  # of a query with words
PICTURE_CUTOFF = 2.0  # of a query of pictures alone, whose scores spread more
# nearest pictures that the cutoff looks at, at least: the nearest of all need not be
# the one that fits
LOOKED_AT = 200

Cutoff = float | Literal["auto"] | None


def search(
    index: LoadedModel,
    query: AnyQuery,
    top: int,
    where: Filter | None,
    cutoff: Cutoff,
    row: Vector | None,
) -> Results:
    """The nearest pictures whose margin reaches the cutoff."""
    if top < 1:
        raise InputError(f"top is {top}; at least one hit is needed")
    terms = None if isinstance(query, np.ndarray) else Query.of(query)
    row = query_row(index, query, row)
    unrelated = unrelated_rows(index, terms) if terms else None
    if cutoff == "auto":
        cutoff = default_cutoff(terms)
    if unrelated is None:  # then no hit has a margin
        cutoff = None
    n_candidates = top if cutoff is None else max(top, LOOKED_AT)
    queried = terms.items() if terms else []
    neighbours = index.store.nearest(row, n_candidates + len(queried), where)
    is_other = ~np.isin(neighbours.ids, queried)
    ids = neighbours.ids[is_other][:n_candidates]
    scores = neighbours.scores[is_other][:n_candidates]
    above = np.full(len(ids), np.nan, np.float32)
    if unrelated is not None and len(ids):
        above = margins(scores, index.store.vectors(ids), unrelated)
    fits = np.ones(len(ids), bool)
    if cutoff is not None:
        fits = above >= cutoff
    hits = _hits(index, ids[fits][:top], scores[fits], above[fits])
    n_cut = int((~fits[:top]).sum())
    return Results(hits, neighbours.searched, n_cut, index.model().name)


def query_row(index: LoadedModel, query: AnyQuery, row: Vector | None = None) -> Vector:
    """The unit row (D,) of a query; ``row`` if that is known."""
    model = index.model()
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
            row = weighted_row(weights, [_term_row(index, term) for term in terms])
    row = np.asarray(row, np.float32)
    length = float(np.linalg.norm(row))
    if row.shape != (model.dim,) or not 0 < length < np.inf:
        raise InputError(
            f"a query of shape {row.shape} for the model {model.name!r}; ({model.dim},)"
            " is expected, not 0"
        )
    return row / length


def _term_row(index: LoadedModel, term: Term) -> Vector:
    if not isinstance(term.what, int):
        return index.row(term)
    row: Vector = index.store.vectors([term.what])[0]
    if not np.isfinite(row).all():
        raise InputError(f"picture {term.what} is not in this index")
    return row


def default_cutoff(query: Query | None) -> float:
    """The cutoff of a query's kind; scores of pictures spread more."""
    has_words = query is not None and any(term.is_words for term in query.terms)
    return CUTOFF if has_words else PICTURE_CUTOFF


def _hits(
    index: LoadedModel, ids: Ids, scores: Vectors, above: Vectors
) -> tuple[Hit, ...]:
    """Hits in the order of the ids, without pictures that were removed meanwhile."""
    items = {item.id: item for item in index.store.items(ids)}
    hits = []
    for id_, score, margin in zip(
        ids.tolist(), scores.tolist(), above.tolist(), strict=False
    ):
        if id_ in items:
            hits.append(Hit(items[id_], score, None if math.isnan(margin) else margin))
    return tuple(hits)
