"""Example queries: a few texts, and the pictures that each model finds for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.evaluation.embed import Reader, embed_texts
from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.report import ExampleQuery, ShownPicture


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
    """The ``k`` nearest pictures of a set that each model finds for texts, of which none counts as right.

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
