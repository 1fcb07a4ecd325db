"""The numbers of a model on a set: zero-shot classification, retrieval, and the
geometry of its embeddings.

n images or pairs, T texts, C classes, D the embedding dimension; rows are unit rows,
NaN where unreadable.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.errors import InputError
from cloob.evaluation.embed import Encoder, embed_texts
from cloob.evaluation.results import Numbers
from cloob.functional import geometry as shape
from cloob.functional import hopfield_retrieval, ranking
from cloob.functional.bootstrap import bootstrap_interval, by_group, group_means
from cloob.functional.protocols import WAYS

RECALLS = (1, 5, 10)
LIMIT = 10_000  # pairs whose geometry is measured
_CHUNK = 1024


def class_embeddings(
    encoder: Encoder,
    classnames: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> Tensor:
    """(C, D) unit rows on the CPU: unit rows of the prompts, averaged over the
    templates, as CLIP and CLOOB do.
    """
    has_places = all("{c}" in template for template in templates)
    if not classnames or not templates or not has_places:
        raise InputError(
            "expected class names and templates with {c} in the place of one; got"
            f" {list(templates)}"
        )
    prompts = []
    for name in classnames:
        prompts += [template.replace("{c}", name) for template in templates]
    rows = F.normalize(embed_texts(encoder, prompts, batch_size), dim=1)
    means = rows.view(len(classnames), len(templates), -1).mean(dim=1)
    return F.normalize(means, dim=1)


def zeroshot_ranks(
    image_features: Tensor, labels: Tensor, class_embeddings: Tensor
) -> Tensor:
    """(n,) 0-based rank of the right class of every image, after those of equal score.

    NaN rows are never right.
    """
    # In float64 a tie is a tie of the embeddings and not of rounding.
    return ranking.ranks(image_features.double(), class_embeddings.double(), labels)


def accuracies(ranks: Tensor, labels: Tensor, n_classes: int) -> Numbers:
    """What (n,) ranks of the right classes come to, with bootstrap intervals over
    images.
    """
    recalls = ranking.per_class_recall(ranks < 1, labels, n_classes)
    return {
        "acc1": ranking.topk_accuracy(ranks, 1),
        "acc5": ranking.topk_accuracy(ranks, 5),
        "mean_per_class_recall": float(recalls.nanmean()),
        "n": len(ranks),
        "n_classes": n_classes,
        "acc1_interval": list(bootstrap_interval(ranks < 1)),
        "acc5_interval": list(bootstrap_interval(ranks < 5)),
    }


def class_recalls(
    ranks: Tensor, labels: Tensor, classnames: Sequence[str]
) -> dict[str, float]:
    """The recall of every class with images.

    A name that several classes share is followed by the label in brackets.
    """
    recalls = ranking.per_class_recall(ranks < 1, labels, len(classnames))
    uses = Counter(classnames)
    found = {}
    for label, name in enumerate(classnames):
        recall = float(recalls[label])
        if not math.isnan(recall):
            found[name if uses[name] == 1 else f"{name} [{label}]"] = recall
    return found


class RetrievalRanks(NamedTuple):
    """0-based rank of the best correct text of every image (n,), and of the best
    correct image of every text (T,).
    """

    image_to_text: Tensor
    text_to_image: Tensor


def retrieval_ranks(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
) -> RetrievalRanks:
    """The ranks of all images and texts; NaN rows are never found.

    ``image_of_text`` is the image that every text describes, None if text i describes
    image i. Equal ``captions`` share their correct images; None takes every text as
    different.
    """
    if image_of_text is None:
        image_of_text = torch.arange(len(image_features))
    image = torch.as_tensor(image_of_text)
    group = torch.arange(len(text_features))  # of texts that are one caption
    if captions is not None:
        ids = torch.tensor([_caption_id(text, i) for i, text in enumerate(captions)])
        group = torch.unique(ids, return_inverse=True)[1]
    # a caption is correct for all that it describes
    pairs = torch.unique(torch.stack([group, image], dim=1), dim=0)
    text_to_image, image_to_text = ranking.mutual_ranks(
        text_features, image_features, pairs, group=group
    )
    return RetrievalRanks(image_to_text, text_to_image)


def _caption_id(caption: str, place: int) -> int:
    """An empty caption could not be read and equals no other: ids are positive, and
    negative ones cannot meet them.
    """
    return caption_id(caption) if caption.strip() else -1 - place


def retrieval_numbers(
    ranks: RetrievalRanks,
    image_of_text: Tensor | None = None,
) -> Numbers:
    """The numbers of a set, with bootstrap intervals; median ranks are 1-based, and
    infinite if half is unreadable. The captions of a picture are resampled together.
    """
    numbers: Numbers = {}
    intervals: Numbers = {}
    for direction, values in ranks._asdict().items():
        groups = image_of_text if direction == "text_to_image" else None
        for k in RECALLS:
            numbers[f"{direction}@{k}"] = ranking.topk_accuracy(values, k)
            intervals[f"{direction}@{k}_interval"] = list(
                bootstrap_interval(values < k, groups=groups)
            )
        numbers[f"{direction}_median_rank"] = ranking.median_rank(values)
    numbers |= intervals
    numbers["n"] = len(ranks.text_to_image)
    numbers["n_images"] = len(ranks.image_to_text)
    return numbers


def vector_hits(
    ranks: tuple[Tensor, Tensor], ids: Tensor, units: Tensor
) -> dict[str, Tensor]:
    """By metric how often the rows of every unit are right, by which models are
    compared.
    """
    return {
        f"{way}@{k}": by_group(group_means(of_way < k, ids), units)
        for way, of_way in zip(WAYS, ranks, strict=True)
        for k in RECALLS
    }


def geometry(
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float,
    beta: float,
) -> Numbers:
    """Measures (n, D) unit rows of pairs and of their Hopfield retrievals, the anchors
    of the CLOOB objective.

    Images are retrieved from the memory of all images, texts from that of all texts;
    ``inv_tau`` is that of the saturation of InfoNCE. Pairs with a NaN row are left out.
    At most ``LIMIT`` pairs are measured, evenly spaced over the set: time is O(n²), and
    most measures depend on n.
    """
    finite = torch.isfinite(image_features) & torch.isfinite(text_features)
    rows = finite.all(dim=1).nonzero()[:, 0]
    if len(rows) < 2:
        raise InputError(
            f"geometry needs at least 2 pairs with finite embeddings, got {len(rows)}"
        )
    if len(rows) > LIMIT:
        rows = rows[torch.arange(LIMIT) * len(rows) // LIMIT]
    image = image_features[rows]
    text = text_features[rows]
    clouds = {
        "image": image,
        "text": text,
        "image_retrieved": retrieved(image, beta),
        "text_retrieved": retrieved(text, beta),
    }
    of_images = shape.saturation(image, text, inv_tau)
    of_texts = shape.saturation(text, image, inv_tau)

    numbers: Numbers = {"n": len(rows)}
    for name, cloud in clouds.items():
        count = int(shape.effective_eigenvalues(cloud))
        numbers[f"effective_eigenvalues_{name}"] = count
    for side in ("image", "text"):
        numbers[f"ajne_{side}"] = float(shape.ajne(clouds[side]))
    numbers["alignment"] = float(shape.alignment(image, text))
    for side in ("image", "text"):
        numbers[f"uniformity_{side}"] = float(shape.uniformity(clouds[side]))
    numbers["modality_gap"] = float(shape.modality_gap(image, text))
    numbers["saturation"] = float(of_images + of_texts) / 2
    for name, cloud in clouds.items():
        spectrum = shape.covariance_spectrum(cloud)
        numbers[f"spectrum_{name}"] = [float(f"{v:.6g}") for v in spectrum]
    return numbers


def retrieved(rows: Tensor, beta: float) -> Tensor:
    """(n, D) rows, each retrieved from the memory of all."""
    parts = torch.split(rows, _CHUNK)
    return torch.cat([hopfield_retrieval(part, rows, beta) for part in parts])
