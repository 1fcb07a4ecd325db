"""Geometry of a run's checkpoints on pairs; example queries of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.errors import message
from cloob.evaluation.embed import EmbedOptions, Reader, embed_texts
from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.measures import DEFAULT_LIMIT, geometry
from cloob.evaluation.report.page import ExampleQuery, ShownPicture
from cloob.models.runs import checkpoint_step, epoch_of, list_checkpoints

_CURVES = (
    "effective_eigenvalues_image",
    "effective_eigenvalues_text",
    "ajne_image",
    "ajne_text",
)


def geometry_of_checkpoints(
    runs: Mapping[str, Path],
    source: Reader,
    options: EmbedOptions | None = None,
    *,
    limit: int = DEFAULT_LIMIT,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, str]]]:
    """Measures every checkpoint of run folders on at most ``limit`` pairs.

    Returns, by run, the ``step``, the ``epoch`` and the effective eigenvalues and Ajne
    statistics of its checkpoints; and what could not be measured, as in results.json.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    failures: list[dict[str, str]] = []
    for name, run in runs.items():
        found[name] = []
        for checkpoint in list_checkpoints(run):
            step = checkpoint_step(checkpoint)
            label = f"{name}, step {step}"
            try:
                embeddings = Embeddings({label: checkpoint}, options, progress=progress)
                numbers = _geometry(embeddings, label, source, limit)
            except (ValueError, OSError) as error:
                text = message(error)
                failures.append({"model": label, "set": source.name, "error": text})
                continue
            curves = {key: numbers[key] for key in _CURVES}
            epoch = epoch_of(run, step)
            found[name].append({"step": step, "epoch": epoch, **curves})
    return found, failures


def _geometry(
    embeddings: Embeddings, model: str, source: Reader, limit: int
) -> dict[str, Any]:
    """The geometry of a model on pictures and the first caption of each."""
    pairs = embeddings.pairs(model, source)
    facts = embeddings.facts(model)
    texts = pairs.texts[pairs.first_texts]
    return geometry(pairs.images.features, texts, facts.inv_tau, facts.beta, limit)


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
