"""Zero-shot by hand: the ensemble of prompts, accuracies, what counts as wrong, and which class it was taken for."""

from __future__ import annotations

import pytest
import torch

from cloob.evaluation.measures.zeroshot import class_embeddings, confusion_matrix, summarise, zeroshot_ranks
from evaluate_fakes import COLOURS, ColourModel

NAMES = tuple(COLOURS)


def test_class_embeddings_are_the_renormalised_mean_over_templates() -> None:
    model = ColourModel()
    found = class_embeddings(model, ("red", "blue"), ("{c}", "a picture of {c}", "{c}"), batch_size=3)
    assert [len(batch) for batch in model.text_batches] == [3, 1]  # each distinct text once
    with torch.no_grad():
        for row, name in zip(found, ("red", "blue"), strict=True):
            short, long = model.encode_text([name, f"a picture of {name}"])
            mean = (short + long + short) / 3
            assert torch.allclose(row, mean / mean.norm(), atol=1e-6)


def test_zeroshot_by_hand() -> None:
    # Scores are the coordinates: classes are the axes.
    images = torch.tensor([[0.9, 0.3, 0.1], [0.2, 0.8, 0.1], [0.5, 0.6, 0.4], [0.1, 0.2, 0.9]])
    labels = torch.tensor([0, 1, 0, 2])  # the third image is taken for class 1
    result = summarise(zeroshot_ranks(images, labels, torch.eye(3)), labels, ("a", "b", "c"))
    assert result["acc1"] == 0.75 and result["acc5"] == 1.0
    assert result["mean_per_class_recall"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert result["per_class"] == {"a": 0.5, "b": 1.0, "c": 1.0}
    assert (result["n"], result["n_classes"]) == (4, 3)
    low, high = result["acc1_interval"]
    assert 0 <= low < 0.75 < high <= 1
    assert result["acc5_interval"] == pytest.approx([0.025 ** (1 / 4), 1.0])


def test_classes_of_equal_score_are_never_told_apart() -> None:
    classes = torch.nn.functional.normalize(torch.tensor([[1.0, 2, 3], [1, 2, 3], [3, -1, 0]]), dim=1)
    assert zeroshot_ranks(classes[[0, 1, 2]], torch.tensor([0, 1, 2]), classes).tolist() == [1, 1, 0]
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [torch.nan] * 3, [0.6, 0.6, 0]])
    matrix = confusion_matrix(images, torch.tensor([0, 1, 2, 2, 0]), torch.eye(3))
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]  # the tie in the last row is no hit
