"""The pictures that fit a query best; what unrelated queries reach as well is left
out.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from cloob.errors import InputError
from cloob.search.matrix import Ids, Vectors
from cloob.search.models import IndexWithModel
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
    index: IndexWithModel,
    any_query: AnyQuery,
    top: int,
    where: Filter | None,
    cutoff: Cutoff,
) -> Results:
    """The nearest pictures whose margin reaches the cutoff."""
    if top < 1:
        raise InputError(f"top is {top}; at least one hit is needed")
    query = Query.of(any_query)
    row = query_row(index, query)
    unrelated = unrelated_rows(index, query)
    if unrelated is None:  # then no hit has a margin
        cutoff = None
    elif cutoff == "auto":
        cutoff = default_cutoff(query)
    n_candidates = top if cutoff is None else max(top, LOOKED_AT)
    queried_ids = query.items()
    neighbours = index.store.nearest(row, n_candidates + len(queried_ids), where)
    is_other = ~np.isin(neighbours.ids, queried_ids)
    ids = neighbours.ids[is_other][:n_candidates]
    scores = neighbours.scores[is_other][:n_candidates]
    hit_margins = np.full(len(ids), np.nan, np.float32)
    if unrelated is not None:
        hit_margins = margins(scores, index.store.vectors(ids), unrelated)
    fits = np.ones(len(ids), bool) if cutoff is None else hit_margins >= cutoff
    best = np.flatnonzero(fits)[:top]
    hits = _hits(index, ids[best], scores[best], hit_margins[best])
    n_cut = int((~fits[:top]).sum())
    return Results(hits, neighbours.searched, n_cut, index.model().name)


def query_row(index: IndexWithModel, query: Query) -> Vector:
    """The unit row (D,) of a query."""
    terms = [term for term in query.terms if term.weight]
    if not terms:
        raise InputError(
            "an empty query; give words or a picture a weight other than 0"
        )
    rows = [_term_row(index, term) for term in terms]
    return weighted_row([term.weight for term in terms], rows)


def _term_row(index: IndexWithModel, term: Term) -> Vector:
    """The unit row (D,) of a part of a query."""
    if isinstance(term.what, int):
        row: Vector = index.store.vectors([term.what])[0]
        if not np.isfinite(row).all():
            raise InputError(f"picture {term.what} is not in this index")
        return row
    if isinstance(term.what, np.ndarray):
        row = np.asarray(term.what, np.float32)
    else:
        row = index.embed_term(term)
    model = index.model()
    length = float(np.linalg.norm(row))
    if row.shape != (model.dim,) or not 0 < length < np.inf:
        raise InputError(
            f"a query of shape {row.shape} for the model {model.name!r}; ({model.dim},)"
            " is expected, not 0"
        )
    return row / length


def default_cutoff(query: Query) -> float:
    """The cutoff of a query's kind; scores of pictures spread more."""
    has_words = any(term.is_words for term in query.terms)
    return CUTOFF if has_words else PICTURE_CUTOFF


def _hits(
    index: IndexWithModel, ids: Ids, scores: Vectors, hit_margins: Vectors
) -> tuple[Hit, ...]:
    """Hits in the order of the ids, without pictures that were removed meanwhile."""
    items = {item.id: item for item in index.store.items(ids)}
    answers = zip(ids.tolist(), scores.tolist(), hit_margins.tolist(), strict=True)
    return tuple(
        Hit(items[id_], score, None if math.isnan(margin) else margin)
        for id_, score, margin in answers
        if id_ in items
    )
