"""Which class each image was taken for."""

from __future__ import annotations

import torch

from cloob.evaluation.measures.zeroshot import confusion_matrix


def test_a_confusion_matrix_counts_each_image_once_and_agrees_with_the_ranks() -> None:
    classes = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [torch.nan] * 3, [0.6, 0.6, 0]])
    labels = torch.tensor([0, 1, 2, 2, 0])
    matrix = confusion_matrix(images, labels, classes)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]  # the tie in the last row is no hit
