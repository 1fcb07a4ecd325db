"""Geometry of models on pairs, over the checkpoints of a run too; their most similar
pictures; example queries.
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
from cloob.evaluation.report.page import ExampleQuery, ShownPicture
from cloob.evaluation.suite import refuse_if_all_failed
from cloob.models.runs import checkpoint_step, epoch_of, find_best, list_checkpoints

Groups = Callable[[np.ndarray], Iterable[Sequence[tuple[int, float]]]]
_CURVES = (
    "effective_eigenvalues_image",
    "effective_eigenvalues_text",
    "ajne_image",
    "ajne_text",
)


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
    """Measures models on pairs; of a run folder every checkpoint, and ``geometry`` is
    that of its best one.

    ``similar`` pictures are listed at most; ``groups`` partitions unit rows into
    look-alikes (``cloob.search.alike.partition``). The geometry is measured on
    ``limit`` pairs at most. ``failures`` lists what could not be measured; InputError
    if nothing could be.
    """
    runs: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for name, place in models.items():
        stored = list_checkpoints(Path(place)) if Path(place).is_dir() else []
        best = find_best(Path(place)) if stored else None
        checkpoints: list[dict[str, Any]] = []
        shown: tuple[PairEmbeddings, dict[str, Any]] | None = None
        sources: list[str | Path] = [*stored] or [place]
        for checkpoint in sources:
            step = checkpoint_step(Path(checkpoint)) if stored else None
            label = name if step is None else f"{name}, step {step}"
            try:
                embeddings = Embeddings({label: checkpoint}, options, progress=progress)
                pairs = embeddings.pairs(label, source)
                facts = embeddings.facts(label)
                texts = pairs.texts[pairs.first_texts]
                measured = geometry(
                    pairs.images.features, texts, facts.inv_tau, facts.beta, limit
                )
            except (ValueError, OSError) as error:
                failures.append({"model": label, "error": message(error)})
                continue
            epoch = None if step is None else epoch_of(Path(place), step)
            checkpoints.append(
                {
                    "step": step,
                    "epoch": epoch,
                    **{key: measured[key] for key in _CURVES},
                }
            )
            if shown is None or best is None or checkpoint == best[0]:
                shown = pairs, measured
        if shown is not None:
            pairs, measured = shown
            keys, captions = (
                pairs.images.keys,
                [pairs.captions[text] for text in pairs.first_texts.tolist()],
            )
            alike = [
                {
                    "rows": [a, b],
                    "keys": [keys[a], keys[b]],
                    "captions": [captions[a], captions[b]],
                    "cosine": cosine,
                }
                for a, b, cosine in similar_pairs(pairs.images.features, similar)
            ]
            partition = groups(pairs.images.features.numpy()) if groups else ()
            duplicates = [
                [keys[i] for i, _ in group] for group in partition if len(group) > 1
            ]
            run = {
                "model": name,
                "geometry": measured,
                "checkpoints": checkpoints,
                "similar": alike,
            }
            unreadable = {"unreadable": pairs.unreadable} if pairs.unreadable else {}
            runs.append({**run, "duplicates": duplicates, **unreadable})
    refuse_if_all_failed(runs, failures)
    result: dict[str, Any] = {"pairs": source.name, "runs": runs}
    return {**result, "failures": failures} if failures else result


def similar_pairs(
    features: Tensor, k: int, chunk: int = 1024
) -> list[tuple[int, int, float]]:
    """The k pairs of largest cosine as (first, second, cosine), best first, of equal
    ones the earlier; no NaN rows.
    """
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(features) if k else 0, chunk):
        scores = (features[start : start + chunk] @ features.T).nan_to_num(
            nan=-torch.inf
        )
        scores.masked_fill_(
            torch.ones_like(scores, dtype=torch.bool).tril(start), -torch.inf
        )
        cosines = scores.flatten()
        least = cosines.topk(min(k, len(cosines))).values[
            -1:
        ]  # of equal ones topk takes any
        best = torch.cat(
            [(cosines > least).nonzero()[:, 0], (cosines == least).nonzero()[:k, 0]]
        )
        rows, columns = best // len(features) + start, best % len(features)
        cells = zip(
            rows.tolist(), columns.tolist(), cosines[best].tolist(), strict=True
        )
        pairs += [cell for cell in cells if cell[2] > -torch.inf]
        pairs = sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:k]
    return pairs


class _Gallery(NamedTuple):
    """A set as one model sees it.

    A group is a class, or all captions that are equal; a text queries its group.
    """

    images: Tensor  # (n, D), the embeddings of n pictures
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
    """The ``k`` nearest pictures of a set that every model finds for texts, of which
    none counts as right.

    Without texts, for ``n`` class names or captions of the set that a picture answers,
    the same for all models. Of equal cosines the earlier in the set comes first.
    """
    galleries = {
        model: _gallery(embeddings, model, data)
        for model in models or embeddings.models
    }
    first = next(iter(galleries.values()))
    drawn: list[int] = []
    if not texts:  # rows of different texts that a readable image answers
        readable = torch.isfinite(first.images).all(1).tolist()
        of_image = zip(first.groups_of_image, readable, strict=True)
        answered = {group for groups, good in of_image if good for group in groups}
        rows_of: dict[int, int] = {}
        for row, group in enumerate(first.group_of_text):
            if group in answered and first.words[row]:
                rows_of.setdefault(group, row)
        order = torch.randperm(len(rows_of), generator=torch.Generator().manual_seed(0))
        drawn = [list(rows_of.values())[i] for i in order[:n].tolist()]
    queries = [
        ExampleQuery(text, {}) for text in texts or [first.words[row] for row in drawn]
    ]
    for model, seen in galleries.items():
        rows = (
            embed_texts(embeddings.encoder(model), texts)
            if texts
            else seen.texts[drawn]
        )
        groups: list[int | None] = [seen.group_of_text[row] for row in drawn] or [
            None for _ in texts
        ]
        for query, text, right in zip(queries, rows, groups, strict=True):
            best = (
                (seen.images @ text)
                .nan_to_num(nan=-torch.inf)
                .sort(descending=True, stable=True)
            )
            shown = query.answers[model] = []
            for image, score in zip(
                best.indices[:k].tolist(), best.values[:k].tolist(), strict=True
            ):
                if score > -torch.inf:
                    sample = data.read(image)
                    picture = sample[1] if isinstance(sample, tuple) else sample.image
                    shown.append(
                        ShownPicture(
                            picture,
                            seen.labels[image],
                            right in seen.groups_of_image[image],
                            score,
                        )
                    )
    return queries


def _gallery(embeddings: Embeddings, model: str, data: Labelled | Reader) -> _Gallery:
    if hasattr(data, "classnames"):
        names = data.classnames
        images, labels, classes = embeddings.labelled(model, cast("Labelled", data))
        groups, of_images = (
            [{label} for label in labels.tolist()],
            [names[label] for label in labels.tolist()],
        )
        return _Gallery(
            images.features, groups, of_images, classes, range(len(classes)), names
        )
    pairs = embeddings.pairs(model, data)
    # An unreadable caption has no words and equals no other.
    ids = [
        caption_id(caption) if caption else -1 - i
        for i, caption in enumerate(pairs.captions)
    ]
    groups = [set() for _ in pairs.images.keys]
    for image, group in zip(pairs.image_of_text.tolist(), ids, strict=True):
        groups[image].add(group)
    firsts = [pairs.captions[text] for text in pairs.first_texts.tolist()]
    return _Gallery(
        pairs.images.features, groups, firsts, pairs.texts, ids, pairs.captions
    )
