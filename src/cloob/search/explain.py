"""What a query retrieves from the pictures as a modern Hopfield memory (Eq. 4 of arXiv:2110.11316).

The pictures are the stored patterns X, the query is the state q. One update gives ``norm(Xᵀ softmax(β X q))``: an
average of the pictures, weighted by the softmax. A small β averages over the whole collection, a large one returns the
nearest picture. Against M pictures it has to be compared with ln M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from cloob.functional import hopfield_retrieval
from cloob.search.find import View, search
from cloob.search.query import AnyQuery, Vector
from cloob.search.records import Hit, Item

DEFAULT_BETA = 8.0  # the paper's, where the model does not say with which it was trained
MEMORY = 100_000  # pictures of a memory at most: the nearest ones of a larger collection


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
    row = view.row(query, row)
    if beta is None:
        config = getattr(view.index.encoder(view.model), "objective_config", {})
        beta = float(config.get("beta") or DEFAULT_BETA) if config.get("hopfield") else DEFAULT_BETA
    near = view.index.store.nearest(view.model.name, row, MEMORY, view.where)
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
