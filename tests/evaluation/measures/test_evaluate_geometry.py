"""The geometry of a model's embeddings: the right measure under the right key, pairs left out, the limit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cloob.evaluation.measures.geometry import geometry
from cloob.functional import geometry as measures


def unit(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_every_measure_is_that_of_its_cloud() -> None:
    image, text = unit(30, 6, 0), F.normalize(unit(30, 6, 1) + 0.5, dim=1)
    result = geometry(image, text, inv_tau=20.0, beta=4.0)
    retrieved = {}
    for name, x in (("image", image), ("text", text)):
        weights = torch.exp(4 * x @ x.T)
        retrieved[name] = F.normalize(weights / weights.sum(1, keepdim=True) @ x, dim=1)
    clouds = {"image": image, "text": text, "image_retrieved": retrieved["image"], "text_retrieved": retrieved["text"]}
    for name, x in clouds.items():
        assert result[f"effective_eigenvalues_{name}"] == int(measures.effective_eigenvalues(x))
        assert result[f"spectrum_{name}"] == pytest.approx(measures.covariance_spectrum(x).tolist(), rel=1e-3)
    for name, x in (("image", image), ("text", text)):
        assert result[f"ajne_{name}"] == pytest.approx(float(measures.ajne(x)))
        assert result[f"uniformity_{name}"] == pytest.approx(float(measures.uniformity(x)))
    assert result["alignment"] == pytest.approx(float((image - text).square().sum(1).mean()))
    assert result["modality_gap"] == pytest.approx(float((image.mean(0) - text.mean(0)).norm()))
    p = torch.softmax(20 * image @ text.T, 1).diagonal(), torch.softmax(20 * text @ image.T, 1).diagonal()
    assert result["saturation"] == pytest.approx(float(1 - torch.cat(p).mean()))
    assert result["n"] == 30


def test_pairs_with_an_unreadable_side_are_left_out() -> None:
    image, text = unit(8, 4, 0), unit(8, 4, 1)
    kept = [0, 2, 3, 5, 6, 7]
    expected = geometry(image[kept], text[kept], 10.0, 8.0)
    image[1] = float("nan")
    text[4] = float("nan")
    assert geometry(image, text, 10.0, 8.0) == expected
    assert expected["n"] == 6
