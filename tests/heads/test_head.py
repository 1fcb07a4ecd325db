"""Heads as modules: any units, any distance from zero; members by their formula."""

import pytest
import torch
from torch.testing import assert_close

from cloob import Head
from cloob.heads.head import Members, fit_members, head_of, unit_rows
from support import seeded


def rows(n, width, seed=0):
    return torch.randn(n, width, generator=seeded(seed)).double()


@pytest.mark.parametrize("standardise", ["one", "column"])
@pytest.mark.parametrize("change", [lambda x: x + 1e7, lambda x: x * 1e-30])
def test_offset_and_unit_of_float64_change_nothing(standardise, change):
    """Float32 has a unit of 1 at 1e7, and 1e-12 is far above 1e-30."""
    plain = Head(6, 4, standardise=standardise)
    moved = Head(6, 4, standardise=standardise)
    moved.load_state_dict(plain.state_dict())
    x = rows(50, 6)
    plain.fit(x)
    moved.fit(change(x))
    assert_close(plain(x), moved(change(x)), atol=1e-5, rtol=0)


def test_a_constant_column_is_divided_by_one():
    x = rows(40, 3)
    x[:, 1] = 1e6
    head = Head(3, 2, standardise="column")
    head.fit(x)
    assert head.scale[1] == 1
    assert torch.equal(head.standardised(x)[:, 1], torch.zeros(40))


@pytest.mark.parametrize("columns", ["root", "log", "ranks"])
def test_transforms_keep_order_and_sign(columns):
    """By their formulas; ranks are shares of 32 steps between quantiles."""
    x = rows(500, 2) ** 3
    head = Head(2, 2, columns=columns)
    head.fit(x)
    found = head.transformed(x)
    order = x.argsort(0)
    assert (found.gather(0, order).diff(dim=0) >= 0).all()
    if columns == "ranks":
        shares = torch.linspace(0, 1, 500).double()[:, None]
        assert (found.gather(0, order) - shares).abs().max() < 1 / 32
    else:
        size = x.abs().sqrt() if columns == "root" else x.abs().log1p()
        assert_close(found, x.sign() * size)
    again = head_of(head.options)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(x), head(x))


def test_members_are_the_mean_cosine_less_the_hubs():
    """Cosines of joined rows by a plain loop from the formula."""
    torch.manual_seed(0)
    a = rows(30, 6).float()
    b = rows(30, 5, 1).float()
    heads_a = [Head(6, 4), Head(6, 3)]
    heads_b = [Head(5, 4), Head(5, 3)]
    strength = 0.5
    options = {"rows": 30, "strength": strength}
    side_a = Members(heads_a, side=0, **options)
    side_b = Members(heads_b, side=1, **options)
    parts_a = [unit_rows(head, a) for head in heads_a]
    parts_b = [unit_rows(head, b) for head in heads_b]
    fit_members(side_a, side_b, parts_a, parts_b)
    again = head_of(side_a.options)
    again.load_state_dict(side_a.state_dict())
    x = unit_rows(again, a)
    y = unit_rows(side_b, b)

    cosines = sum(p @ q.T / 2 for p, q in zip(parts_a, parts_b, strict=True))
    near_a = cosines.sort(1, descending=True).values[:, :10].mean(1)
    near_b = cosines.sort(0, descending=True).values[:10].mean(0)
    bias_a = strength * (near_a - near_a.mean())
    bias_b = strength * (near_b - near_b.mean())
    expected = (cosines - bias_a[:, None] - bias_b) / 1.5
    assert_close(x @ y.T, expected, atol=1e-5, rtol=0)
