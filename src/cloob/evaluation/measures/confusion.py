"""Which class each image was taken for.

Legend: n images, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(image_features: Tensor, labels: Tensor, class_embeddings: Tensor) -> Tensor:
    """Which class each image was taken for.

    Args:
        image_features: (n, D); a NaN row is an image that could not be read.
        labels: (n,) int64 in [0, C).
        class_embeddings: (C, D).

    Returns:
        (C, C + 1) int64 counts, a row a label; the last column counts what could not be read. Of classes with equal
        scores the right one counts last, as in :func:`cloob.evaluation.measures.zeroshot.zeroshot_ranks`.
    """
    n_classes = len(class_embeddings)
    scores = image_features.double() @ class_embeddings.double().T
    rows = torch.arange(len(labels))
    right = scores[rows, labels].clone()
    # The rounding within which `ranking.ranks` counts a tie, so that both agree on what is right.
    rounding = 8 * torch.finfo(torch.float64).eps * class_embeddings.double().norm(dim=1).max()
    least = right - rounding * image_features.double().norm(dim=1)
    scores[rows, labels] = -torch.inf
    best_wrong, wrong = scores.nan_to_num(nan=-torch.inf).max(1)
    predicted = torch.where(best_wrong >= least, wrong, labels)
    predicted = torch.where(torch.isfinite(right), predicted, n_classes)
    cells = labels * (n_classes + 1) + predicted
    return torch.bincount(cells, minlength=n_classes * (n_classes + 1)).view(n_classes, n_classes + 1)
