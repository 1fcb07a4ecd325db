"""Wrong pairs are found, by a closed form that has not seen them; equal ids stay together; how many are wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cloob
from cloob.functional.suspects import suspicion

Pairs = tuple[torch.Tensor, torch.Tensor]


def views(n: int, seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=(n, 12))
    a, b = (cause @ rng.normal(size=(12, width)) + 0.5 * rng.normal(size=(n, width)) for width in (30, 20))
    return torch.from_numpy(a).float(), torch.from_numpy(np.tanh(b / 3) + 7).float()


def above(scores: torch.Tensor, others: torch.Tensor) -> float:
    """How often a score is above another: the area under the curve."""
    return float((scores[:, None] > others).double().mean())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_swapped_pairs_score_lowest_and_are_counted(share: float) -> None:
    a, b = views(800)
    wrong = torch.arange(800) % 100 < 100 * share
    places = torch.arange(800)
    places[wrong] = places[wrong].roll(1)
    found = suspicion(a, b[places])
    assert found.scores.dtype == torch.float32 and torch.equal(
        found.scores, cloob.suspects(a.numpy(), b[places].numpy())
    )
    assert abs(found.count() - int(wrong.sum())) <= 24
    if share:
        assert above(found.scores[~wrong], found.scores[wrong]) > 0.97
        fits = found.better == torch.arange(800)  # nothing fits better than a pair's partner
        assert float(fits[wrong].double().mean()) < 0.1 < 0.5 < float(fits[~wrong].double().mean())


def test_equal_ids_are_judged_by_others_alone() -> None:
    """Noise that is there three times scores as mismatched pairs do, but for those that have seen their copies."""
    rng = np.random.default_rng(1)
    a, b = (torch.from_numpy(rng.normal(size=(100, 40))).repeat(3, 1) for _ in range(2))
    together = suspicion(a, b, ids=torch.arange(100).repeat(3))
    assert 0.35 < above(together.scores, together.mismatched) < 0.65
    apart = suspicion(a, b)
    assert above(apart.scores, apart.mismatched) > 0.9


def test_scores_follow_their_pairs_in_any_order() -> None:
    a, b = views(120, 3)
    ids, order = torch.arange(120) // 2, torch.randperm(120, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        cloob.suspects(a[order], b[order], ids[order]), cloob.suspects(a, b, ids)[order], atol=1e-4, rtol=0
    )


def test_what_cannot_be_judged_is_one_line() -> None:
    a, b = views(12)
    with pytest.raises(ValueError, match="as many rows"):
        cloob.suspects(a, b[:7])
    with pytest.raises(ValueError, match="3 distinct ids in 5 folds"):
        cloob.suspects(a, b, ids=[0, 1, 2] * 4)
