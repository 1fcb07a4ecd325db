"""What a query retrieves from the pictures as a modern Hopfield memory (Eq. 4 of arXiv:2110.11316).

The pictures are the stored patterns X, the query is the state q. One update gives ``norm(Xᵀ softmax(β X q))``: an
average of the pictures, weighted by the softmax. A small β averages over the whole collection, a large one returns the
nearest picture. Against M pictures it has to be compared with ln M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cloob.errors import InputError
from cloob.functional import hopfield_retrieval
from cloob.search.find import query_row, refuse_none, search
from cloob.search.query import AnyQuery, Vector
from cloob.search.records import Hit, IndexedModel, Item
from cloob.search.where import Filter

if TYPE_CHECKING:
    from cloob.search.index import Index

DEFAULT_BETA = 8.0  # the paper's, where the model does not say with which it was trained
MEMORY = 100_000  # pictures of a memory at most: the nearest ones of a larger collection


@dataclass(frozen=True)
class Associated:
    """A picture that takes part in what is retrieved."""

    item: Item
    weight: float  # of the softmax; over the memory they add up to 1
    score: float  # cosine with the query


@dataclass(frozen=True)
class Retrieved:
    """What a query retrieves."""

    beta: float
    memory: int  # M, the number of stored patterns
    collection: int  # pictures that match; more than M if only the nearest were taken
    pictures: tuple[Associated, ...]  # those of largest weight, largest first
    effective: float  # how many pictures take part: e to the entropy of the weights, in [1, M]
    agreement: float  # cosine of the query with what it retrieves
    nearest: tuple[Hit, ...]  # to what was retrieved
    model: str


def explain(
    index: Index,
    query: AnyQuery,
    beta: float | None,
    top: int,
    condition: Filter | None,
    asked: IndexedModel,
    row: Vector | None,
) -> Retrieved:
    """See :meth:`cloob.search.index.Index.explain`."""
    if beta is not None and not 0 < beta < 1e6:
        raise InputError(f"β is {beta:g}; above 0 (an average) and below 1,000,000 (the nearest) is wanted")
    row = query_row(index, query, asked, row)
    if beta is None:
        config = getattr(index.encoder(asked), "objective_config", {})
        beta = float(config.get("beta") or DEFAULT_BETA) if config.get("hopfield") else DEFAULT_BETA
    near = index.store.nearest(asked.name, row, MEMORY, condition)
    vectors = index.store.vectors(asked.name, near.ids.tolist())
    known = np.isfinite(vectors).all(1)  # others were removed meanwhile
    ids, scores = near.ids[known], near.scores[known]
    refuse_none(index, asked, condition, len(ids))
    memory, state = torch.from_numpy(vectors[known]), torch.from_numpy(np.ascontiguousarray(row))
    pattern = hopfield_retrieval(state[None], memory, beta)[0].numpy()
    weights = (beta * (memory @ state).double()).softmax(0).numpy()
    effective = math.exp(-float((weights * np.log(np.maximum(weights, 1e-300))).sum()))
    best = np.argsort(-weights, kind="stable")[:top]
    items = {item.id: item for item in index.store.items(ids[best].tolist())}
    pictures = tuple(
        Associated(items[int(ids[place])], float(weights[place]), float(scores[place]))
        for place in best
        if int(ids[place]) in items
    )
    after = search(index, pattern, top, condition, asked)
    agreement = float(pattern @ row)
    return Retrieved(beta, len(ids), near.searched, pictures, effective, agreement, after.hits, asked.name)
