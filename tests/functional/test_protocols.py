"""Other people's numbers against plain loops over scores."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.functional import protocols, ranking
from support import raises, seeded


def drawn(n, g, seed, coarse):
    """Queries and a gallery; ``coarse`` ones have many ties."""
    generator = seeded(seed)
    rows = torch.randn(n + g, 3, generator=generator, dtype=torch.float64)
    rows = rows.round() if coarse else rows
    return rows[:n], rows[n:]


def lost(scores, right, others):
    """How many of the others score at least as much as the right one."""
    least = scores[right] - 1e-12
    return sum(scores[j] >= least for j in others)


SEEDS = st.integers(0, 10**6)


@given(st.integers(4, 9), SEEDS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_numbers_of_a_gallery_are_the_loops(n, seed, coarse):
    x, y = drawn(n, n, seed, coarse)
    ranks = ranking.ranks(x, y, torch.arange(n))
    scores = (x @ y.T).tolist()
    others = [{*range(n)} - {i} for i in range(n)]
    places = [1 + lost(row, i, others[i]) for i, row in enumerate(scores)]
    found = protocols.reciprocal_ranks(ranks)
    assert found.tolist() == pytest.approx([1 / place for place in places])
    for share in (0.001, 0.01, 0.05, 0.25, 0.5, 1.0):
        size = max(1, math.ceil(round(share * n, 6)))
        within = protocols.top_share(ranks, share, n)
        assert within.tolist() == [place <= size for place in places]
    for n_choices in (2, 3, n):
        expected = []
        for i, row in enumerate(scores):
            draws = itertools.combinations(others[i], n_choices - 1)
            won = [lost(row, i, draw) == 0 for draw in draws]
            expected.append(statistics.mean(won))
        found = protocols.choose_one(ranks, n_choices, n)
        assert found.tolist() == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(2, 8), SEEDS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_ranks_among_candidates_are_the_loops(n, g, seed, coarse):
    x, y = drawn(n, g, seed, coarse)
    generator = seeded(seed)
    pairs = []
    right = []
    for i in range(n):
        listed = torch.randint(g, (5,), generator=generator).tolist()  # some twice
        answers = {listed[0], listed[1]}
        pairs += [(i, j) for j in listed]
        right += [j in answers for j in listed]
    order = torch.randperm(len(pairs), generator=generator)
    listed = torch.tensor(pairs)[order]
    is_right = torch.tensor(right)[order]
    found = protocols.candidate_ranks(x, y, listed, is_right)
    for i in range(n):
        scores = (x[i] @ y.T).tolist()
        own = listed[:, 0] == i
        answers = {*listed[own & is_right, 1].tolist()}
        wrong = {*listed[own & ~is_right, 1].tolist()}
        best = max(answers, key=scores.__getitem__)
        assert int(found.ranks[i]) == lost(scores, best, wrong)
        assert int(found.n_wrong[i]) == len(wrong)
        assert int(found.n_right[i]) == len(answers)


def test_all_candidates_are_the_gallery_and_bad_rows_are_last():
    x, y = drawn(6, 6, 0, coarse=False)
    x[1, 0] = math.nan
    y[2, 0] = math.inf
    every = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    is_own = every[:, 0] == every[:, 1]
    ranks, n_right, n_wrong = protocols.candidate_ranks(x, y, every, is_own)
    assert torch.equal(ranks, ranking.ranks(x, y, torch.arange(6)))
    assert n_right.tolist() == [1] * 6
    assert n_wrong.tolist() == [5] * 6
    last = ranks[1:3]
    assert last.tolist() == [ranking.UNRANKED] * 2
    assert not protocols.reciprocal_ranks(last).any()
    assert not protocols.choose_one(last, 2, 6).any()
    assert not protocols.top_share(last, 1.0, 6).any()


@pytest.mark.parametrize("n_right", [1, 3])
def test_chance_is_what_scores_without_any_meaning_reach(n_right):
    """Galleries of two sizes; any of the right rows is an answer."""
    generator = seeded(0)
    kinds = torch.tensor([[n_right, 39], [1, 24]])
    n_right, n_wrong = kinds[torch.arange(60_000) % 2].T
    scores = torch.rand(60_000, 42, generator=generator)
    places = torch.arange(42)
    is_other = places >= n_right[:, None]
    right = scores.masked_fill(is_other, -1).amax(1, keepdim=True)
    is_wrong = is_other & (places < (n_right + n_wrong)[:, None])
    is_ahead = is_wrong & (scores > right)
    ranked = protocols.Ranked(is_ahead.sum(1), n_right, n_wrong)
    found = protocols.numbers("way", ranked, torch.arange(60_000))
    ends = [key.removeprefix("chance") for key in found if key.startswith("chance")]
    assert "_choose_20" in ends
    assert "@1%" in ends
    assert "_mrr" in ends
    for end in ends:
        chance = pytest.approx(found[f"chance{end}"], rel=0.04)
        assert found[f"way{end}"] == chance, end


def test_a_share_of_the_gallery_is_whole_rows():
    for size, share, least in ((300, 0.01, 3), (301, 0.01, 4), (9, 0.001, 1)):
        within = protocols.top_share(torch.arange(size), share, size)
        assert int(within.sum()) == least


def test_every_way_has_its_chance_and_intervals():
    x, y = drawn(40, 40, 3, coarse=False)
    ids = torch.arange(40) // 2
    ranks = ranking.mutual_ranks_of_ids(x, y, ids)
    groups = torch.arange(20) // 4
    found = protocols.pair_numbers(ranks, ids, units=groups)
    assert found["n"] == 40
    assert found["n_ids"] == 20
    assert found["n_groups"] == 5
    assert found["chance@5"] == pytest.approx(0.25)
    assert found["chance_choose_20"] == pytest.approx(0.05)
    assert found["chance_median_rank"] == 10.5
    assert "a_to_b_median_rank_interval" not in found
    order = torch.randperm(40, generator=seeded(0))
    ranks = tuple(side[order] for side in ranks)
    again = protocols.pair_numbers(ranks, ids[order], units=groups)
    assert again.keys() == found.keys()
    for key, number in found.items():
        assert again[key] == pytest.approx(number), key


@pytest.mark.parametrize("n", [1, 5, 6, 40, 151])
def test_the_interval_of_a_median_covers_it(n):
    generator = seeded(n)
    covered = 0
    draws = 400
    for _ in range(draws):
        values = torch.randn(n, generator=generator)
        low, high = protocols.median_interval(values)
        assert low <= statistics.median(values.tolist()) <= high
        covered += low <= 0 <= high
    assert n <= 5 or covered >= 0.93 * draws
    _, high = protocols.median_interval(torch.tensor([3.0, math.inf]))
    assert high == math.inf


def test_what_does_not_fit_is_refused():
    x, y = drawn(2, 3, 0, coarse=False)
    both = torch.tensor([[0, 0], [1, 1]])
    one = torch.tensor([True, False])
    candidate_ranks = protocols.candidate_ranks
    raises(ValueError, "query 1 has no right", candidate_ranks, x, y, both, one)
    far = torch.tensor([[0, 0], [1, 3]])
    message = "gallery row 0 to 3 is out of range for 3"
    raises(ValueError, message, candidate_ranks, x, y, far, one)
    first = torch.zeros(1)
    raises(ValueError, "2 to 3 are there", protocols.choose_one, first, 4, 3)
