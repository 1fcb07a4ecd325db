"""Geometry of models on pairs: at the end, over the checkpoints of a run, and which pictures a model cannot tell apart.

Legend: n pictures, D the embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloob.errors import message, require
from cloob.evaluation.embed import EmbedOptions, PairEmbeddings, Reader
from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.measures import DEFAULT_LIMIT, geometry
from cloob.evaluation.suite import refuse_if_all_failed
from cloob.models.runs import checkpoint_step, epoch_of, find_best, list_checkpoints

_CURVES = ("effective_eigenvalues_image", "effective_eigenvalues_text", "ajne_image", "ajne_text")


def analyze(
    models: Mapping[str, str | Path],
    source: Reader,
    options: EmbedOptions | None = None,
    *,
    similar: int = 20,
    duplicate: float = 0.999,
    limit: int = DEFAULT_LIMIT,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures models on pairs; of a run folder every checkpoint, and ``geometry`` is that of its best one.

    ``similar`` pictures are listed at most; ``duplicate`` is the cosine from which two pictures count as one; the
    geometry is measured on ``limit`` pairs at most. ``failures`` lists what could not be measured; InputError if
    nothing could be.
    """
    runs: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for name, place in models.items():
        found = list_checkpoints(Path(place)) if Path(place).is_dir() else []
        best = find_best(Path(place)) if found else None
        checkpoints: list[dict[str, Any]] = []
        shown: tuple[PairEmbeddings, dict[str, Any]] | None = None
        sources: list[str | Path] = [*found] or [place]
        for checkpoint in sources:
            step = checkpoint_step(Path(checkpoint)) if found else None
            label = name if step is None else f"{name}, step {step}"
            try:
                embeddings = Embeddings({label: checkpoint}, options, progress=progress)
                pairs = embeddings.pairs(label, source)
                facts = embeddings.facts(label)
                texts = pairs.texts[pairs.first_texts]
                measured = geometry(pairs.images.features, texts, facts.inv_tau, facts.beta, limit)
            except (ValueError, OSError) as error:
                failures.append({"model": label, "error": message(error)})
                continue
            epoch = None if step is None else epoch_of(Path(place), step)
            checkpoints.append({"step": step, "epoch": epoch, **{key: measured[key] for key in _CURVES}})
            if shown is None or best is None or checkpoint == best[0]:
                shown = pairs, measured
        if shown is not None:
            pictures = _pictures(shown[0], similar, duplicate)
            runs.append({"model": name, "geometry": shown[1], "checkpoints": checkpoints, **pictures})
    refuse_if_all_failed(runs, failures)
    result: dict[str, Any] = {"pairs": source.name, "runs": runs}
    return {**result, "failures": failures} if failures else result


def similar_pairs(features: Tensor, k: int, chunk: int = 1024) -> list[tuple[int, int, float]]:
    """The k pairs of largest cosine as (first, second, cosine), best first, of equal ones the earlier.

    None of NaN rows. Memory is chunk × n.
    """
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(features) if k else 0, chunk):
        scores = (features[start : start + chunk] @ features.T).nan_to_num(nan=-torch.inf)
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).tril(start), -torch.inf)
        cosines = scores.flatten()
        least = cosines.topk(min(k, len(cosines))).values[-1:]  # of equal ones topk takes any
        best = torch.cat([(cosines > least).nonzero()[:, 0], (cosines == least).nonzero()[:k, 0]])
        rows, columns = best // len(features) + start, best % len(features)
        cells = zip(rows.tolist(), columns.tolist(), cosines[best].tolist(), strict=True)
        pairs += [cell for cell in cells if cell[2] > -torch.inf]
        pairs = sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:k]
    return pairs


def duplicate_groups(features: Tensor, threshold: float = 0.999, chunk: int = 1024) -> list[list[int]]:
    """Groups of pictures linked by cosines of ``threshold`` or more; NaN rows are in none. Memory is chunk × n."""
    sparse, csgraph = require("scipy.sparse", "train"), require("scipy.sparse.csgraph", "train")
    pictures = np.arange(len(features))
    first = pictures  # of each one's group
    for start in range(0, len(features), chunk):
        rows, columns = (features[start : start + chunk] @ features.T >= threshold).nonzero().T.numpy()
        ends = np.concatenate([rows + start, pictures]), np.concatenate([columns, first])
        graph = sparse.coo_array((np.ones(len(ends[0])), ends), shape=(len(features), len(features)))
        labels = csgraph.connected_components(graph, directed=False)[1]
        first = np.unique(labels, return_index=True)[1][labels]
    groups: dict[int, list[int]] = {}
    for picture, leader in enumerate(first.tolist()):
        groups.setdefault(leader, []).append(picture)
    return [group for group in groups.values() if len(group) > 1]


def _pictures(embedded: PairEmbeddings, similar: int, duplicate: float) -> dict[str, Any]:
    images = embedded.images
    captions = [embedded.captions[text] for text in embedded.first_texts.tolist()]
    pairs = [
        {"keys": [images.keys[a], images.keys[b]], "captions": [captions[a], captions[b]], "cosine": cosine}
        for a, b, cosine in similar_pairs(images.features, similar)
    ]
    groups = duplicate_groups(images.features, duplicate)
    twins = {"similar": pairs, "duplicates": [[images.keys[i] for i in group] for group in groups]}
    return {**twins, "unreadable": embedded.unreadable} if embedded.unreadable else twins
