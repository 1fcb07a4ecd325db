"""Geometry of models on pairs, over the checkpoints of a run too; their most similar pictures; example queries.

n pictures, T texts, D the embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.errors import message
from cloob.evaluation.embed import EmbedOptions, PairEmbeddings, Reader, embed_texts
from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.measures import DEFAULT_LIMIT, geometry
from cloob.evaluation.report import ExampleQuery, ShownPicture
from cloob.evaluation.suite import refuse_if_all_failed
from cloob.models.runs import checkpoint_step, epoch_of, find_best, list_checkpoints

Groups = Callable[[np.ndarray], Iterable[Sequence[tuple[int, float]]]]
_CURVES = ("effective_eigenvalues_image", "effective_eigenvalues_text", "ajne_image", "ajne_text")


def analyze(
    models: Mapping[str, str | Path],
    source: Reader,
    options: EmbedOptions | None = None,
    *,
    similar: int = 20,
    groups: Groups | None = None,
    limit: int = DEFAULT_LIMIT,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures models on pairs; of a run folder every checkpoint, and ``geometry`` is that of its best one.

    ``similar`` pictures are listed at most; ``groups`` finds those that look alike, if it is given: from unit rows
    (n, D) to groups of places (``cloob.search.alike.partition``). The geometry is measured on ``limit`` pairs at most.
    ``failures`` lists what could not be measured; InputError if nothing could be.
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
            pictures = _pictures(shown[0], similar, groups)
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


def _pictures(embedded: PairEmbeddings, similar: int, groups: Groups | None) -> dict[str, Any]:
    images = embedded.images
    captions = [embedded.captions[text] for text in embedded.first_texts.tolist()]
    pairs = [
        {"rows": [a, b], "keys": [images.keys[a], images.keys[b]], "captions": [captions[a], captions[b]], "cosine": c}
        for a, b, c in similar_pairs(images.features, similar)
    ]
    result = groups(images.features.numpy()) if groups else ()
    twins = {"similar": pairs, "duplicates": [[images.keys[i] for i, _ in group] for group in result if len(group) > 1]}
    return {**twins, "unreadable": embedded.unreadable} if embedded.unreadable else twins


class _Gallery(NamedTuple):
    """A set as one model sees it. A group is a class, or all captions that are equal; a text queries its group."""

    images: Tensor  # (n, D)
    groups_of_image: Sequence[set[int]]
    labels: Sequence[str]
    texts: Tensor  # (T, D)
    group_of_text: Sequence[int]
    words: Sequence[str]


def example_queries(
    embeddings: Embeddings,
    data: Labelled | Reader,
    texts: Sequence[str] = (),
    *,
    n: int = 8,
    k: int = 5,
    models: Sequence[str] | None = None,
) -> list[ExampleQuery]:
    """The ``k`` nearest pictures of a set that every model finds for texts, of which none counts as right.

    Without texts, for ``n`` class names or captions of the set that a picture answers, the same for all models. Of
    equal cosines the earlier in the set comes first.
    """
    galleries = {model: _gallery(embeddings, model, data) for model in models or embeddings.models}
    first = next(iter(galleries.values()))
    drawn = [] if texts else _draw(first, n)
    words = texts or [first.words[row] for row in drawn]
    queries = [ExampleQuery(text, {}) for text in words]
    for model, seen in galleries.items():
        rows = embed_texts(embeddings.encoder(model), texts) if texts else seen.texts[drawn]
        groups: list[int | None] = [seen.group_of_text[row] for row in drawn] or [None for _ in texts]
        for query, text, group in zip(queries, rows, groups, strict=True):
            best = (seen.images @ text).nan_to_num(nan=-torch.inf).sort(descending=True, stable=True)
            shown = query.answers[model] = []
            for image, score in zip(best.indices[:k].tolist(), best.values[:k].tolist(), strict=True):
                if score > -torch.inf:
                    sample = data.read(image)
                    picture = sample[1] if isinstance(sample, tuple) else sample.image
                    right = group in seen.groups_of_image[image]
                    shown.append(ShownPicture(picture, seen.labels[image], right, score))
    return queries


def _gallery(embeddings: Embeddings, model: str, data: Labelled | Reader) -> _Gallery:
    if hasattr(data, "classnames"):
        names = data.classnames
        images, labels, classes = embeddings.labelled(model, cast("Labelled", data))
        groups = [{label} for label in labels.tolist()]
        return _Gallery(
            images.features, groups, [names[label] for label in labels.tolist()], classes, range(len(classes)), names
        )
    pairs = embeddings.pairs(model, data)
    # An unreadable caption has no words and equals no other.
    ids = [caption_id(caption) if caption else -1 - i for i, caption in enumerate(pairs.captions)]
    groups = [set() for _ in pairs.images.keys]
    for image, group in zip(pairs.image_of_text.tolist(), ids, strict=True):
        groups[image].add(group)
    firsts = [pairs.captions[text] for text in pairs.first_texts.tolist()]
    return _Gallery(pairs.images.features, groups, firsts, pairs.texts, ids, pairs.captions)


def _draw(seen: _Gallery, n: int) -> list[int]:
    """Rows of ``n`` different texts that a readable image answers."""
    readable = torch.isfinite(seen.images).all(1).tolist()
    answered = {group for groups, good in zip(seen.groups_of_image, readable, strict=True) if good for group in groups}
    rows: dict[int, int] = {}
    for row, group in enumerate(seen.group_of_text):
        if group in answered and seen.words[row]:
            rows.setdefault(group, row)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [list(rows.values())[i] for i in order[:n].tolist()]
