"""Scores of a pair of towers on the cached pictures, by the library's own evaluation functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.pictograms.cache import Data, Labelled, Pairs, pixels
from benchmarks.pictograms.records import pack_numbers
from torch import Tensor

from cloob.evaluation.embed import embed_texts, evaluating
from cloob.evaluation.measures.geometry import geometry
from cloob.evaluation.measures.probe import fit_probe, probe_ranks
from cloob.evaluation.measures.retrieval import RECALLS, retrieval_ranks
from cloob.evaluation.measures.zeroshot import class_embeddings, zeroshot_ranks
from cloob.functional import ranking
from cloob.models.encoder import DualEncoder

GEOMETRY_INV_TAU, GEOMETRY_BETA = 30.0, 8.0
"""One τ⁻¹ and β for all methods: the measures are to tell embeddings apart, not settings."""
_BATCH = 500


def embed_images(encoder: DualEncoder, images: np.ndarray) -> Tensor:
    """(n, D) float32 unit rows, in evaluation mode and without gradients."""
    with evaluating(encoder):
        parts = [encoder.encode_image(pixels(images[i : i + _BATCH])).cpu() for i in range(0, len(images), _BATCH)]
    return torch.cat(parts)


def score_pairs(encoder: DualEncoder, pairs: Pairs) -> dict[str, float]:
    """As ``score_rows``, of held-out pairs."""
    return score_rows(embed_images(encoder, pairs.images), embed_texts(encoder, pairs.captions), pairs.captions)


def score_rows(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Recall@k both ways, its mean, and the paper's measures of geometry, from (n, D) unit rows of n pairs."""
    scores = recalls(images, texts, captions)
    measures = geometry(images, texts, GEOMETRY_INV_TAU, GEOMETRY_BETA)
    scores |= {key: value for key, value in measures.items() if not key.startswith("spectrum") and key != "n"}
    return {key: round(value, 6) for key, value in scores.items()}


def recalls(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Recall@k both ways and ``mean_recall``, the mean of all."""
    ranks = retrieval_ranks(images, texts, captions=captions)
    scores = {f"{way}@{k}": ranking.recall_at_k(r, k) for way, r in ranks._asdict().items() for k in RECALLS}
    return scores | {"mean_recall": sum(scores.values()) / len(scores)}


def score_zeroshot(encoder: DualEncoder, sets: Mapping[str, Labelled]) -> dict[str, dict[str, Any]]:
    """As ``score_set``, by set."""
    scores = {}
    for name, data in sets.items():
        classes = class_embeddings(encoder, data.classnames, data.templates)
        scores[name] = score_set(embed_images(encoder, data.images), np.array(data.labels), classes)
    return scores


def score_set(images: Tensor, labels: np.ndarray, classes: Tensor) -> dict[str, Any]:
    """Zero-shot accuracies from unit rows; ``predictions`` packs the class that each picture is taken for."""
    right = torch.from_numpy(labels)
    ranks = zeroshot_ranks(images, right, classes)
    cosines = images.double() @ classes.double().T
    # As the ranks count a tie: against the right class.
    cosines[torch.arange(len(right)), right] -= 1e-12
    return {
        "acc1": round(ranking.topk_accuracy(ranks, 1), 6),
        "acc5": round(ranking.topk_accuracy(ranks, 5), 6),
        "mean_per_class_recall": round(ranking.mean_per_class_recall(ranks < 1, right, len(classes)), 6),
        "predictions": pack_numbers(cosines.argmax(1).numpy()),
    }


def score_probe(encoder: DualEncoder, data: Data) -> dict[str, dict[str, Any]]:
    """The library's linear probe on the embeddings of the sets that have training pictures."""
    scores = {}
    for name, train in data.probe.items():
        x, y = embed_images(encoder, train.images), torch.from_numpy(np.array(train.labels))
        probe = fit_probe(x, y, len(train.classnames))
        labels = torch.from_numpy(np.array(data.test[name].labels))
        ranks = probe_ranks(probe.weight, embed_images(encoder, data.test[name].images), labels)
        scores[name] = {"acc1": round(ranking.topk_accuracy(ranks, 1), 6), "C": probe.strength, "n": len(ranks)}
    return scores
