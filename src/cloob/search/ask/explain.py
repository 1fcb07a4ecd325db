"""What a query retrieves from the collection as a modern Hopfield memory (Eq. 4 of arXiv:2110.11316).

The pictures are the stored patterns X, the query is the state q. One update gives ``norm(Xᵀ softmax(β X q))``: an
average of the pictures, in which each takes part with its softmax weight. β decides how many: a small one averages over
the whole collection, a large one returns the nearest picture. Against M pictures it has to be seen beside ln M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cloob.errors import InputError
from cloob.functional import hopfield_retrieval
from cloob.search.ask.query import Vector
from cloob.search.records import Hit, Item

DEFAULT_BETA = 8.0
"""β where the model does not say with which it was trained: the paper's."""

MEMORY = 100_000
"""Pictures of a memory at most: the nearest ones of a larger collection."""


@dataclass(frozen=True)
class Associated:
    """A picture that takes part in what is retrieved.

    Attributes:
        item: The picture.
        weight: Its softmax weight, in [0, 1]; over the whole memory they add up to 1.
        score: Its cosine with the query.
    """

    item: Item
    weight: float
    score: float


@dataclass(frozen=True)
class Retrieved:
    """What a query retrieves.

    Attributes:
        beta: β.
        memory: M, the pictures that were the stored patterns.
        collection: Pictures that there are; more than ``memory`` where only the nearest were taken.
        pictures: The associated pictures of largest weight, largest first.
        effective: How many pictures take part: e to the entropy of the weights, in [1, M].
        agreement: Cosine of the query with what it retrieves.
        nearest: The pictures nearest to what was retrieved, in place of those nearest to the query.
        model: The name of the model.
    """

    beta: float
    memory: int
    collection: int
    pictures: tuple[Associated, ...]
    effective: float
    agreement: float
    nearest: tuple[Hit, ...]
    model: str


@dataclass(frozen=True)
class Association:
    """Weights and pattern of one retrieval.

    Attributes:
        weights: (M,) float64 softmax weights.
        pattern: (D,) float32 unit row that is retrieved.
        effective: e to the entropy of the weights.
    """

    weights: npt.NDArray[np.float64]
    pattern: Vector
    effective: float


def associate(query: Vector, stored: npt.NDArray[np.float32], beta: float) -> Association:
    """One retrieval.

    Args:
        query: (D,) unit row.
        stored: (M, D) unit rows, M ≥ 1.
        beta: β.

    Raises:
        InputError: β is not positive and finite.
    """
    check_beta(beta)
    memory = torch.from_numpy(np.ascontiguousarray(stored))
    state = torch.from_numpy(np.ascontiguousarray(query))[None]
    pattern = hopfield_retrieval(state, memory, beta)[0].numpy()
    weights = (beta * (memory @ state[0]).double()).softmax(0)
    entropy = float(-(weights * weights.clamp_min(1e-300).log()).sum())
    return Association(weights.numpy(), pattern, math.exp(entropy))


def check_beta(beta: float) -> None:
    """Raises InputError for a β that no retrieval takes."""
    if not 0 < beta < 1e6:
        raise InputError(
            f"β is {beta:g}; above 0 and below 1,000,000 is wanted (small: an average, large: the nearest)"
        )


def beta_of(encoder: object) -> tuple[float, bool]:
    """The β that a model was trained with, and whether the model says it; else ``DEFAULT_BETA``."""
    config = getattr(encoder, "objective_config", {})
    beta = config.get("beta")
    if config.get("hopfield") and isinstance(beta, int | float) and 0 < beta < 1e6:
        return float(beta), True
    return DEFAULT_BETA, False
