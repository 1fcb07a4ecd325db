"""Models of vectors side by side on the same pairs: retrieval both ways, geometry, paired differences.

An id is one sample: its rows stand or fall together. The gallery has one row an id, its first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cloob.data.vectors import VectorPairs
from cloob.errors import InputError
from cloob.evaluation.measures.geometry import geometry
from cloob.evaluation.measures.retrieval import RECALLS
from cloob.evaluation.suite import Hits, differences
from cloob.functional import ranking
from cloob.functional.bootstrap import bootstrap_interval, group_means
from cloob.models.aligned.vectors import VectorEncoder, embed_pairs
from cloob.models.load import fingerprint, load_model

_BETA = 8.0  # the paper's, for a model that retrieves nothing


def evaluate_vectors(
    models: Mapping[str, str | Path],
    pairs: VectorPairs,
    *,
    device: str | torch.device = "auto",
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures runs of ``cloob train vectors``.

    Returns:
        What becomes results.json, as of :func:`cloob.evaluate`; a row has its numbers under ``vectors``.

    Raises:
        InputError: No pairs, a model that is none of vectors, or one of vectors of another width.
    """
    ids = torch.from_numpy(pairs.ids)
    distinct, first = np.unique(pairs.ids, return_index=True)
    rows, hits = [], Hits()
    for name, source in models.items():
        encoder = load_model(source, device)
        if not isinstance(encoder, VectorEncoder):
            raise InputError(f"{name}: is no model of vectors; `cloob train vectors` makes them")
        objective = encoder.make_objective()
        settings = objective.config()
        try:
            a, b = embed_pairs(encoder, pairs)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        numbers: dict[str, Any] = {"n": len(pairs), "n_ids": len(distinct)}
        for way, query, gallery in (("a_to_b", a, b), ("b_to_a", b, a)):
            ranks = ranking.ranks_of_ids(query, gallery, ids)
            numbers[f"{way}_median_rank"] = ranking.median_rank(ranks)
            for k in RECALLS:
                right = group_means(ranks < k, ids)
                numbers[f"{way}@{k}"] = float(right.mean())
                numbers[f"{way}@{k}_interval"] = list(bootstrap_interval(right, level=level, seed=seed))
                hits.setdefault((f"{way}@{k}", pairs.name), {})[name] = right
        numbers |= {f"chance@{k}": min(k / len(distinct), 1.0) for k in RECALLS}
        beta = float(settings["beta"]) if objective.hopfield else _BETA
        shape = geometry(a[first], b[first], float(settings["inv_tau"]), beta)
        numbers["geometry"] = of_sides(shape)
        if pairs.skipped:
            numbers["unreadable"] = dict(Counter(skip.reason for skip in pairs.skipped))
        row = {"model": name, "objective": objective.name, "settings": settings, "fingerprint": fingerprint(encoder)}
        rows.append({**row, "train_seconds": None, "vectors": {pairs.name: numbers}})
    return {"rows": rows, "differences": differences(hits, level=level, seed=seed), "level": level}


def of_sides(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of pictures and texts, by the names of a and b."""
    return {key.replace("image", "a").replace("text", "b"): value for key, value in measured.items()}
