"""Bootstrap intervals against drawn indices, the binomial and definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.functional.bootstrap import bootstrap_interval, stratified_bootstrap
from support import seeded


def test_it_agrees_with_drawing_indices():
    values = torch.tensor([0.0] * 30 + [1.0] * 50 + [4.0] * 20)
    drawn = seeded(1)
    index = torch.randint(0, 100, (20_000, 100), generator=drawn)
    ends = torch.quantile(values[index].mean(1), torch.tensor([0.05, 0.95]))
    interval = bootstrap_interval(values, n=20_000, level=0.9)
    assert interval == pytest.approx(ends.tolist(), abs=0.02)


def test_it_is_a_function_of_its_seed():
    values = torch.arange(10.0)
    state = torch.random.get_rng_state()
    interval = bootstrap_interval(values, seed=3)
    assert interval == bootstrap_interval(values, seed=3)
    assert interval != bootstrap_interval(values, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -2.5]), min_size=1, max_size=30),
    st.integers(0, 99),
)
def test_interval_lies_within_the_values_and_ignores_their_order(values, seed):
    low, high = bootstrap_interval(torch.tensor(values), n=100, seed=seed)
    assert low <= high
    if len(set(values)) > 1:
        assert min(values) - 1e-12 <= low
        assert high <= max(values) + 1e-12
    in_order = torch.tensor(sorted(values))
    assert (low, high) == bootstrap_interval(in_order, n=100, seed=seed)
    if set(values) == {-2.5}:
        assert low == high == -2.5


@given(st.integers(1, 2000), st.floats(0.5, 0.99))
def test_all_right_and_all_wrong_are_as_unsure_as_the_binomial_says(number, level):
    low, high = bootstrap_interval(torch.ones(number), level=level)
    assert high == 1
    # how likely all are right at this rate
    assert low**number == pytest.approx((1 - level) / 2)
    all_wrong = bootstrap_interval(torch.zeros(number), level=level)
    assert all_wrong == pytest.approx((0, 1 - low))
    halves = torch.full((number,), 0.5)
    assert bootstrap_interval(halves, level=level) == (0.5, 0.5)


def test_stratified_bootstrap_weighs_strata_alike():
    small = torch.tensor([1.0, 0.0])
    mean, low, high = stratified_bootstrap([small, torch.zeros(1000)])
    assert mean == pytest.approx(0.25)
    # the small group's resamples are 0, ½ or 1, halved
    assert (low, high) == pytest.approx((0.0, 0.5))
    assert stratified_bootstrap([small])[1:] == bootstrap_interval(small)


def test_rows_of_one_group_are_one_sample():
    once = torch.rand(60, generator=seeded(0))
    often = once.repeat_interleave(4)
    groups = torch.arange(60).repeat_interleave(4)
    expected = bootstrap_interval(once)
    assert bootstrap_interval(often, groups=groups) == pytest.approx(expected)
    assert bootstrap_interval(often)[1] < expected[1]


MISTAKES = [
    ([], {}),
    ([1.0, math.nan], {}),
    ([1.0] * 3, {"level": 1.0}),
    ([1.0] * 3, {"n": 0}),
    ([1.0] * 3, {"groups": torch.ones(2)}),
]


@pytest.mark.parametrize(
    ("values", "options"),
    MISTAKES,
)
def test_errors(values, options):
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval(torch.tensor(values), **options)
    with pytest.raises(ValueError, match="expected"):
        stratified_bootstrap([])
