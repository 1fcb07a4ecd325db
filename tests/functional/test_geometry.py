"""How embeddings lie on the sphere: each measure against plain loops, hand-made data
and definitions.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.functional import geometry
from paper_loops import unit as rows
from support import raises


def shifted(x):
    """Other rows beside them."""
    return x.roll(1, 1)


MEASURES = {
    "spectrum": geometry.covariance_spectrum,
    "effective": geometry.effective_eigenvalues,
    "ajne": geometry.ajne,
    "uniformity": geometry.uniformity,
    "alignment": lambda x: geometry.alignment(x, shifted(x)),
    "gap": lambda x: geometry.modality_gap(x, shifted(x)),
    "saturation": lambda x: geometry.saturation(x, shifted(x), 10.0),
}
each_measure = pytest.mark.parametrize("name", MEASURES)


def distances(x):
    pairs = itertools.combinations(x.tolist(), 2)
    return list(itertools.starmap(math.dist, pairs))


def ajne_loop(x):
    n = len(x)
    angles = [2 * math.asin(min(1, d / 2)) for d in distances(x)]
    return n / 4 - sum(angles) / (math.pi * n)


def uniformity_loop(x):
    potentials = [math.exp(-2 * d**2) for d in distances(x)]
    return math.log(sum(potentials) / len(potentials))


def alignment_loop(x, y):
    lengths = map(math.dist, x.tolist(), y.tolist())
    return sum(length**2 for length in lengths) / len(x)


def saturation_loop(x, y, inv_tau):
    lost = 0.0
    for i, anchor in enumerate(x):
        logits = inv_tau * (y @ anchor)
        terms = [math.exp(logit) for logit in logits]
        lost += 1 - terms[i] / sum(terms)
    return lost / len(x)


def is_close(measured, expected, within=1e-9):
    return float(measured) == pytest.approx(float(expected), abs=within)


@settings(max_examples=40)
@given(
    n=st.integers(2, 9),
    d=st.integers(2, 5),
    seed=st.integers(0, 999),
    chunk=st.integers(1, 12),
)
def test_measures_of_pairs_are_the_loops_for_any_chunk(n, d, seed, chunk):
    x = rows(n, d, seed)
    y = rows(n, d, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "CHUNK", chunk)
        assert is_close(geometry.ajne(x), ajne_loop(x))
        assert is_close(geometry.uniformity(x), uniformity_loop(x))
        assert is_close(geometry.alignment(x, y), alignment_loop(x, y))
        assert is_close(geometry.saturation(x, y, 5.0), saturation_loop(x, y, 5.0))


def test_ajne_is_the_mean_over_half_circles_of_the_squared_excess():
    # Ajne's own definition: A = mean over half circles of (points inside − N/2)² / N,
    # here by a fine grid of them.
    x = rows(9, 2, seed=4)
    n_angles = 200_000
    angle = torch.arange(n_angles, dtype=torch.float64) + 0.5
    angle *= 2 * math.pi / n_angles
    directions = torch.stack([angle.cos(), angle.sin()], dim=1)
    inside = (directions @ x.T > 0).sum(1)
    excess = (inside - 4.5) ** 2 / 9
    assert is_close(geometry.ajne(x), excess.mean(), within=1e-3)


def test_spectrum_of_hand_made_data():
    # Points (±3, 0), (0, ±1): variances 2·9/4 and 2·1/4.
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    x += torch.tensor([7.0, -5])
    spectrum = geometry.covariance_spectrum(x).tolist()
    assert spectrum == pytest.approx([4.5, 0.5])


@pytest.mark.parametrize(("last", "count"), [(10.0, 2), (0.5, 1)])
def test_effective_eigenvalues_hold_99_percent(last, count):
    # variances 50 and last²/2; the first has 99 % of both where last² ≤ 100 / 99
    x = torch.tensor([[10.0, 0], [-10, 0], [0, last], [0, -last]])
    assert int(geometry.effective_eigenvalues(x)) == count


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-7), (torch.float32, 1e-6)]
)
def test_equal_rows(dtype, close):
    x = rows(1, 7, dtype=dtype).repeat(8, 1)
    assert is_close(geometry.ajne(x), 2, within=close)  # N/4
    assert int(geometry.effective_eigenvalues(x)) == 0
    assert not geometry.covariance_spectrum(x).any()
    assert is_close(geometry.uniformity(x), 0, within=1e-12)


def test_gap_of_known_pairs():
    x = torch.tensor([[1.0, 0], [0, 1]])
    y = torch.tensor([[-1.0, 0], [0, 1]])
    gap = geometry.modality_gap
    assert is_close(gap(x, y), 1, within=1e-6)  # centres (±½, ½)
    assert is_close(gap(x, -x), math.sqrt(2), within=1e-6)
    assert is_close(gap(x, x[:1]), math.sqrt(0.5), within=1e-6)


def test_saturation_keeps_its_digits_where_p_is_one():
    x = torch.eye(2, dtype=torch.float64)
    # 1 − p = e^−60 / (1 + e^−60), far below the rounding of 1
    saturated = float(geometry.saturation(x, x, 60.0))
    assert saturated == pytest.approx(math.exp(-60), rel=1e-9)
    assert is_close(geometry.saturation(x, -x, 1e6), 1)
    equal = x[:1].repeat(4, 1)
    by_chance = geometry.saturation(equal, equal, torch.tensor(30.0))
    assert is_close(by_chance, 3 / 4)


@each_measure
def test_dtype_follows_the_input(name):
    x = rows(6, 4)
    single = MEASURES[name](x.float())
    double = MEASURES[name](x)
    if name != "effective":
        assert single.dtype == torch.float32
        assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double.double(), atol=1e-5)


@each_measure
def test_a_row_that_is_no_number_is_named(name):
    bad = torch.ones(5, 3)
    bad[3] = math.nan
    raises(ValueError, "row 3", MEASURES[name], bad)


@pytest.mark.parametrize("name", ["spectrum", "effective", "ajne", "uniformity"])
@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 3, 4)])
def test_other_shapes_are_refused(name, shape):
    raises(ValueError, "expected", MEASURES[name], torch.ones(shape))


def test_integers_are_refused():
    numbers = torch.eye(3).long()
    raises(ValueError, "a floating-point matrix", geometry.ajne, numbers)


def test_sides_that_do_not_fit_are_refused():
    x = rows(4, 3)
    said = r"4 and \w+ 3; pairs"
    raises(ValueError, said, geometry.alignment, x, x[:3])
    raises(ValueError, said, geometry.saturation, x, x[:3], 1.0)
    raises(ValueError, "dimension 2", geometry.modality_gap, x, x[:, :2])
    one_is_zero = torch.tensor([[1.0, 0], [0, 0]])
    raises(ValueError, "row 1 is zero", geometry.ajne, one_is_zero)
    raises(ValueError, "inv_tau", geometry.saturation, x, x, -1.0)
