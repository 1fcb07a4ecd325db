"""The nearest rows, against a plain loop."""

import math
import operator

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.evaluation.nearest import nearest
from support import seeded


def loop(query, others, k):
    """For each row, the numbers and products of the k best of the others."""
    found = []
    for row in query.double().tolist():
        products = []
        for number, other in enumerate(others.double().tolist()):
            product = math.fsum(map(operator.mul, row, other))
            products.append((-product, number))
        found.append(sorted(products)[:k])
    scores = [[-score for score, _ in best] for best in found]
    return np.array(scores), np.array(
        [[number for _, number in best] for best in found]
    )


@st.composite
def cases(draw):
    """Rows of few different numbers, so that many products are equal."""
    generator = seeded(draw(st.integers(0, 10**6)))
    n_queries, n, width = (draw(st.integers(1, most)) for most in (5, 40, 4))
    few = draw(st.booleans())
    sides = []
    for size in (n_queries, n):
        drawn = torch.randn(size, width, generator=generator)
        sides.append(drawn.round().clamp(-1, 1) if few else drawn)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=5)))
    return *(side.to(dtype) for side in sides), draw(st.integers(1, 12)), cuts


@given(cases())
@settings(max_examples=200, deadline=None)
def test_it_is_the_loop_whatever_the_blocks(case):
    query, others, k, cuts = case
    expected, numbers = loop(query, others, k)
    blocks = [part for part in others.tensor_split(cuts) if len(part)]
    for parts in (blocks, [others], others.split(1)):
        scores, rows = nearest(query, parts, k)
        np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)
        assert rows.dtype == np.int64
        assert (rows == numbers).all()


def test_rounding_in_float32_decides_nothing():
    """Thousands of nearly equal rows, whose order float32 gets wrong."""
    generator = seeded(0)
    cone = torch.randn(1, 64, generator=generator)
    rows = cone + 1e-4 * torch.randn(3000, 64, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    query = rows[:7]
    exact = (query.double() @ rows.double().T).numpy()
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :20]
    answers = [nearest(query, rows.split(size), 20) for size in (1, 7, 100, 3000)]
    for scores, found in answers:
        assert (found == expected).all()
        assert (scores == answers[0][0]).all()


def test_no_block():
    scores, rows = nearest(torch.ones(2, 3), [], 4)
    assert scores.shape == rows.shape == (2, 0)
