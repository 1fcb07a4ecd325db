"""Scores of a pair of towers on the cached pictures, by the library's own evaluation functions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from benchmarks.pictograms.cache import Data, Labelled, Pairs, pixels
from benchmarks.pictograms.records import pack
from torch import Tensor

from cloob.evaluate.embed import embed_texts, evaluating
from cloob.evaluate.geometry import geometry
from cloob.evaluate.retrieval import RECALLS, retrieval_ranks
from cloob.evaluate.zeroshot import class_embeddings, zeroshot_ranks
from cloob.functional import ranking
from cloob.models.encoder import DualEncoder

GEOMETRY_INV_TAU, GEOMETRY_BETA = 30.0, 8.0
"""One τ⁻¹ and β for all methods: the measures are to tell embeddings apart, not settings."""
PROBE_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
_BATCH = 500


def embed_images(encoder: DualEncoder, images: np.ndarray) -> Tensor:
    """(n, D) float32 unit rows, in evaluation mode and without gradients."""
    with evaluating(encoder):
        parts = [encoder.encode_image(pixels(images[i : i + _BATCH])).cpu() for i in range(0, len(images), _BATCH)]
    return torch.cat(parts)


def score_pairs(encoder: DualEncoder, pairs: Pairs) -> dict[str, float]:
    """Recall@k both ways, its mean, and the paper's measures of geometry, on held-out pairs."""
    images = embed_images(encoder, pairs.images)
    texts = embed_texts(encoder, pairs.captions)
    ranks = retrieval_ranks(images, texts, captions=pairs.captions)
    scores = {f"{way}@{k}": ranking.recall_at_k(r, k) for way, r in ranks._asdict().items() for k in RECALLS}
    scores["mean_recall"] = sum(scores.values()) / len(scores)
    measures = geometry(images, texts, GEOMETRY_INV_TAU, GEOMETRY_BETA)
    scores |= {key: value for key, value in measures.items() if not key.startswith("spectrum") and key != "n"}
    return {key: round(value, 6) for key, value in scores.items()}


def score_zeroshot(encoder: DualEncoder, sets: Mapping[str, Labelled]) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracies by set; ``hits`` packs whether each picture is right, for paired intervals."""
    scores = {}
    for name, data in sets.items():
        classes = class_embeddings(encoder, data.classnames, data.templates)
        labels = torch.from_numpy(np.array(data.labels))
        ranks = zeroshot_ranks(embed_images(encoder, data.images), labels, classes)
        recall = ranking.mean_per_class_recall(ranks < 1, labels, len(classes))
        scores[name] = {
            "acc1": round(ranking.topk_accuracy(ranks, 1), 6),
            "acc5": round(ranking.topk_accuracy(ranks, 5), 6),
            "mean_per_class_recall": round(recall, 6),
            "n": len(ranks),
            "n_classes": len(classes),
            "hits": pack((ranks < 1).numpy()),
        }
    return scores


def score_probe(encoder: DualEncoder, data: Data) -> dict[str, dict[str, Any]]:
    """Linear probe: logistic regression on the embeddings of the sets that have training pictures.

    The strength is chosen on a fifth of the training pictures, then fitted to all of them.
    """
    scores = {}
    for name, train in data.probe.items():
        x = embed_images(encoder, train.images).numpy()
        y = np.array(train.labels)
        test = embed_images(encoder, data.test[name].images).numpy()
        held = np.random.default_rng(0).permutation(len(x)) % 5 == 0
        tried = {c: _fit(x[~held], y[~held], c).score(x[held], y[held]) for c in PROBE_STRENGTHS}
        best = max(tried, key=lambda c: tried[c])
        hits = _fit(x, y, best).predict(test) == data.test[name].labels
        scores[name] = {"acc1": round(float(hits.mean()), 6), "C": best, "n": len(hits), "hits": pack(hits)}
    return scores


def _fit(x: np.ndarray, y: np.ndarray, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weak regularisation may not converge in 300 iterations; it scores anyway
        return LogisticRegression(C=strength, max_iter=300).fit(x, y)
