"""One direction of InfoLOOB and InfoNCE against the loop of Eq. 3; both backends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cloob import functional
from cloob.functional import streamed
from paper_loops import contrast_loop, relative_error, unit, value_and_gradients

Direction = Callable[..., Tensor]
BACKENDS = {"reference": functional, "streamed": streamed}
each_direction = pytest.mark.parametrize(
    ("name", "direction"),
    [
        pytest.param(name, getattr(backend, f"info_{name[4:]}"), id=f"{name}-{key}")
        for name in ("infoloob", "infonce")
        for key, backend in BACKENDS.items()
    ],
)


@each_direction
@pytest.mark.parametrize("inv_tau", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize(("n", "m", "offset"), [(2, 2, 0), (7, 7, 0), (3, 8, 0), (3, 8, 4), (3, 8, 5), (1, 2, 1)])
def test_equals_the_loop(name: str, direction: Direction, inv_tau: float, n: int, m: int, offset: int) -> None:
    anchors, candidates = unit(n, 5, 0), unit(m, 5, 1)
    expected = contrast_loop(name, anchors.tolist(), candidates.tolist(), inv_tau, offset)
    value = direction(anchors, candidates, inv_tau, positive_offset=offset)
    assert value.ndim == 0 and value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


@each_direction
@given(
    ids=st.lists(st.integers(-2, 2), min_size=2, max_size=7),
    seed=st.integers(0, 10**6),
    inv_tau=st.sampled_from([0.5, 30.0]),
)
@settings(max_examples=25)
def test_equals_the_loop_with_ids(name: str, direction: Direction, ids: list[int], seed: int, inv_tau: float) -> None:
    anchors, candidates = unit(len(ids), 4, seed), unit(len(ids), 4, seed + 1)
    expected = contrast_loop(name, anchors.tolist(), candidates.tolist(), inv_tau, 0, ids)
    value = direction(anchors, candidates, inv_tau, ids=torch.tensor(ids))
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)


@each_direction
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_candidates_with_ids_of_their_own(name: str, direction: Direction, dtype: torch.dtype) -> None:
    anchors, candidates = unit(3, 4, 0), unit(6, 4, 1)
    ids, candidate_ids = [1, 2, 3], [9, 1, 2, 3, 1, 2]
    expected = contrast_loop(name, anchors.tolist(), candidates.tolist(), 5.0, 1, ids, candidate_ids)
    given_ids = {"ids": torch.tensor(ids, dtype=dtype), "candidate_ids": torch.tensor(candidate_ids, dtype=dtype)}
    value = direction(anchors, candidates, 5.0, positive_offset=1, **given_ids)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@each_direction
def test_an_anchor_without_negatives_adds_zero_value_and_gradient(name: str, direction: Direction) -> None:
    # Anchor 0 has no negatives: its id is everywhere. Anchors 1 and 2 have the candidates 0 and 3, 0 and 1.
    anchors, candidates = unit(3, 4, 0), unit(4, 4, 1)
    ids, candidate_ids = torch.tensor([7, 1, 2]), torch.tensor([7, 7, 7, 7])
    own = torch.tensor([7, 7, 7])
    loss, d_anchors, d_candidates, d_inv_tau = value_and_gradients(
        lambda a, c, t: direction(a, c, t, ids=own, candidate_ids=candidate_ids),
        anchors,
        candidates,
        torch.tensor(30.0),
    )
    assert loss == 0 and not d_anchors.any() and not d_candidates.any() and d_inv_tau == 0
    loss, d_anchors, *_ = value_and_gradients(
        lambda a, c: direction(a, c, 30.0, ids=ids, candidate_ids=candidate_ids), anchors, candidates
    )
    expected = contrast_loop(name, anchors.tolist(), candidates.tolist(), 30.0, 0, [7, 1, 2], [7, 7, 7, 7])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert not d_anchors[0].any() and d_anchors[1:].isfinite().all() and d_anchors[1:].any(dim=1).all()


@each_direction
def test_duplicate_rows(name: str, direction: Direction) -> None:
    rows = unit(3, 4, 0)[[0, 0, 1, 2, 2, 2]]
    expected = contrast_loop(name, rows.tolist(), rows.tolist(), 100.0)
    value, gradient = value_and_gradients(lambda a: direction(a, a, 100.0), rows)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert gradient.isfinite().all()


@each_direction
def test_far_from_overflow_in_float32(name: str, direction: Direction) -> None:
    anchors, candidates = unit(6, 4, 0), unit(6, 4, 1)
    exact = value_and_gradients(lambda a, c: direction(a, c, 1e3), anchors, candidates)
    single = value_and_gradients(lambda a, c: direction(a, c, 1e3), anchors.float(), candidates.float())
    for got, expected in zip(single, exact, strict=True):
        assert relative_error(got, expected) < 1e-3  # logits of 1,000 keep four digits behind the point
    # A positive that wins by more than exp() can hold: each loss is −2τ⁻¹, or zero.
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    value, *gradients = value_and_gradients(lambda a, c: direction(a, c, 1e3), axis, axis)
    assert value.item() == (-2000.0 if name == "infoloob" else 0.0)
    assert all(g.isfinite().all() for g in gradients)


@each_direction
def test_gradcheck(name: str, direction: Direction) -> None:
    ids, candidate_ids = torch.tensor([1, 1, 2]), torch.tensor([3, 1, 1, 2, 1])

    def loss(anchors: Tensor, candidates: Tensor, inv_tau: Tensor) -> Tensor:
        return direction(anchors, candidates, inv_tau, positive_offset=1, ids=ids, candidate_ids=candidate_ids)

    inputs = [unit(3, 4, 0), unit(5, 4, 1), torch.tensor(3.0, dtype=torch.float64)]
    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in inputs])


@each_direction
@given(n=st.integers(2, 6), seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_joint_order_is_no_matter(name: str, direction: Direction, n: int, seed: int) -> None:
    anchors, candidates = unit(n, 4, seed), unit(n, 4, seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    there, here = direction(anchors[order], candidates[order], 30.0), direction(anchors, candidates, 30.0)
    torch.testing.assert_close(there, here, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_infoloob_with_the_positive_added_back_is_infonce(backend: object) -> None:
    anchors, candidates = unit(5, 4, 0), unit(5, 4, 1)
    # ln((e^s + Σ) / e^s) = ln(1 + Σ / e^s) = softplus of InfoLOOB, anchor by anchor.
    one_by_one = [
        F.softplus(backend.info_loob(anchors[i : i + 1], candidates, 7.0, positive_offset=i)) for i in range(5)
    ]
    torch.testing.assert_close(torch.stack(one_by_one).mean(), backend.info_nce(anchors, candidates, 7.0))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_infonce_saturates_and_infoloob_does_not(backend: object) -> None:
    rows = torch.eye(4, dtype=torch.float64)
    _, nce = value_and_gradients(lambda a: backend.info_nce(a, rows, 100.0), rows)
    _, loob = value_and_gradients(lambda a: backend.info_loob(a, rows, 100.0), rows)
    assert nce.norm() < 1e-30 and loob.norm() > 1


@each_direction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(
    name: str, direction: Direction, dtype: torch.dtype
) -> None:
    anchors, candidates = unit(5, 8, 0).to(dtype), unit(5, 8, 1).to(dtype)
    plain = direction(anchors.float(), candidates.float(), 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = direction(anchors.float(), candidates.float(), 30.0)
    assert plain.dtype == torch.float32
    assert plain == inside == direction(anchors, candidates, 30.0)


@each_direction
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchors": None}, TypeError, "anchors is a NoneType"),
        ({"anchors": torch.ones(3, 4, 1)}, ValueError, r"anchors has shape \(3, 4, 1\)"),
        ({"candidates": torch.ones(3, 5)}, ValueError, "candidates has embedding dimension 5, but anchors has 4"),
        ({"anchors": torch.ones(0, 4)}, ValueError, "0 anchors and 3 candidates"),
        ({"anchors": torch.ones(1, 4), "candidates": torch.ones(1, 4)}, ValueError, "1 anchors and 1 candidates"),
        ({"positive_offset": 1}, ValueError, "positive_offset 1 puts the positives of 3 anchors outside 3 candidates"),
        ({"positive_offset": -1}, ValueError, "positive_offset -1"),
        ({"anchors": torch.ones(4, 4)}, ValueError, "positives of 4 anchors outside 3"),
        ({"inv_tau": 0.0}, ValueError, r"inv_tau is 0\.0"),
        ({"inv_tau": torch.tensor(math.nan)}, ValueError, "inv_tau is nan"),
        ({"ids": torch.tensor([1, 2])}, ValueError, r"ids has shape \(2,\) .*; 3 integers are expected"),
        ({"ids": torch.ones(3)}, ValueError, r"ids has shape \(3,\) and dtype torch.float32"),
        ({"ids": [1, 2, 3]}, TypeError, "ids is a list; a tensor of 3 integers is expected"),
        ({"ids": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "ids has device meta, .* cpu"),
        ({"candidate_ids": torch.tensor([1, 2, 3])}, ValueError, "candidate_ids were given without ids"),
        (
            {"ids": torch.tensor([1, 2, 3]), "candidate_ids": torch.tensor([1, 2])},
            ValueError,
            r"candidate_ids has shape \(2,\)",
        ),
        (
            {"ids": torch.tensor([1, 2]), "anchors": torch.ones(2, 4)},
            ValueError,
            "ids of 2 anchors need candidate_ids of the 3 candidates",
        ),
    ],
)
def test_errors_name_the_argument(
    name: str, direction: Direction, change: dict, error: type[Exception], message: str
) -> None:
    arguments = {"anchors": torch.ones(3, 4), "candidates": torch.ones(3, 4), "inv_tau": 30.0} | change
    with pytest.raises(error, match=message):
        direction(**arguments)
