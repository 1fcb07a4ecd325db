"""SigLIP's sigmoid loss, one direction and the whole objective, against the loop and open_clip's; both backends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloob import functional
from cloob.functional import cloob_reference, streamed
from cloob.functional.streamed import cloob_streamed
from paper_loops import (
    count_flops,
    joint,
    objective_loop,
    pairs,
    relative_error,
    sigmoid_loop,
    unit,
    value_and_gradients,
)

Loss = Callable[..., Tensor]
both_backends = pytest.mark.parametrize(
    "loss", [functional.sigmoid_loss, streamed.sigmoid_loss], ids=["reference", "streamed"]
)
both_objectives = pytest.mark.parametrize("objective", [cloob_reference, cloob_streamed])
SIGMOID = {"contrast": "sigmoid", "scale": "unit"}


@both_backends
@given(
    n=st.integers(1, 6),
    before=st.integers(0, 3),
    after=st.integers(1, 3),
    inv_tau=st.sampled_from([1e-3, 1.0, 10.0, 1e3]),
    bias=st.sampled_from([-10.0, 0.0, 3.5, -1e3]),
    with_ids=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_equals_the_loop(
    loss: Loss, n: int, before: int, after: int, inv_tau: float, bias: float, with_ids: bool, seed: int
) -> None:
    anchors, candidates = unit(n, 5, seed), unit(before + n + after, 5, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    candidate_ids = torch.randint(3, (len(candidates),), generator=generator)
    ids = candidate_ids[before : before + n]
    given_ids = {"ids": ids, "candidate_ids": candidate_ids} if with_ids else {}
    value = loss(anchors, candidates, inv_tau, bias, positive_offset=before, **given_ids)
    lists = {key: value.tolist() for key, value in given_ids.items()}
    expected = sigmoid_loop(anchors.tolist(), candidates.tolist(), inv_tau, bias, before, **lists)
    assert value.ndim == 0 and value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


@both_backends
def test_gradcheck(loss: Loss) -> None:
    ids, candidate_ids = torch.tensor([1, 1, 2]), torch.tensor([3, 1, 1, 2, 1])

    def value(anchors: Tensor, candidates: Tensor, inv_tau: Tensor, bias: Tensor) -> Tensor:
        return loss(anchors, candidates, inv_tau, bias, positive_offset=1, ids=ids, candidate_ids=candidate_ids)

    scalars = (torch.tensor(number, dtype=torch.float64) for number in (3.0, -1.5))
    inputs = [unit(3, 4, 0), unit(5, 4, 1), *scalars]
    assert torch.autograd.gradcheck(value, [t.requires_grad_() for t in inputs])


@both_objectives
@pytest.mark.parametrize("hopfield", [True, False])
@pytest.mark.parametrize("ids", [None, [1, 2, 1, 3, 2, 1]], ids=["", "ids"])
def test_the_objective_equals_the_loop(objective: Loss, hopfield: bool, ids: list[int] | None) -> None:
    x, y = pairs(6, 4)
    expected = objective_loop(x.tolist(), y.tolist(), 7.0, 4.0, hopfield=hopfield, bias=-2.0, ids=ids, **SIGMOID)
    own = None if ids is None else torch.tensor(ids)
    value = objective(x, y, 7.0, 4.0, hopfield=hopfield, bias=-2.0, ids=own, **SIGMOID)
    assert value.item() == pytest.approx(expected, rel=1e-11)


@both_objectives
@pytest.mark.parametrize("hopfield", [True, False])
def test_gradcheck_of_the_objective(objective: Loss, hopfield: bool) -> None:
    def loss(x: Tensor, y: Tensor, inv_tau: Tensor, bias: Tensor, beta: Tensor) -> Tensor:
        ids = torch.tensor([1, 2, 1, 3])
        return objective(x, y, inv_tau, beta, bias=bias, hopfield=hopfield, ids=ids, **SIGMOID)

    scalars = [torch.tensor(value, dtype=torch.float64) for value in (3.0, -1.0, 2.0)]
    inputs = [*pairs(4, 3), *(scalars if hopfield else scalars[:2])]
    leaves = [t.requires_grad_() for t in inputs] + ([] if hopfield else scalars[2:])
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("hopfield", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_is_the_reference_over_several_strips(
    hopfield: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloob.functional.streamed.tiles.strip_rows", lambda device: 7)
    monkeypatch.setattr("cloob.functional.streamed.tiles.tile_rows", lambda device: 5)
    x, y = pairs(33, 6)
    ids = torch.arange(33) % 20
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (10.0, -3.0)]
    exact = value_and_gradients(
        lambda x, y, t, b: cloob_reference(x, y, t, hopfield=hopfield, bias=b, ids=ids, **SIGMOID), x, y, *scalars
    )
    inputs = [t.to(dtype) for t in (x.T.contiguous().T, y, *scalars)]  # rows that are not contiguous too
    got = value_and_gradients(
        lambda x, y, t, b: cloob_streamed(x, y, t, hopfield=hopfield, bias=b, ids=ids, **SIGMOID), *inputs
    )
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for part, expected in zip(got, exact, strict=True):
        assert relative_error(part, expected) < tolerance


@pytest.mark.parametrize("noise", [2.0, 0.1])
def test_bfloat16_products_are_near(noise: float) -> None:
    x, y = pairs(200, 128, noise, dtype=torch.float32)
    common = unit(1, 128, 9, torch.float32)
    x, y = (torch.nn.functional.normalize(side + 3 * common, dim=1) for side in (x, y))  # a narrow cone
    scalars = (torch.tensor(10.0), torch.tensor(-10.0))
    exact, low = (
        value_and_gradients(lambda x, y, t, b, m=m: streamed.sigmoid_loss(x, y, t, b, matmul=m), x, y, *scalars)
        for m in (None, torch.bfloat16)
    )
    assert 1e-7 < relative_error(joint(low), joint(exact)) < 1e-2


@both_objectives
@pytest.mark.parametrize("bias", [-10.0, 0.0])
def test_equals_open_clips(objective: Loss, bias: float) -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss")
    theirs = open_clip_loss.SigLipLoss()
    inputs = (*pairs(9, 6), *(torch.tensor(value, dtype=torch.float64) for value in (10.0, bias)))
    ours = value_and_gradients(lambda x, y, t, b: objective(x, y, t, bias=b, hopfield=False, **SIGMOID), *inputs)
    for got, expected in zip(ours, value_and_gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@both_backends
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_far_from_overflow_in_float32(loss: Loss, sign: float) -> None:
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    value, *gradients = value_and_gradients(lambda a, c: loss(a, sign * c, 1e4, 0.0), axis, axis)
    assert value.item() == (0.0 if sign > 0 else 2e4)  # all right, or the positive and the negative wrong by 10,000
    assert all(g.isfinite().all() for g in gradients)


@both_backends
def test_an_anchor_without_negatives_keeps_its_positive(loss: Loss) -> None:
    anchors, candidates, ids = unit(2, 4, 0), unit(2, 4, 1), torch.tensor([5, 5])
    logits = 10.0 * (anchors * candidates).sum(dim=1) - 3.0
    expected = -torch.nn.functional.logsigmoid(logits).mean()
    torch.testing.assert_close(loss(anchors, candidates, 10.0, -3.0, ids=ids), expected)


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    anchors, candidates = unit(5, 8, 0).to(dtype), unit(5, 8, 1).to(dtype)
    plain = loss(anchors.float(), candidates.float(), 10.0, -10.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(anchors.float(), candidates.float(), 10.0, -10.0)
    assert plain.dtype == torch.float32 and plain == inside == loss(anchors, candidates, 10.0, -10.0)


def test_one_matrix_of_logits_is_enough_without_retrieval() -> None:
    n, d = 24, 8
    x, y = (side.requires_grad_() for side in pairs(n, d, dtype=torch.float32))
    for objective in (cloob_reference, cloob_streamed):
        work = lambda o=objective: o(x, y, 10.0, hopfield=False, **SIGMOID).backward()  # noqa: E731
        assert count_flops(work) == 3 * 2 * n * n * d


@both_objectives
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "paper"}, r"contrast='sigmoid' needs scale='unit'"),
        ({"bias": math.nan}, "bias is nan; a finite number is expected"),
        ({"bias": torch.tensor(-math.inf)}, "bias is -inf"),
        ({"bias": torch.ones(2)}, r"bias has shape \(2,\); a single number"),
        ({"inv_tau": -1.0}, r"inv_tau is -1\.0"),
    ],
)
def test_errors_name_the_argument(objective: Loss, change: dict, message: str) -> None:
    arguments = {"image_features": torch.ones(3, 4), "text_features": torch.ones(3, 4), "inv_tau": 30.0}
    with pytest.raises(ValueError, match=message):
        objective(**arguments | SIGMOID | change)
