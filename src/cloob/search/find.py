"""Searches: the nearest pictures above a cutoff, and what a Hopfield memory of the pictures retrieves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cloob.errors import InputError
from cloob.search.query import AnyQuery, Query, Vector
from cloob.search.records import By, Hit, Item, Results, places, words
from cloob.search.view import CUTOFF, PICTURE_CUTOFF, View, margins

Cutoff = float | Literal["auto"] | None

LOOKED_AT = 200  # nearest pictures that the cutoff looks at, at least: the nearest of all need not be the one that fits
DEFAULT_BETA = 8.0  # the paper's, where the model does not say with which it was trained
_K = 60  # of reciprocal rank fusion, as in Cormack, Clarke and Büttcher, 2009
MEMORY = 100_000  # pictures of a Hopfield memory at most: the nearest ones of a larger collection


def search(
    view: View, query: AnyQuery, top: int, cutoff: Cutoff = None, row: Vector | None = None, by: By = "both"
) -> Results:
    if top < 1:
        raise InputError(f"top is {top}; at least one hit is needed")
    of_terms = None if isinstance(query, np.ndarray) else Query.of(query)
    spoken = words(of_terms.spoken) if of_terms and by != "meaning" else []
    by_words = view.store.find_words(spoken, max(top, LOOKED_AT), view.where) if spoken else {}
    if by == "words":
        if not spoken:
            raise InputError("by words only words are searched; no pictures, and none to subtract")
        items = view.items([*by_words][:top]).values()
        hits = [Hit(item, math.nan, words=places(item, spoken)) for item in items]
        return Results(tuple(hits), view.store.count(view.where), 0, view.model.name)
    row = view.row(query, row)
    terms = of_terms.terms if of_terms else ()
    queried = [term.what for term in terms if term.kind == "item"]
    others = view.unrelated_rows(of_terms) if of_terms else None
    if cutoff == "auto":
        cutoff = CUTOFF if any(term.kind == "words" for term in terms) else PICTURE_CUTOFF
    looked = top if others is None or cutoff is None else max(top, LOOKED_AT)
    near = view.store.nearest(view.model.name, row, looked + len(queried), view.where)
    scores = dict(zip(near.ids.tolist(), near.scores.tolist(), strict=True))
    ids = [id_ for id_ in scores if id_ not in queried][:looked]
    more = [id_ for id_ in by_words if id_ not in ids]  # by their words alone
    rows = view.vectors([*ids, *more] if others is not None else more)
    scores |= zip(more, (rows[-len(more) :].astype(np.float64) * row).sum(1).tolist() if more else (), strict=True)
    above: dict[int, float | None] = dict.fromkeys([*ids, *more])
    if others is not None and above:
        of_all = np.array([scores[id_] for id_ in above], np.float32)
        above = dict(zip(above, margins(of_all, rows, others).tolist(), strict=True))
    view.models.model(view.model)  # refused where its name stands for other weights by now
    kept = [id_ for id_ in ids if cutoff is None or (margin := above[id_]) is None or margin >= cutoff]
    cut = min(top, len(ids)) - len({*kept}.intersection(ids[:top]))
    fused: dict[int, float] = {}
    for ranks in (by_words, {id_: rank for rank, id_ in enumerate(kept, 1)}):
        for id_, rank in ranks.items():
            fused[id_] = fused.get(id_, 0.0) + 1 / (_K + rank)
    order = [id_ for id_ in sorted(fused, key=lambda id_: -fused[id_]) if math.isfinite(scores[id_])]
    result = [
        Hit(item, scores[id_], above[id_], places(item, spoken) if id_ in by_words else ())
        for id_, item in view.items(order[:top]).items()
    ]
    return Results(tuple(result), near.searched, cut, view.model.name)


@dataclass(frozen=True)
class Associated:
    item: Item
    weight: float  # of the softmax; over the memory they add up to 1
    score: float  # cosine with the query


@dataclass(frozen=True)
class Retrieved:
    beta: float
    memory: int  # M, the number of stored patterns
    collection: int  # pictures that match; more than M if only the nearest were taken
    pictures: tuple[Associated, ...]  # those of largest weight, largest first
    effective: float  # how many pictures take part: e to the entropy of the weights, in [1, M]
    agreement: float  # cosine of the query with what it retrieves
    nearest: tuple[Hit, ...]  # to what was retrieved
    model: str


def explain(view: View, query: AnyQuery, beta: float | None, top: int, row: Vector | None) -> Retrieved:
    """The pictures are the stored patterns X, the query is the state q of a modern Hopfield network.

    One update (Eq. 4 of arXiv:2110.11316) gives ``norm(Xᵀ softmax(β X q))``: an average of the pictures, weighted by
    the softmax. A small β averages over the full collection, a large one returns the nearest picture. Against M
    pictures it has to be compared with ln M.
    """
    import torch

    from cloob.functional import hopfield_retrieval

    row = view.row(query, row)
    if beta is None:
        config = getattr(view.models.encoder(view.model), "objective_config", {})
        beta = float(config.get("beta") or DEFAULT_BETA) if config.get("hopfield") else DEFAULT_BETA
    near = view.store.nearest(view.model.name, row, MEMORY, view.where)
    vectors = view.vectors(near.ids)
    known = np.isfinite(vectors).all(1)  # others were removed meanwhile
    ids, scores = near.ids[known], near.scores[known]
    view.check_some(len(ids))
    memory, state = torch.from_numpy(vectors[known]), torch.from_numpy(np.ascontiguousarray(row))
    pattern = hopfield_retrieval(state[None], memory, beta)[0].numpy()
    weights = (beta * (memory @ state).double()).softmax(0).numpy()
    effective = math.exp(-float((weights * np.log(np.maximum(weights, 1e-300))).sum()))
    best = np.argsort(-weights, kind="stable")[:top]
    items = view.items(ids[best])
    pictures = tuple(
        Associated(items[int(ids[place])], float(weights[place]), float(scores[place]))
        for place in best
        if int(ids[place]) in items
    )
    after = search(view, pattern, top)
    agreement = float(pattern @ row)
    return Retrieved(beta, len(ids), near.searched, pictures, effective, agreement, after.hits, view.model.name)
