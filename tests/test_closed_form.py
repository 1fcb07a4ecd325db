"""The closed form against the generalised eigenproblem that defines it and
scikit-learn's CCA.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import eigh
from sklearn.cross_decomposition import CCA

from cloob.functional.cca import PairMoments, canonical_directions


def pairs(n, seed, *, of_a=7, of_b=4):
    """Two views of one cause, with columns of unlike units, and far from zero."""
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=(n, 3))
    a = cause @ rng.normal(size=(3, of_a)) + rng.normal(size=(n, of_a))
    a = a * rng.uniform(0.1, 9, of_a) + 50
    b = cause @ rng.normal(size=(3, of_b)) + rng.normal(size=(n, of_b))
    return torch.from_numpy(a), torch.from_numpy(b)


@given(
    st.integers(9, 60),
    st.integers(0, 99),
    st.sampled_from([0.003, 0.1, 2.0]),
    st.booleans(),
)
def test_directions_solve_the_generalised_eigenproblem(n, seed, ridge, by_column):
    """(0 C_ab; C_ba 0) v = s (R_a 0; 0 R_b) v, solved by scipy as one problem of both
    sides. Tolerance 1e-8.
    """
    a, b = pairs(n, seed)
    x = a.numpy() - a.numpy().mean(0)
    y = b.numpy() - b.numpy().mean(0)
    if by_column:
        x = x / x.std(0)
        y = y / y.std(0)
    left = np.zeros((11, 11))
    right = np.zeros((11, 11))
    left[:7, 7:] = x.T @ y / n
    left[7:, :7] = y.T @ x / n
    for side, at in ((x, slice(0, 7)), (y, slice(7, 11))):
        covariance = side.T @ side / n
        width = len(covariance)
        lift = ridge * np.trace(covariance) / width
        right[at, at] = covariance + lift * np.eye(width)
    values, vectors = (part[..., ::-1][..., :4] for part in eigh(left, right))
    (directions,) = canonical_directions(
        PairMoments.of(a, b), [ridge], by_column=by_column
    )
    assert np.allclose(directions.correlations, values, atol=1e-8)
    scaled = x @ vectors[:7] * values**2
    # both sides of unit variance: a factor √2 each
    expected = scaled @ (y @ vectors[7:]).T * 2
    of_a, of_b = directions.weighted(1.0)
    found = (a - a.mean(0)) @ of_a @ ((b - b.mean(0)) @ of_b).T
    largest = max(1.0, float(np.abs(expected).max()))
    assert np.allclose(found, expected, atol=1e-8 * largest)


def test_with_hardly_a_ridge_it_is_scikit_learns():
    """scikit-learn's CCA has no ridge; it iterates, so the correlations agree to
    1e-5.
    """
    a, b = pairs(300, 0)
    (directions,) = canonical_directions(PairMoments.of(a, b), [1e-12])
    cca = CCA(n_components=3, max_iter=5000, tol=1e-12)
    x, y = cca.fit_transform(a.numpy(), b.numpy())
    theirs = [np.corrcoef(*columns)[0, 1] for columns in zip(x.T, y.T, strict=True)]
    assert directions.correlations[:3].tolist() == pytest.approx(theirs, abs=1e-5)


def test_moments_of_blocks_add():
    """Rows that lie 10⁶ from zero, where sums of squares would keep no digit of a
    float32.
    """
    sizes = [1, 20, 3, 7]
    a, b = pairs(sum(sizes), 0)
    a = a + 1e6
    blocks = list(map(PairMoments.of, a.split(sizes), b.split(sizes)))
    total = sum(blocks[1:], blocks[0])
    whole = PairMoments.of(a, b)
    assert total.count == whole.count
    for name in ("mean_a", "mean_b", "aa", "bb", "ab"):
        torch.testing.assert_close(
            getattr(total, name), getattr(whole, name), rtol=1e-7, atol=1e-6
        )


def test_a_column_that_is_constant_brings_nothing():
    a, b = pairs(50, 1)
    tenth = torch.full((50, 1), 0.1, dtype=torch.float32)
    constant = torch.cat([a, tenth.double()], 1)
    for by_column in (False, True):
        (with_it,) = canonical_directions(
            PairMoments.of(constant, b), [0.1], by_column=by_column
        )
        assert torch.isfinite(with_it.a).all()
        assert with_it.correlations.isfinite().all()
        assert float((with_it.weighted(1.0)[0][-1]).abs().max()) < 1e-6
