"""Zero-shot classification: the class whose prompts lie nearest to the image.

Legend: N images, C classes, D the embedding dimension. Protocol of CLIP and CLOOB: normalise the embedding of
each prompt, average over the templates, normalise again, take the class of largest cosine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cloob.errors import InputError
from cloob.evaluation.embed import Encoder, embed_texts
from cloob.functional import ranking
from cloob.functional.bootstrap import bootstrap_interval


def class_embeddings(
    encoder: Encoder, classnames: Sequence[str], templates: Sequence[str], batch_size: int = 256
) -> Tensor:
    """One embedding a class, the ensemble of its prompts.

    All prompts of all classes go through the tower in full batches, each distinct text once.

    Args:
        encoder: The model.
        classnames: C names, put in the place of ``{c}``.
        templates: Prompts with ``{c}`` in each.
        batch_size: Prompts a forward pass.

    Returns:
        (C, D) unit rows, float32 on the CPU.

    Raises:
        InputError: No classes, no templates, or a template without ``{c}``.
    """
    if not classnames or not templates:
        raise InputError(f"zero-shot needs class names and templates, got {len(classnames)} and {len(templates)}")
    for template in templates:
        if "{c}" not in template:
            raise InputError(f"template {template!r} has no {{c}} where the class name belongs")
    prompts = [template.replace("{c}", name) for name in classnames for template in templates]
    features = F.normalize(embed_texts(encoder, prompts, batch_size), dim=1)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=1)


def zeroshot_ranks(image_features: Tensor, labels: Tensor, class_embeddings: Tensor) -> Tensor:
    """Where the right class lands for each image.

    Args:
        image_features: (N, D); a NaN row (an image that could not be read) is never right.
        labels: (N,) int64 in [0, C).
        class_embeddings: (C, D).

    Returns:
        (N,) int64 0-based ranks; classes of equal score rank ahead (two classes of one name are never told
        apart).

    Raises:
        ValueError: Shapes that do not fit, or a label out of range.
    """
    # In float64 a tie is a tie of the embeddings and not of rounding.
    return ranking.ranks(image_features.double(), class_embeddings.double(), labels)


def summarise(
    ranks: Tensor,
    labels: Tensor,
    n_classes: int,
    classnames: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of one set from the ranks of :func:`zeroshot_ranks`.

    Args:
        ranks: (N,) int64 ranks of the labels.
        labels: (N,) int64 in [0, n_classes).
        n_classes: C.
        classnames: C names, or None.
        level: Level of the bootstrap intervals.
        seed: Seed of the bootstrap.

    Returns:
        ``acc1``, ``acc5``, ``mean_per_class_recall`` (fractions), ``n``, ``n_classes``, ``acc1_interval`` and
        ``acc5_interval`` ([low, high]), and with names ``per_class`` ({name: recall}, classes with images
        only; a name that several classes share is followed by its label in brackets).

    Raises:
        ValueError: Shapes that differ, or a label out of range.
    """
    if classnames is not None and len(classnames) != n_classes:
        raise ValueError(f"expected {n_classes} class names, got {len(classnames)}")
    recalls = ranking.per_class_recall(ranks < 1, labels, n_classes)
    result: dict[str, Any] = {
        "acc1": ranking.topk_accuracy(ranks, 1),
        "acc5": ranking.topk_accuracy(ranks, 5),
        "mean_per_class_recall": float(recalls.nanmean()),
        "n": len(ranks),
        "n_classes": n_classes,
        "acc1_interval": list(bootstrap_interval(ranks < 1, level=level, seed=seed)),
        "acc5_interval": list(bootstrap_interval(ranks < 5, level=level, seed=seed)),
    }
    if classnames is not None:
        uses = Counter(classnames)
        names = [f"{name} [{i}]" if uses[name] > 1 else name for i, name in enumerate(classnames)]
        seen = torch.isfinite(recalls).tolist()
        recall_of = zip(names, recalls.tolist(), seen, strict=True)
        result["per_class"] = {name: recall for name, recall, has_images in recall_of if has_images}
    return result
