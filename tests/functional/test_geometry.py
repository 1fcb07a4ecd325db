"""Geometry against plain loops, hand-computed numbers, and the definitions the closed forms come from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.functional import geometry as g
from paper_loops import unit

MEASURES = {
    "spectrum": g.covariance_spectrum,
    "effective": g.effective_eigenvalues,
    "ajne": g.ajne,
    "uniformity": g.uniformity,
    "alignment": lambda x: g.alignment(x, x.roll(1, 1)),
    "gap": lambda x: g.modality_gap(x, x.roll(1, 1)),
    "saturation": lambda x: g.saturation(x, x.roll(1, 1), 10.0),
}


def loops(x, y):
    """Each pairwise measure, pair by pair."""
    near = [(x[i] - x[j]).square().sum().item() for i in range(len(x)) for j in range(i)]
    angles = sum(2 * math.asin(min(1.0, math.sqrt(d) / 2)) for d in near)
    p = [math.exp(5 * float(a @ y[i])) / sum(math.exp(5 * float(a @ c)) for c in y) for i, a in enumerate(x)]
    return {
        "ajne": len(x) / 4 - angles / (math.pi * len(x)),
        "uniformity": math.log(sum(math.exp(-3 * d) for d in near) / len(near)),
        "saturation": 1 - sum(p) / len(p),
        "alignment": sum(math.dist(a, b) ** 1.5 for a, b in zip(x.tolist(), y.tolist(), strict=True)) / len(x),
    }


@settings(max_examples=40)
@given(n=st.integers(2, 9), d=st.integers(2, 5), seed=st.integers(0, 999), chunk=st.integers(1, 12))
def test_measures_of_pairs_are_the_loops_for_any_chunk(n, d, seed, chunk):
    x, y = unit(n, d, seed), unit(n, d, seed + 1)
    found = {
        "ajne": g.ajne(x, chunk=chunk),
        "uniformity": g.uniformity(x, t=3, chunk=chunk),
        "saturation": g.saturation(x, y, 5.0, chunk=chunk),
        "alignment": g.alignment(x, y, alpha=1.5),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(loops(x, y), abs=1e-9)


def test_ajne_is_the_mean_over_half_circles_of_the_squared_excess():
    # Ajne's own definition: A = mean over half circles of (points inside − N/2)² / N, here by a fine grid of them.
    x = unit(9, 2, seed=4)
    angle = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (2 * math.pi / 200_000)
    inside = (torch.stack([angle.cos(), angle.sin()], 1) @ x.T > 0).sum(1)
    assert float(g.ajne(x)) == pytest.approx(float(((inside - 4.5) ** 2 / 9).mean()), abs=1e-3)


def test_spectrum_of_hand_made_data():
    # Points (±3, 0), (0, ±1): variances 2·9/4 and 2·1/4.
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]) + torch.tensor([7.0, -5])
    assert g.covariance_spectrum(x).tolist() == pytest.approx([4.5, 0.5])
    assert int(g.effective_eigenvalues(x, 0.9)) == 1
    assert int(g.effective_eigenvalues(x, 0.91)) == 2


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-7), (torch.float32, 1e-6)])
def test_equal_rows(dtype, close):
    x = unit(1, 7, dtype=dtype).repeat(8, 1)
    assert float(g.ajne(x)) == pytest.approx(2, abs=close)  # N/4
    assert int(g.effective_eigenvalues(x)) == 0 and not g.covariance_spectrum(x).any()
    assert float(g.uniformity(x)) == pytest.approx(0, abs=1e-12)


def test_alignment_and_gap_of_known_pairs():
    x = torch.tensor([[1.0, 0], [0, 1]])
    y = torch.tensor([[-1.0, 0], [0, 1]])
    assert float(g.alignment(x, y)) == pytest.approx((4 + 0) / 2)
    assert float(g.alignment(x, y, alpha=1)) == pytest.approx((2 + 0) / 2)
    assert float(g.modality_gap(x, y)) == pytest.approx(1.0)  # centres (½, ½) and (−½, ½)
    assert float(g.modality_gap(x, -x)) == pytest.approx(math.sqrt(2))
    assert float(g.modality_gap(x, x[:1])) == pytest.approx(math.sqrt(0.5))


def test_saturation_keeps_its_digits_where_p_is_one():
    x = torch.eye(2, dtype=torch.float64)  # 1 − p = e^−60 / (1 + e^−60), far below the rounding of 1
    assert float(g.saturation(x, x, 60.0)) == pytest.approx(math.exp(-60), rel=1e-9)
    assert float(g.saturation(x, -x, 1e6)) == pytest.approx(1.0)
    assert float(g.saturation(x[:1].repeat(4, 1), x[:1].repeat(4, 1), torch.tensor(30.0))) == pytest.approx(3 / 4)


@settings(max_examples=30)
@given(n=st.integers(2, 12), d=st.integers(1, 6), seed=st.integers(0, 1000), repeats=st.integers(1, 3))
def test_values_stay_in_their_ranges(n, d, seed, repeats):
    x = unit(n, d, seed).repeat(repeats, 1)  # duplicate rows
    assert 0 <= g.ajne(x) <= len(x) / 4 + 1e-6
    assert -8 - 1e-12 <= g.uniformity(x) <= 1e-12
    assert 0 <= g.saturation(x, x, 30.0) <= 1
    assert 0 <= g.effective_eigenvalues(x, 1.0) <= min(n - 1, d)
    spectrum = g.covariance_spectrum(x)
    assert spectrum.shape == (d,) and (spectrum >= 0).all() and (spectrum.diff() <= 0).all()
    assert float(spectrum.sum()) == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()), abs=1e-12)


def test_dtype_follows_the_input():
    x = unit(6, 4)
    for name, measure in MEASURES.items():
        single, double = measure(x.float()), measure(x)
        assert name == "effective" or (single.dtype, double.dtype) == (torch.float32, torch.float64)
        assert torch.allclose(single.double(), double.double(), atol=1e-5)


X, ZERO, NAN = unit(4, 3), torch.tensor([[1.0, 0], [0, 0]]), torch.ones(5, 3).index_fill_(0, torch.tensor(3), math.nan)
MISSHAPEN = (torch.ones(1, 3), torch.ones(3), torch.ones(2, 3, 4), torch.ones(3, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda measure=measure: measure(NAN), "row 3") for measure in MEASURES.values()),
        *(
            (lambda measure=measure, bad=bad: measure(bad), "expected")
            for measure in (g.covariance_spectrum, g.effective_eigenvalues, g.ajne, g.uniformity)
            for bad in MISSHAPEN
        ),
        *((lambda bad=bad: g.saturation(bad, bad, 1.0), "expected") for bad in MISSHAPEN),
        (lambda: g.alignment(X, X[:3]), "x 4 and y 3"),
        (lambda: g.modality_gap(X, X[:, :2]), "dimension 2"),
        (lambda: g.ajne(ZERO), "row 1 is zero"),
        (lambda: g.saturation(X, X, -1.0), "inv_tau"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
