"""Example queries: a few texts, and the images that each model finds for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.errors import InputError, nearest
from cloob.evaluation.embed import Reader
from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.report import ExampleQuery, ShownPicture


class Gallery(NamedTuple):
    """A set as one model sees it: (n, D) images, each with its groups, and (T, D) texts, each with its group.

    A group is a class, or all captions that are equal; a text asks for the images of its group. The label of an image
    is its class's name or its first caption.
    """

    images: Tensor
    groups_of_image: Sequence[frozenset[int]]
    labels: Sequence[str]
    texts: Tensor
    group_of_text: Sequence[int]
    words: Sequence[str]


def example_queries(
    embeddings: Embeddings,
    data: Labelled | Reader,
    queries: Sequence[str] | None = None,
    *,
    n: int = 8,
    k: int = 5,
    models: Sequence[str] | None = None,
) -> list[ExampleQuery]:
    """What each model finds for a few queries among the images of a set.

    Args:
        embeddings: The models; what :func:`cloob.evaluation.suite.evaluate` embedded is used again.
        data: A labelled set (queries are class names, through the ensemble of templates), or a source of
            pairs (queries are captions).
        queries: Class names or captions of the set; None draws ``n`` of those that have an image,
            the same for all models.
        n: How many queries to draw.
        k: Images a query.
        models: Names of the models to ask; None asks all.

    Returns:
        The queries in order, with the encoded images, their labels, scores (cosines) and whether they are
        right: of the class, or of a caption that is equal. Images that cannot be read are never found.

    Raises:
        InputError: A query that is no class name or caption of the set, or what embedding raises.
    """
    galleries = {model: gallery(embeddings, model, data) for model in models or embeddings.models}
    first = next(iter(galleries.values()))
    chosen = _draw(first, n) if queries is None else [_find(first, q, data.name) for q in queries]
    answers: dict[str, list[list[ShownPicture]]] = {}
    for model, seen in galleries.items():
        scores = (seen.texts[chosen] @ seen.images.T).nan_to_num(nan=-torch.inf)
        best = scores.topk(min(k, int(torch.isfinite(scores[0]).sum())), dim=1)
        answers[model] = [
            [
                _shown_picture(data, seen, row, image, score)
                for image, score in zip(images.tolist(), values.tolist(), strict=True)
            ]
            for row, images, values in zip(chosen, best.indices, best.values, strict=True)
        ]
    return [
        ExampleQuery(first.words[row], {model: lists[i] for model, lists in answers.items()})
        for i, row in enumerate(chosen)
    ]


def gallery(embeddings: Embeddings, model: str, data: Labelled | Reader) -> Gallery:
    """A set as a model sees it, embedded on first use."""
    if _is_labelled(data):
        images, labels, classes = embeddings.labelled(model, data)
        groups_of_image = [frozenset([label]) for label in labels.tolist()]
        names = [data.classnames[label] for label in labels.tolist()]
        return Gallery(images.features, groups_of_image, names, classes, range(len(classes)), data.classnames)
    pairs = embeddings.pairs(model, data)
    # An unreadable caption has no words and equals no other.
    ids = [caption_id(caption) if caption else -1 - i for i, caption in enumerate(pairs.captions)]
    groups: list[set[int]] = [set() for _ in pairs.images.keys]
    for image, group in zip(pairs.image_of_text.tolist(), ids, strict=True):
        groups[image].add(group)
    firsts = [pairs.captions[text] for text in pairs.first_texts.tolist()]
    return Gallery(pairs.images.features, [frozenset(g) for g in groups], firsts, pairs.texts, ids, pairs.captions)


def _is_labelled(data: Labelled | Reader) -> TypeGuard[Labelled]:
    return hasattr(data, "classnames")


def _draw(seen: Gallery, n: int) -> list[int]:
    """Rows of ``n`` different texts that a readable image answers."""
    readable = torch.isfinite(seen.images).all(1).tolist()
    answered = {group for groups, good in zip(seen.groups_of_image, readable, strict=True) if good for group in groups}
    rows: dict[int, int] = {}
    for row, group in enumerate(seen.group_of_text):
        if group in answered and seen.words[row]:
            rows.setdefault(group, row)
    candidates = list(rows.values())
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))
    return [candidates[i] for i in order[:n].tolist()]


def _find(seen: Gallery, query: str, name: str) -> int:
    words = list(seen.words)
    if query not in words:
        raise InputError(f"{name}: no class or caption {query!r}; {nearest(query, words)}")
    return words.index(query)


def _shown_picture(data: Labelled | Reader, seen: Gallery, row: int, image: int, score: float) -> ShownPicture:
    correct = seen.group_of_text[row] in seen.groups_of_image[image]
    return ShownPicture(picture_bytes(data, image), seen.labels[image], correct, score)


def picture_bytes(data: Labelled | Reader, place: int) -> bytes:
    """The encoded picture at a place in a set."""
    sample = data.read(place)
    content: bytes = sample[1] if isinstance(sample, tuple) else sample.image
    return content
