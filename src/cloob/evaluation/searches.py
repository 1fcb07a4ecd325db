"""Searches: what a person would type, and the pictures that each model finds for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cloob.errors import InputError
from cloob.evaluation.embed import Reader, embed_texts
from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.examples import gallery, picture_bytes
from cloob.evaluation.report import ExampleQuery, ShownPicture


def searches(
    embeddings: Embeddings,
    data: Labelled | Reader,
    texts: Sequence[str],
    *,
    models: Sequence[str] | None = None,
    k: int = 8,
) -> list[ExampleQuery]:
    """What each model finds for some texts among the pictures of a set, right or wrong.

    Args:
        embeddings: The models; what was embedded of the set is used again.
        data: The pictures: a labelled set, or a source of pairs.
        texts: What is searched for; any words.
        models: Names of the models to ask; None asks all.
        k: Pictures a search.

    Returns:
        The searches in order, with the encoded pictures, their labels and cosines. Pictures that cannot be read are
        never found.

    Raises:
        InputError: No texts, an empty one, or what embedding raises.
    """
    if not texts or not all(text.strip() for text in texts):
        raise InputError("searches: expected texts with words in them")
    found: dict[str, list[list[ShownPicture]]] = {}
    for model in models or list(embeddings.models):
        labels = gallery(embeddings, model, data).labels
        found[model] = [
            [ShownPicture(picture_bytes(data, place), labels[place], False, score) for place, score in best]
            for best in find_exact(embeddings, model, data, texts, k)
        ]
    return [ExampleQuery(text, {model: lists[i] for model, lists in found.items()}) for i, text in enumerate(texts)]


def find_exact(
    embeddings: Embeddings, model: str, data: Labelled | Reader, texts: Sequence[str], k: int
) -> list[list[tuple[int, float]]]:
    """The ``k`` pictures of largest cosine for each text, best first; of equal ones the earlier in the set."""
    images = gallery(embeddings, model, data).images
    cosines = embed_texts(embeddings.encoder(model), texts) @ images.T
    cosines = cosines.nan_to_num(nan=-torch.inf)
    readable = int(torch.isfinite(cosines[0]).sum())
    best = cosines.sort(dim=1, descending=True, stable=True)
    n = min(k, readable)
    places, scores = best.indices[:, :n].tolist(), best.values[:, :n].tolist()
    return [list(zip(*row, strict=True)) for row in zip(places, scores, strict=True)]
