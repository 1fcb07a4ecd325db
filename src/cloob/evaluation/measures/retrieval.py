"""Image–text retrieval, both ways, with several captions an image and captions that occur more than once.

Legend: I images, T texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.functional import ranking
from cloob.functional.bootstrap import bootstrap_interval

RECALLS = (1, 5, 10)


class RetrievalRanks(NamedTuple):
    """0-based rank of the best correct text of each image (I,), and of the best correct image of each text (T,)."""

    image_to_text: Tensor
    text_to_image: Tensor


def retrieval_ranks(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
    *,
    chunk: int = 4096,
) -> RetrievalRanks:
    """The ranks of all images and texts; NaN rows are never found.

    ``image_of_text`` is the image that each text describes, None if text i describes image i. Equal ``captions`` share
    their correct images; None takes every text as different. ``chunk`` is the rows of a block of scores.
    """
    image = torch.arange(len(image_features)) if image_of_text is None else torch.as_tensor(image_of_text)
    group = torch.arange(len(text_features))  # of texts that are one caption
    if captions is not None:
        # An empty caption could not be read and equals no other. Ids are positive; the negative ones cannot meet them.
        ids = torch.tensor([caption_id(c) if c.strip() else -1 - i for i, c in enumerate(captions)])
        group = torch.unique(ids, return_inverse=True)[1]
    pairs = torch.unique(torch.stack([group, image], 1), dim=0)  # a caption is correct for all that it describes
    text_to_image, image_to_text = ranking.mutual_ranks(text_features, image_features, pairs, chunk, group)
    return RetrievalRanks(image_to_text, text_to_image)


def by_picture(hits: Tensor, image_of_text: Tensor | Sequence[int]) -> Tensor:
    """(I,) values, one a picture, whose mean is the mean of its captions' hits (T,), for intervals over pictures.

    A picture's captions stand or fall together, so pictures are resampled. With c captions a picture, s of them hits,
    and the recall R = Σs/Σc, they are the linearised ratio R + (s − R c) / mean(c); s / c if all have c captions.
    """
    hits, image = hits.double(), torch.as_tensor(image_of_text)
    captions = torch.bincount(image).double()
    right = torch.zeros_like(captions).index_add_(0, image, hits)
    if bool((captions == captions[0]).all()):
        return right / captions
    recall = hits.mean()
    return recall + (right - recall * captions) / captions.mean()


def summarise(
    ranks: RetrievalRanks, image_of_text: Tensor | Sequence[int] | None = None, *, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """The numbers of one set, with bootstrap intervals; ``image_of_text`` is None if each image has one text.

    Median ranks are 1-based, and infinite if half is unreadable.
    """
    result: dict[str, Any] = {}
    for direction, values in ranks._asdict().items():
        for k in RECALLS:
            result[f"{direction}@{k}"] = ranking.recall_at_k(values, k)
        result[f"{direction}_median_rank"] = ranking.median_rank(values)
    for direction, values in ranks._asdict().items():
        for k in RECALLS:
            hits = values < k
            if direction == "text_to_image" and image_of_text is not None:
                hits = by_picture(hits, image_of_text)
            low, high = bootstrap_interval(hits, level=level, seed=seed)
            result[f"{direction}@{k}_interval"] = [max(low, 0.0), min(high, 1.0)]
    return {**result, "n": len(ranks.text_to_image), "n_images": len(ranks.image_to_text)}
