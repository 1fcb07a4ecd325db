"""Zero-shot classification: the class whose prompts lie nearest to the image, and which class each was taken for.

Legend: N images, C classes, D the embedding dimension. Protocol of CLIP and CLOOB: normalise the embedding of each
prompt, average over the templates, normalise again, take the class of largest cosine.
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
    """(C, D) unit rows on the CPU: the mean over the templates, with each class name in the place of ``{c}``."""
    if not classnames or not templates or not all("{c}" in template for template in templates):
        raise InputError(f"expected class names and templates with {{c}} in the place of one; got {list(templates)}")
    prompts = [template.replace("{c}", name) for name in classnames for template in templates]
    features = F.normalize(embed_texts(encoder, prompts, batch_size), dim=1)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=1)


def zeroshot_ranks(image_features: Tensor, labels: Tensor, class_embeddings: Tensor) -> Tensor:
    """(N,) 0-based rank of the right class of each image, after those of equal score. NaN rows are never right."""
    # In float64 a tie is a tie of the embeddings and not of rounding.
    return ranking.ranks(image_features.double(), class_embeddings.double(), labels)


def confusion_matrix(image_features: Tensor, labels: Tensor, class_embeddings: Tensor) -> Tensor:
    """(C, C + 1) counts: a row a label, a column a class that images were taken for, the last one for NaN rows.

    It agrees with :func:`zeroshot_ranks`: of classes with equal scores the right one comes last.
    """
    n_classes = len(class_embeddings)
    scores = image_features.double() @ class_embeddings.double().T
    scores[torch.arange(len(labels)), labels] = -torch.inf
    right = zeroshot_ranks(image_features, labels, class_embeddings) < 1
    predicted = torch.where(right, labels, scores.argmax(1))
    predicted[~torch.isfinite(image_features).all(1)] = n_classes
    cells = labels * (n_classes + 1) + predicted
    return torch.bincount(cells, minlength=n_classes * (n_classes + 1)).view(n_classes, n_classes + 1)


def summarise(
    ranks: Tensor, labels: Tensor, classnames: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """The numbers of one set, with bootstrap intervals.

    ``per_class`` has the classes with images; a name that several classes share is followed by the label in brackets.
    """
    recalls = ranking.per_class_recall(ranks < 1, labels, len(classnames))
    uses = Counter(classnames)
    names = [f"{name} [{i}]" if uses[name] > 1 else name for i, name in enumerate(classnames)]
    per_class = zip(names, recalls.tolist(), strict=True)
    return {
        "acc1": ranking.topk_accuracy(ranks, 1),
        "acc5": ranking.topk_accuracy(ranks, 5),
        "mean_per_class_recall": float(recalls.nanmean()),
        "n": len(ranks),
        "n_classes": len(classnames),
        "acc1_interval": list(bootstrap_interval(ranks < 1, level=level, seed=seed)),
        "acc5_interval": list(bootstrap_interval(ranks < 5, level=level, seed=seed)),
        "per_class": {name: recall for name, recall in per_class if recall == recall},  # not NaN
    }
