"""The whole objective against the loop of Eq. 3 to 5, and what follows from the formulas; both backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cloob.functional import cloob_reference
from cloob.functional.streamed import cloob_streamed
from paper_loops import MEMBER_IDS, MEMBERS, joint, objective_loop, pairs, relative_error, unit, value_and_gradients

Objective = Callable[..., Tensor]
both_backends = pytest.mark.parametrize("objective", [cloob_reference, cloob_streamed])
each_member = pytest.mark.parametrize(("contrast", "hopfield"), MEMBERS, ids=MEMBER_IDS)
GRID = list(itertools.product((2, 6), (1e-3, 8.0, 1e3), (1.0, 30.0, 1e3), ("paper", "unit")))


@both_backends
@each_member
@pytest.mark.parametrize("ids", [None, [1, 2, 1, 3, 2, 1]], ids=["", "ids"])
def test_equals_the_loop(objective: Objective, contrast: str, hopfield: bool, ids: list[int] | None) -> None:
    for n, beta, inv_tau, scale in GRID:
        x, y = pairs(n, 4, seed=n)
        options = {"contrast": contrast, "hopfield": hopfield, "scale": scale}
        own = None if ids is None else ids[:n]
        expected = objective_loop(x.tolist(), y.tolist(), inv_tau, beta, ids=own, **options)
        value = objective(x, y, inv_tau, beta, ids=None if own is None else torch.tensor(own), **options)
        assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-11), (n, beta, inv_tau, scale)


@both_backends
@each_member
def test_gradcheck(objective: Objective, contrast: str, hopfield: bool) -> None:
    def loss(x: Tensor, y: Tensor, inv_tau: Tensor, beta: Tensor) -> Tensor:
        ids = torch.tensor([1, 2, 1, 3])
        return objective(x, y, inv_tau, beta, contrast=contrast, hopfield=hopfield, ids=ids)

    scales = (torch.tensor(value, dtype=torch.float64) for value in (3.0, 2.0))
    inputs = [t.requires_grad_() for t in (*pairs(4, 3), *scales)]
    inputs = inputs if hopfield else [*inputs[:3], inputs[3].detach()]
    assert torch.autograd.gradcheck(loss, inputs)


@both_backends
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_infonce_at_unit_scale_is_clips_cross_entropy(
    objective: Objective, dtype: torch.dtype, tolerance: float
) -> None:
    def clip(x: Tensor, y: Tensor, inv_tau: Tensor) -> Tensor:
        logits, labels = inv_tau * x @ y.T, torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    inputs = (*pairs(9, 6, dtype=dtype), torch.tensor(1 / 0.07, dtype=dtype))
    ours = value_and_gradients(objective, *inputs, contrast="infonce", hopfield=False, scale="unit")
    exact = value_and_gradients(clip, *inputs)
    assert relative_error(ours[0], exact[0]) < tolerance
    assert relative_error(joint(ours[1:]), joint(exact[1:])) < tolerance


@both_backends
@each_member
@pytest.mark.parametrize("inv_tau", [0.5, 30.0])
def test_paper_is_unit_times_two_tau(objective: Objective, contrast: str, hopfield: bool, inv_tau: float) -> None:
    x, y = pairs(5, 4)
    paper, unit_ = (
        objective(x, y, inv_tau, contrast=contrast, hopfield=hopfield, scale=scale) for scale in ("paper", "unit")
    )
    torch.testing.assert_close(paper, unit_ * 2 / inv_tau)


@both_backends
@each_member
@given(n=st.integers(2, 6), seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_order_of_pairs_and_names_of_sides_are_no_matter(
    objective: Objective, contrast: str, hopfield: bool, n: int, seed: int
) -> None:
    x, y = unit(n, 4, seed), unit(n, 4, seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    value = objective(x, y, 30.0, 8.0, contrast=contrast, hopfield=hopfield)
    for other in ((x[order], y[order]), (y, x)):
        there = objective(*other, 30.0, 8.0, contrast=contrast, hopfield=hopfield)
        torch.testing.assert_close(there, value, rtol=1e-9, atol=1e-10)


@both_backends
@each_member
def test_equal_pairs(objective: Objective, contrast: str, hopfield: bool) -> None:
    # All logits are equal: each direction is ln of the number of terms in the denominator.
    x = unit(1, 4).expand(5, 4)
    terms = torch.tensor(5.0 if contrast == "infonce" else 4.0, dtype=torch.float64)
    value, *gradients = value_and_gradients(
        lambda a, b: objective(a, b, 30.0, contrast=contrast, hopfield=hopfield, scale="unit"), x, x
    )
    torch.testing.assert_close(value, terms.log())
    assert all(g.isfinite().all() for g in gradients)


@both_backends
@each_member
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(
    objective: Objective, contrast: str, hopfield: bool, dtype: torch.dtype
) -> None:
    x, y = (side.to(dtype) for side in pairs(5, 8))
    options = {"contrast": contrast, "hopfield": hopfield}
    expected = value_and_gradients(objective, x.float(), y.float(), torch.tensor(30.0), torch.tensor(8.0), **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective(x.float(), y.float(), 30.0, 8.0, **options)
    value, d_x, d_y, *d_scales = value_and_gradients(objective, x, y, torch.tensor(30.0), torch.tensor(8.0), **options)
    assert value.dtype == torch.float32 and value == inside == expected[0]
    assert torch.equal(d_x, expected[1].to(dtype)) and torch.equal(d_y, expected[2].to(dtype))
    assert d_scales == expected[3:]


@both_backends
def test_ids_that_are_all_different_change_nothing(objective: Objective) -> None:
    x, y = pairs(5, 4)
    assert objective(x, y, 30.0, ids=torch.arange(5)) == objective(x, y, 30.0)


@both_backends
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_features": torch.ones(1, 4), "text_features": torch.ones(1, 4)}, ValueError, "1 pairs in the batch"),
        ({"image_features": torch.ones(0, 4), "text_features": torch.ones(0, 4)}, ValueError, "0 pairs in the batch"),
        ({"text_features": torch.ones(2, 4)}, ValueError, "3 image_features, but 2 text_features"),
        (
            {"text_features": torch.ones(3, 5)},
            ValueError,
            "text_features has embedding dimension 5, but image_features",
        ),
        ({"text_features": torch.ones(3, 4).double()}, ValueError, "text_features has dtype torch.float64"),
        ({"image_features": "cat.png"}, TypeError, "image_features is a str"),
        ({"contrast": "infonoc"}, ValueError, "contrast is 'infonoc'; 'infoloob' or 'infonce' or 'sigmoid' is"),
        ({"scale": "mean"}, ValueError, "scale is 'mean'; 'paper' or 'unit' is expected"),
        ({"inv_tau": -30.0}, ValueError, r"inv_tau is -30\.0"),
        ({"beta": 0.0}, ValueError, r"beta is 0\.0"),
        ({"ids": torch.arange(2)}, ValueError, r"ids has shape \(2,\)"),
    ],
)
def test_errors_name_the_argument(objective: Objective, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"image_features": torch.ones(3, 4), "text_features": torch.ones(3, 4), "inv_tau": 30.0} | change
    with pytest.raises(error, match=message):
        objective(**arguments)
