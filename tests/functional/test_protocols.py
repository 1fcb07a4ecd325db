"""Other people's numbers against plain loops over scores."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.functional import protocols, ranking
from support import raises


def drawn(n, g, seed, coarse):
    """Queries and a gallery; ``coarse`` ones have many ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n + g, 3, generator=generator, dtype=torch.float64)
    rows = rows.round() if coarse else rows
    return rows[:n], rows[n:]


def lost(scores, right, others):
    """How many of the others score at least as much as the right one."""
    return sum(scores[j] >= scores[right] - 1e-12 for j in others)


@given(st.integers(4, 9), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_numbers_of_a_gallery_are_the_loops(n, seed, coarse):
    x, y = drawn(n, n, seed, coarse)
    ranks = ranking.ranks(x, y, torch.arange(n))
    scores = (x @ y.T).tolist()
    places = [1 + lost(row, i, {*range(n)} - {i}) for i, row in enumerate(scores)]
    found = protocols.reciprocal_ranks(ranks)
    assert found.tolist() == pytest.approx([1 / place for place in places])
    for share in (0.001, 0.01, 0.05, 0.25, 0.5, 1.0):
        size = max(1, math.ceil(round(share * n, 6)))
        within = protocols.top_share(ranks, share, n)
        assert within.tolist() == [place <= size for place in places]
    for n_choices in (2, 3, n):
        expected = []
        for i, row in enumerate(scores):
            draws = [*itertools.combinations({*range(n)} - {i}, n_choices - 1)]
            won = [lost(row, i, draw) == 0 for draw in draws]
            expected.append(sum(won) / len(won))
        found = protocols.choose_one(ranks, n_choices, n)
        assert found.tolist() == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(2, 8), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ranks_among_candidates_are_the_loops(n, g, seed, coarse):
    x, y = drawn(n, g, seed, coarse)
    generator = torch.Generator().manual_seed(seed)
    pairs, right = [], []
    for i in range(n):
        listed = torch.randint(g, (5,), generator=generator).tolist()  # some twice
        answers = {listed[0], listed[1]}
        pairs += [(i, j) for j in listed]
        right += [j in answers for j in listed]
    order = torch.randperm(len(pairs), generator=generator)
    ranks, sizes = protocols.candidate_ranks(
        x, y, torch.tensor(pairs)[order], torch.tensor(right)[order]
    )
    for i in range(n):
        row = (x[i] @ y.T).tolist()
        mine = [(j, r) for (q, j), r in zip(pairs, right, strict=True) if q == i]
        wrong = {j for j, r in mine if not r}
        best = max((j for j, r in mine if r), key=row.__getitem__)
        assert int(ranks[i]) == lost(row, best, wrong)
        assert int(sizes[i]) == len(wrong) + 1


def test_all_candidates_are_the_gallery_and_bad_rows_are_last():
    x, y = drawn(6, 6, 0, coarse=False)
    x[1, 0], y[2, 0] = math.nan, math.inf
    every = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    ranks, sizes = protocols.candidate_ranks(x, y, every, every[:, 0] == every[:, 1])
    assert torch.equal(ranks, ranking.ranks(x, y, torch.arange(6)))
    assert sizes.tolist() == [6] * 6
    assert ranks[1] == ranks[2] == ranking.UNRANKED
    assert protocols.reciprocal_ranks(ranks)[[1, 2]].tolist() == [0, 0]
    assert protocols.choose_one(ranks, 2, 6)[1] == 0
    assert not protocols.top_share(ranks, 1.0, 6)[1]


def test_chance_is_what_rows_without_any_meaning_reach():
    generator = torch.Generator().manual_seed(0)
    size = 40
    ranks = torch.randint(size, (200_000,), generator=generator)
    chance = float(protocols.reciprocal_chance(size))
    assert float(protocols.reciprocal_ranks(ranks).mean()) == pytest.approx(
        chance, rel=0.02
    )
    assert float(protocols.choose_one(ranks, 10, size).mean()) == pytest.approx(
        0.1, rel=0.02
    )
    hits = protocols.top_share(ranks, 0.05, size).double()
    assert float(hits.mean()) == pytest.approx(0.05, rel=0.05)
    sizes = protocols.reciprocal_chance(torch.tensor([1, 2, 4])).tolist()
    assert sizes == pytest.approx([1, 0.75, 25 / 48])
    assert protocols.share_size(0.01, 300) == 3 and protocols.share_size(0.01, 301) == 4


@pytest.mark.parametrize("n", [1, 5, 6, 40, 151])
def test_the_interval_of_a_median_covers_it(n):
    generator = torch.Generator().manual_seed(n)
    covered, draws = 0, 400
    for _ in range(draws):
        values = torch.randn(n, generator=generator)
        low, high = protocols.median_interval(values)
        assert low <= statistics.median(values.tolist()) <= high
        covered += low <= 0 <= high
    assert covered >= (0.93 * draws if n > 5 else 0)
    assert protocols.median_interval(torch.tensor([3.0, math.inf]))[1] == math.inf


def test_what_does_not_fit_is_refused():
    x, y = drawn(2, 3, 0, coarse=False)
    both = torch.tensor([[0, 0], [1, 1]])
    one = torch.tensor([True, False])
    raises(
        ValueError, "query 1 has no right", protocols.candidate_ranks, x, y, both, one
    )
    far = torch.tensor([[0, 0], [1, 3]])
    raises(
        ValueError, "gallery row 0 to 3 of 3", protocols.candidate_ranks, x, y, far, one
    )
    raises(ValueError, "2 to 3 are there", protocols.choose_one, torch.zeros(1), 4, 3)
