"""The geometry of a model's embeddings: retrievals and saturation by their formulas, pairs left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cloob.evaluation.measures.geometry import geometry
from cloob.functional import geometry as measures


def test_geometry_of_retrievals_without_unreadable_pairs() -> None:
    image, text = F.normalize(torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0)), dim=2)
    result = geometry(image, text, inv_tau=20.0, beta=4.0)
    for name, x in (("image", image), ("text", text)):
        weights = torch.exp(4 * x @ x.T)
        retrieved = F.normalize(weights / weights.sum(1, keepdim=True) @ x, dim=1)
        assert result[f"spectrum_{name}_retrieved"] == pytest.approx(
            measures.covariance_spectrum(retrieved).tolist(), rel=1e-3
        )
        assert result[f"ajne_{name}"] == pytest.approx(float(measures.ajne(x)))
    p = torch.softmax(20 * image @ text.T, 1).diagonal(), torch.softmax(20 * text @ image.T, 1).diagonal()
    assert result["saturation"] == pytest.approx(float(1 - torch.cat(p).mean()))
    broken = torch.tensor([[torch.nan] * 6])
    with_broken = torch.cat([image[:9], broken, image[9:]]), torch.cat([text[:9], text[:1], text[9:]])
    assert geometry(*with_broken, inv_tau=20.0, beta=4.0) == result and result["n"] == 30
