"""What runs on pictures share: the objective of a setting, and scores from unit
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.studies.cells import Setting
from benchmarks.studies.records import pack_numbers
from torch import Tensor

from cloob.evaluation.measures import (
    RECALLS,
    geometry,
    retrieval_ranks,
    zeroshot_ranks,
)
from cloob.functional import ranking
from cloob.objective import ContrastiveObjective, make_objective

GEOMETRY_INV_TAU = 30.0
GEOMETRY_BETA = 8.0
"""One τ⁻¹ and β for all methods: the measures are to tell embeddings apart, not
settings.
"""


def build_objective(method: str, setting: Setting) -> ContrastiveObjective:
    overrides: dict[str, Any] = {
        "inv_tau": setting.inv_tau,
        "learnable_inv_tau": setting.learnable_inv_tau,
    }
    if setting.beta is not None:
        overrides["beta"] = setting.beta
    return make_objective(method.removesuffix("-warm"), **overrides)


def retrieves(setting: Setting, progress: float) -> bool | None:
    """Whether a step retrieves at a ``progress`` in [0, 1]; None leaves it to the
    objective.
    """
    return False if setting.option == "warm" and progress < 0.5 else None


def recalls(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Recall@k both ways and ``mean_recall``, the mean of all."""
    scores = {}
    ranks = retrieval_ranks(images, texts, captions=captions)
    for way, of_way in ranks._asdict().items():
        for k in RECALLS:
            scores[f"{way}@{k}"] = ranking.topk_accuracy(of_way, k)
    return scores | {"mean_recall": sum(scores.values()) / len(scores)}


def score_rows(
    images: Tensor, texts: Tensor, captions: Sequence[str]
) -> dict[str, float]:
    """Recalls and the paper's measures of geometry, from (n, D) unit rows of n
    pairs.
    """
    scores = recalls(images, texts, captions)
    measures = geometry(images, texts, GEOMETRY_INV_TAU, GEOMETRY_BETA)
    for key, value in measures.items():
        if not key.startswith("spectrum") and key != "n":
            scores[key] = value
    return {key: round(value, 6) for key, value in scores.items()}


def score_set(images: Tensor, labels: np.ndarray, classes: Tensor) -> dict[str, Any]:
    """Zero-shot accuracies from unit rows; ``predictions`` packs the class that each
    picture is taken for.
    """
    right = torch.from_numpy(labels)
    ranks = zeroshot_ranks(images, right, classes)
    by_class = ranking.per_class_recall(ranks < 1, right, len(classes))
    cosines = images.double() @ classes.double().T
    # As the ranks count a tie: against the right class.
    cosines[torch.arange(len(right)), right] -= 1e-12
    return {
        "acc1": round(ranking.topk_accuracy(ranks, 1), 6),
        "acc5": round(ranking.topk_accuracy(ranks, 5), 6),
        "mean_per_class_recall": round(float(by_class.nanmean()), 6),
        "predictions": pack_numbers(cosines.argmax(1).numpy()),
    }
