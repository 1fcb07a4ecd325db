"""The bootstrap against the distribution that it claims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.functional.bootstrap import bootstrap_interval, grouped_bootstrap, paired_bootstrap


def test_bootstrap_agrees_with_drawing_indices() -> None:
    values = torch.tensor([0.0] * 30 + [1.0] * 50 + [4.0] * 20)
    index = torch.randint(0, 100, (20_000, 100), generator=torch.Generator().manual_seed(1))
    expected = torch.quantile(values[index].mean(1), torch.tensor([0.05, 0.95])).tolist()
    assert bootstrap_interval(values, n=20_000, level=0.9) == pytest.approx(expected, abs=0.02)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0.0, 1.0, -2.5]), min_size=1, max_size=30), st.integers(0, 99))
def test_interval_lies_within_the_values_and_ignores_their_order(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(torch.tensor(values), n=100, seed=seed)
    assert low <= high
    if len(set(values)) > 1:
        assert min(values) <= low + 1e-12 and high <= max(values) + 1e-12
    assert (low, high) == bootstrap_interval(torch.tensor(sorted(values)), n=100, seed=seed)
    if set(values) == {-2.5}:
        assert low == high == -2.5


@given(st.integers(1, 2000), st.floats(0.5, 0.99))
def test_all_right_and_all_wrong_are_as_unsure_as_the_binomial_says(number: int, level: float) -> None:
    low, high = bootstrap_interval(torch.ones(number), level=level)
    assert high == 1
    assert low**number == pytest.approx((1 - level) / 2)  # how likely all are right at this rate
    assert bootstrap_interval(torch.zeros(number), level=level) == pytest.approx((0, 1 - low))
    assert bootstrap_interval(torch.full((number,), 0.5), level=level) == (0.5, 0.5)


def test_paired_bootstrap_is_tighter_than_two_intervals() -> None:
    a = torch.arange(200) % 2 == 0
    b = a.clone()
    b[:10] = False  # five samples lost
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(5 / 200)
    assert 0 < low < difference < high < 0.06
    assert paired_bootstrap(b, a)[0] == pytest.approx(-5 / 200)
    with pytest.raises(ValueError, match="differ in shape"):
        paired_bootstrap(a, b[:9])


def test_grouped_bootstrap_weighs_groups_alike() -> None:
    small, large = torch.tensor([1.0, 0.0]), torch.zeros(1000)
    mean, low, high = grouped_bootstrap([small, large])
    assert mean == pytest.approx(0.25)
    assert (low, high) == pytest.approx((0.0, 0.5))  # the small group's resamples are 0, ½ or 1, halved
    assert grouped_bootstrap([small])[1:] == bootstrap_interval(small)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_interval(torch.ones(0)),
        lambda: bootstrap_interval(torch.tensor([1.0, float("nan")])),
        lambda: bootstrap_interval(torch.ones(3), level=1.0),
        lambda: bootstrap_interval(torch.ones(3), n=0),
        lambda: grouped_bootstrap([]),
    ],
)
def test_bootstrap_errors(call) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()


def test_rows_of_one_group_are_one_sample() -> None:
    once, other = (torch.rand(60, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    groups = torch.arange(60).repeat_interleave(4)
    often, its_other = once.repeat_interleave(4), other.repeat_interleave(4)
    assert bootstrap_interval(often, groups=groups) == pytest.approx(bootstrap_interval(once))
    assert paired_bootstrap(often, its_other, groups=groups) == pytest.approx(paired_bootstrap(once, other))
    assert bootstrap_interval(often)[1] < bootstrap_interval(once)[1]
