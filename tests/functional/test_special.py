"""What random batches do not hit: overflow, masks, anchors without negatives, averages of zero, and wrong arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cloob import functional
from cloob.functional import cloob_reference, streamed
from cloob.functional.streamed import cloob_streamed
from paper_loops import contrast_loop, unit, value_and_gradients

both_paths = pytest.mark.parametrize("path", [functional, streamed], ids=["reference", "streamed"])
CONTRASTS = ("info_loob", "info_nce", "sigmoid_loss")


@both_paths
@pytest.mark.parametrize("ids", [None, [0, 1, 0]], ids=["", "ids"])
@pytest.mark.parametrize("inv_tau", [1e3, 1e5])
def test_far_from_overflow_in_float32(path: Any, ids: list[int] | None, inv_tau: float) -> None:
    """Masks are −∞: at 1e5 a sentinel of −1e4 would win against the negative."""
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])[: 2 if ids is None else 3]
    own = None if ids is None else torch.tensor(ids)

    def of(name: str, anchors: Tensor, candidates: Tensor) -> float:
        args = (inv_tau, 0.0) if name == "sigmoid_loss" else (inv_tau,)
        value, *gradients = value_and_gradients(
            lambda a, c: getattr(path, name)(a, c, *args, ids=own), anchors, candidates
        )
        assert all(g.isfinite().all() for g in gradients)
        return value.item()

    # Each anchor has its positive at cosine 1 and its one negative at −1, or the other way round; with ids anchor 1 has
    # two negatives.
    two, negatives = (0.0, 1.0) if ids is None else (math.log(2) / 3, 4 / 3)
    right = {name: of(name, axis, axis) for name in CONTRASTS}
    assert right == pytest.approx({"info_loob": two - 2 * inv_tau, "info_nce": 0.0, "sigmoid_loss": 0.0})
    wrong = {name: of(name, axis, -axis) for name in CONTRASTS}
    both = two + 2 * inv_tau
    assert wrong == pytest.approx({"info_loob": both, "info_nce": both, "sigmoid_loss": inv_tau * (1 + negatives)})


@both_paths
@pytest.mark.parametrize("name", CONTRASTS[:2])
def test_an_anchor_without_negatives_adds_zero_value_and_gradient(path: Any, name: str) -> None:
    anchors, candidates = unit(3, 4, 0), unit(4, 4, 1)
    sevens = torch.full((4,), 7)

    def direction(ids: list[int]) -> Callable[..., Tensor]:
        own = torch.tensor(ids)
        return lambda a, c, t: getattr(path, name)(a, c, t, ids=own, candidate_ids=sevens)

    loss, *gradients = value_and_gradients(direction([7, 7, 7]), anchors, candidates, torch.tensor(30.0))
    assert loss == 0 and not any(g.any() for g in gradients)
    loss, d_anchors, *_ = value_and_gradients(direction([7, 1, 2]), anchors, candidates, torch.tensor(30.0))
    rows = (anchors.tolist(), candidates.tolist())
    assert loss.item() == pytest.approx(contrast_loop(name.replace("_", ""), *rows, 30.0, 0, [7, 1, 2], [7] * 4))
    assert not d_anchors[0].any() and d_anchors[1:].isfinite().all() and d_anchors[1:].any(dim=1).all()


@both_paths
@pytest.mark.parametrize("beta", [2.0, 100.0])
def test_an_average_of_zero_stays_zero_with_zero_gradient(path: Any, beta: float) -> None:
    stored = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    state = torch.tensor([[0.0, 1.0], [0.6, 0.8]], requires_grad=True)
    found = path.hopfield_retrieval(state, stored, beta)
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1, 0].item() == pytest.approx(1.0)
    found[0].sum().backward()
    assert not state.grad.any() and not stored.grad.any()


@both_paths
def test_a_row_that_is_not_finite_is_not_hidden(path: Any) -> None:
    """Where nothing looks at the rows, as in a compiled graph, the loss has to say so."""
    stored = unit(4, 3)
    stored[2, 0] = math.nan
    assert path.hopfield_retrieval(stored[:2], stored, 8.0).isnan().all()


ROWS, NARROW = torch.ones(3, 4), torch.ones(3, 2)
DIRECTION = {"anchors": ROWS, "candidates": ROWS, "inv_tau": 30.0}
RETRIEVAL = {"state": ROWS, "stored": ROWS, "beta": 8.0}
OBJECTIVE = {"image_features": ROWS, "text_features": ROWS, "inv_tau": 30.0}
IDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("usual", "change", "error", "message"),
    [
        (DIRECTION, {"anchors": None}, TypeError, "anchors is a NoneType"),
        (DIRECTION, {"anchors": ROWS[0]}, ValueError, r"anchors has shape \(4,\) .* floating-point matrix"),
        (DIRECTION, {"candidates": NARROW}, ValueError, "candidates has embedding dimension 2, but anchors has 4"),
        (DIRECTION, {"candidates": ROWS.double()}, ValueError, "candidates has dtype torch.float64, but anchors"),
        (DIRECTION, {"candidates": ROWS.to("meta")}, ValueError, "candidates has device meta, but anchors has cpu"),
        (DIRECTION, {"candidates": ROWS.long()}, ValueError, "candidates has shape .* dtype torch.int64"),
        (DIRECTION, {"anchors": ROWS[:1], "candidates": ROWS[:1]}, ValueError, "1 anchors, 1 candidates"),
        (DIRECTION, {"positive_offset": 1}, ValueError, "3 candidates and positive_offset 1"),
        (DIRECTION, {"positive_offset": -1}, ValueError, "positive_offset -1"),
        (DIRECTION, {"inv_tau": torch.tensor(math.nan)}, ValueError, "inv_tau is nan; a positive"),
        (DIRECTION, {"ids": IDS[:2]}, ValueError, r"ids has shape \(2,\) .*; 3 integers on cpu are expected"),
        (DIRECTION, {"ids": torch.ones(3)}, ValueError, r"ids has shape \(3,\) and dtype torch.float32"),
        (DIRECTION, {"ids": IDS.to("meta")}, ValueError, "ids has .* on meta"),
        (DIRECTION, {"candidate_ids": IDS}, ValueError, "ids of 3 anchors and candidate_ids"),
        (DIRECTION, {"ids": IDS[:2], "anchors": ROWS[:2]}, ValueError, "candidate_ids of 3 candidates"),
        (RETRIEVAL, {"beta": 0.0}, ValueError, r"beta is 0\.0; a positive"),
        (RETRIEVAL, {"beta": torch.ones(2)}, ValueError, r"beta has shape \(2,\); a single number"),
        (OBJECTIVE, {"text_features": ROWS[:2]}, ValueError, "3 image_features and 2 text_features"),
        (OBJECTIVE, {"image_features": ROWS[:1], "text_features": ROWS[:1]}, ValueError, "at least 2 of them"),
        (OBJECTIVE, {"contrast": "infonoc"}, ValueError, "contrast is 'infonoc'; one of 'infoloob', 'infonce', 'sig"),
        (OBJECTIVE, {"scale": "mean"}, ValueError, "scale is 'mean'; one of 'paper', 'unit' is expected"),
        (OBJECTIVE, {"contrast": "sigmoid"}, ValueError, "contrast='sigmoid' needs scale='unit'"),
        (OBJECTIVE, {"contrast": "sigmoid", "scale": "unit", "bias": math.nan}, ValueError, "bias is nan; a finite"),
    ],
)
def test_errors_name_the_argument(
    usual: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """By both paths, and in each direction."""
    if usual is DIRECTION:
        called = [getattr(path, name) for path in (functional, streamed) for name in CONTRASTS]
    elif usual is RETRIEVAL:
        called = [path.hopfield_retrieval for path in (functional, streamed)]
    else:
        called = [cloob_reference, cloob_streamed]
    for function in called:
        with pytest.raises(error, match=message):
            function(**usual | change)
