"""Searches: the nearest pictures above a cutoff, look-alikes, and what a Hopfield memory of the pictures retrieves."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cloob.search import background
from cloob.search.query import AnyQuery, Query, Vector
from cloob.search.records import Hit, Item, Results
from cloob.search.store import Vectors
from cloob.search.view import View

Cutoff = float | Literal["auto"] | None

DUPLICATE = 0.97  # cosine from which two pictures look alike
LOOKED_AT = 200  # nearest pictures that the cutoff looks at, at least: the nearest of all need not be the one that fits
DEFAULT_BETA = 8.0  # the paper's, where the model does not say with which it was trained
MEMORY = 100_000  # pictures of a Hopfield memory at most: the nearest ones of a larger collection
_BLOCK = 256  # pictures that are compared at once


def search(view: View, query: AnyQuery, top: int, cutoff: Cutoff = None, row: Vector | None = None) -> Results:
    row = view.row(query, row)
    own: list[object] = []
    others = least = None
    if not isinstance(query, np.ndarray):
        query = Query.of(query)
        own = [term.what for term in query.terms if term.kind == "item"]
        others = view.unrelated_rows(query)
        words = any(term.kind == "words" for term in query.terms)
        default = background.CUTOFF if words else background.PICTURE_CUTOFF
        least = default if cutoff == "auto" else cutoff
    looked = top if others is None or least is None else max(top, LOOKED_AT)
    near = view.store.nearest(view.model.name, row, looked + len(own), view.where)
    places = [place for place, id_ in enumerate(near.ids.tolist()) if id_ not in own][:looked]
    ids, scores = near.ids[places], near.scores[places]
    margins: list[float | None] = [None] * len(ids)
    if others is not None and len(ids):
        margins = background.margins(scores, view.vectors(ids), others).tolist()
    view.models.model(view.model)  # refused where its name stands for other weights by now
    kept = [place for place, margin in enumerate(margins) if least is None or margin is None or margin >= least]
    cut = min(top, len(ids)) - sum(place < top for place in kept)
    items = view.items(ids[kept[:top]])
    shown = [place for place in kept[:top] if int(ids[place]) in items]
    hits = [Hit(items[int(ids[place])], float(scores[place]), margins[place]) for place in shown]
    return Results(tuple(hits), near.searched, cut, view.model.name)


def duplicates(view: View, threshold: float, *, exact: bool) -> list[tuple[Hit, ...]]:
    items = (item for ids in view.store.pages(view.where) for item in view.store.items(ids))
    facts = ((-item.width * item.height, -item.bytes, item.date or "~", item.id, item.content) for item in items)
    copies: dict[str, list[int]] = {}  # by content, best first; and so are the copies of each
    for *_, id_, content in sorted(facts):
        copies.setdefault(content, []).append(id_)
    classes = list(copies.values())
    alike = [[(place, 1.0)] for place in range(len(classes))]
    if not exact:
        alike = _look_alikes(view.vectors([ids[0] for ids in classes]), threshold)
        view.models.model(view.model)  # refused where its name stands for other weights by now
    scores = [{id_: score for place, score in group for id_ in classes[place]} for group in alike]
    scores = [group for group in scores if len(group) > 1]
    found = view.items([id_ for group in scores for id_ in group])
    files = ((group, _files([found[id_] for id_ in group if id_ in found])) for group in scores)
    groups = [tuple(Hit(item, group[item.id]) for item in some) for group, some in files if len(some) > 1]
    return sorted(groups, key=lambda group: -len(group))


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
    the softmax. A small β averages over the whole collection, a large one returns the nearest picture. Against M
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
