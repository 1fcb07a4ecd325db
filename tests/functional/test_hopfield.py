"""Hopfield retrieval against the loop of Eq. 4; both backends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloob.functional import hopfield_retrieval, streamed
from paper_loops import retrieval_loop, unit

Retrieval = Callable[..., Tensor]
both_backends = pytest.mark.parametrize("retrieve", [hopfield_retrieval, streamed.hopfield_retrieval])


@both_backends
@pytest.mark.parametrize("beta", [1e-3, 0.5, 8.0, 60.0, 1e3])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 3), (2, 2, 2), (5, 7, 4), (6, 3, 8)])
def test_equals_the_loop(retrieve: Retrieval, beta: float, n: int, m: int, d: int) -> None:
    state, stored = unit(n, d, 0), unit(m, d, 1)
    found = retrieve(state, stored, beta)
    expected = torch.tensor(retrieval_loop(state.tolist(), stored.tolist(), beta), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(n, dtype=torch.float64))


@both_backends
def test_a_pattern_stored_twice_weighs_twice(retrieve: Retrieval) -> None:
    a, b, query = unit(3, 4, 3)
    found = retrieve(query[None], torch.stack([a, a, b]), 3.0)
    weighted = 2 * math.exp(3 * float(query @ a)) * a + math.exp(3 * float(query @ b)) * b
    torch.testing.assert_close(found[0], weighted / weighted.norm())


@both_backends
def test_beta_leads_from_the_mean_to_the_nearest_pattern(retrieve: Retrieval) -> None:
    state, stored = unit(4, 5, 0), unit(6, 5, 1)
    mean, nearest = stored.mean(dim=0), stored[(state @ stored.T).argmax(dim=1)]
    torch.testing.assert_close(retrieve(state, stored, 1e-6), (mean / mean.norm()).expand(4, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(retrieve(state, stored, 1e4), nearest)


@both_backends
@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 10**6), beta=st.floats(1e-2, 100.0))
@settings(max_examples=25)
def test_order_of_the_memory_is_no_matter_and_order_of_the_queries_is_kept(
    retrieve: Retrieval, n: int, m: int, seed: int, beta: float
) -> None:
    state, stored = unit(n, 4, seed), unit(m, 4, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(m, generator=generator)
    found = retrieve(state, stored, beta)
    torch.testing.assert_close(retrieve(state[rows], stored[columns], beta), found[rows], rtol=1e-7, atol=1e-8)


@both_backends
@pytest.mark.parametrize("beta", [1e-3, 2.0, 80.0])
def test_gradcheck(retrieve: Retrieval, beta: float) -> None:
    inputs = [unit(3, 4, 0), unit(5, 4, 1), torch.tensor(beta, dtype=torch.float64)]
    assert torch.autograd.gradcheck(retrieve, [t.requires_grad_() for t in inputs])


@both_backends
@pytest.mark.parametrize("beta", [2.0, 100.0])
def test_an_average_of_zero_stays_zero_with_zero_gradient(retrieve: Retrieval, beta: float) -> None:
    stored = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    state = torch.tensor([[0.0, 1.0], [0.6, 0.8]], requires_grad=True)
    found = retrieve(state, stored, beta)
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1, 0].item() == pytest.approx(1.0)
    found[0].sum().backward()
    assert not state.grad.any() and not stored.grad.any()


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_computed_in_float32(retrieve: Retrieval, dtype: torch.dtype) -> None:
    state, stored = unit(5, 8, 0).to(dtype), unit(7, 8, 1).to(dtype)
    found = retrieve(state, stored, 8.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, retrieve(state.float(), stored.float(), 8.0))


@both_backends
def test_autocast_is_without_effect(retrieve: Retrieval) -> None:
    state, stored = unit(5, 8, 0, torch.float32), unit(7, 8, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert (state @ stored.T).dtype == torch.bfloat16
        inside = retrieve(state, stored=stored, beta=8.0)
        named = retrieve(beta=8.0, state=state, stored=stored)
    assert torch.equal(inside, retrieve(state, stored, 8.0)) and torch.equal(named, inside)


@both_backends
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": [[1.0, 0.0]]}, TypeError, "state is a list"),
        ({"state": torch.ones(4)}, ValueError, r"state has shape \(4,\).*a floating-point matrix"),
        ({"stored": torch.ones(2, 4, dtype=torch.int64)}, ValueError, "stored has shape .* dtype torch.int64"),
        ({"stored": torch.ones(2, 3)}, ValueError, "stored has embedding dimension 3, but state has 4"),
        (
            {"stored": torch.ones(2, 4).double()},
            ValueError,
            "stored has dtype torch.float64, but state has torch.float32",
        ),
        ({"stored": torch.ones(2, 4, device="meta")}, ValueError, "stored has device meta, but state has cpu"),
        ({"stored": torch.ones(0, 4)}, ValueError, "empty memory"),
        ({"beta": 0.0}, ValueError, r"beta is 0\.0; a positive"),
        ({"beta": -1.0}, ValueError, r"beta is -1\.0"),
        ({"beta": math.nan}, ValueError, "beta is nan"),
        ({"beta": torch.tensor(math.inf)}, ValueError, "beta is inf"),
        ({"beta": torch.ones(2)}, ValueError, r"beta has shape \(2,\); a single number"),
    ],
)
def test_errors_name_the_argument(retrieve: Retrieval, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"state": torch.ones(3, 4), "stored": torch.ones(2, 4), "beta": 8.0} | change
    with pytest.raises(error, match=message):
        retrieve(**arguments)


@both_backends
def test_a_row_that_is_not_finite_is_not_hidden(retrieve: Retrieval) -> None:
    """Where nothing looks at the rows, as in a compiled graph, the loss has to say so."""
    stored = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    stored[2, 0] = math.nan
    assert retrieve(stored[:2], stored, 8.0).isnan().all()
