"""Ranks and what follows from them, against plain loops and hand-computed numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cloob.functional import ranking
from paper_loops import unit as rows
from support import raises


def rank_loop(query, gallery, targets):
    """How many negatives score at least as much as the best positive."""
    ranks = []
    for row, positives in zip(query, targets, strict=True):
        scores = [round(float(row @ x), 9) for x in gallery]
        best = max(scores[j] for j in positives)
        ahead = [j for j, score in enumerate(scores) if score >= best]
        negatives = set(ahead) - set(positives)
        ranks.append(len(negatives))
    return ranks


def lists(ranks):
    return [of_way.tolist() for of_way in ranks]


SEEDS = st.integers(0, 999)
UP_TO_NINE = st.integers(1, 9)
UP_TO_TWELVE = st.integers(1, 12)


@settings(max_examples=40)
@given(data=st.data(), q=UP_TO_NINE, n=UP_TO_NINE, seed=SEEDS, chunk=UP_TO_TWELVE)
def test_ranks_are_the_loop_for_any_chunk(data, q, n, seed, chunk):
    query = rows(q, 3, seed)
    gallery = rows(n, 3, seed + 1)
    n_twice = data.draw(st.integers(0, n))
    gallery = torch.cat([gallery, gallery[:n_twice]])
    place = st.integers(0, len(gallery) - 1)
    positives = st.lists(place, min_size=1, max_size=4)
    targets = data.draw(st.lists(positives, min_size=q, max_size=q))
    found = ranking.ranks(query, gallery, targets, chunk=chunk)
    assert found.tolist() == rank_loop(query, gallery, targets)

    one_each = [positives[:1] for positives in targets]
    found = ranking.ranks(query, gallery, torch.tensor(one_each)[:, 0])
    assert found.tolist() == rank_loop(query, gallery, one_each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_tie_ranks_behind_its_copies_in_every_precision(dtype, chunk):
    gallery = rows(1, 67, dtype=dtype).repeat(33, 1)
    query = rows(7, 67, 1, dtype)
    found = ranking.ranks(query, gallery, torch.arange(7), chunk=chunk)
    assert found.tolist() == [32] * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_and_under_autocast_rank_as_their_values_do(dtype):
    clean = rows(60, 64)
    noisy = clean + 2.5 * rows(60, 64, 1)
    x = F.normalize(clean).to(dtype)
    y = F.normalize(noisy).to(dtype)
    own = torch.arange(60)
    exact = ranking.ranks(x.double(), y.double(), own)
    assert exact.max() > 0
    assert torch.equal(ranking.ranks(x, y, own), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = ranking.ranks(x.float(), y.float(), own)
    assert torch.equal(under_autocast, exact)


def test_rows_that_are_not_finite():
    query = torch.eye(3)
    gallery = torch.eye(3)
    gallery[0] = math.nan
    query[2] = math.inf
    ranks = ranking.ranks(query, gallery, torch.arange(3), chunk=2)
    # row 0 is ahead of nobody, query 1 is not touched
    assert ranks.tolist() == [ranking.UNRANKED, 0, ranking.UNRANKED]
    assert ranking.topk_accuracy(ranks, 1000) == pytest.approx(1 / 3)
    assert ranking.median_rank(ranks) == math.inf
    # the finite positive counts: row 2 ties with row 1
    first, _, _ = ranking.ranks(query, gallery, [(0, 2), (1,), (1,)])
    assert first == 1


@settings(max_examples=60)
@given(data=st.data(), n=UP_TO_TWELVE, m=UP_TO_TWELVE, seed=SEEDS, chunk=UP_TO_TWELVE)
def test_mutual_ranks_are_both_directions_and_groups_their_pairs_spelt_out(
    data, n, m, seed, chunk
):
    x = rows(n, 3, seed)
    y = rows(m, 3, seed + 1)
    if data.draw(st.booleans()):
        x[0] = y[0]
        y[-1] = math.nan
    group = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    further = st.tuples(st.integers(0, max(group)), st.integers(0, m - 1))
    pairs = [(group[i % n], i % m) for i in range(max(n, m))]
    pairs += data.draw(st.lists(further, max_size=5))
    spelt = []
    for i in range(n):
        spelt += [(i, j) for own, j in pairs if own == group[i]]
    spelt = torch.tensor(spelt)
    of_x = ranking.ranks(x, y, spelt)
    of_y = ranking.ranks(y, x, spelt.flip(1))
    expected = lists([of_x, of_y])
    assert lists(ranking.mutual_ranks(x, y, spelt, chunk)) == expected
    by_group = torch.tensor(pairs), chunk, torch.tensor(group)
    assert lists(ranking.mutual_ranks(x, y, *by_group)) == expected


IDS = st.lists(st.integers(-3, 9), min_size=1, max_size=14)


@settings(max_examples=40)
@given(ids=IDS, seed=SEEDS, chunk=UP_TO_TWELVE)
def test_mutual_ranks_of_ids_are_those_of_both_directions(ids, seed, chunk):
    n = len(ids)
    x = rows(n, 3, seed)
    y = rows(n, 3, seed + 1)
    for own in (torch.tensor(ids), torch.arange(n).flip(0)):
        of_x, of_y = ranking.mutual_ranks_of_ids(x, y, own, chunk)
        assert torch.equal(of_x, ranking.ranks_of_ids(x, y, own))
        assert torch.equal(of_y, ranking.ranks_of_ids(y, x, own))


TWO = torch.ones(2, 3)


def refuses(match, *arguments, ranks=ranking.ranks):
    raises(ValueError, match, ranks, TWO, *arguments)


def test_errors():
    own = torch.tensor([0, 1])
    refuses(r"\(2, 3\)", torch.ones(2, 4), own)
    refuses("of one dtype", TWO.double(), own)
    refuses("non-empty", torch.ones(0, 3), own)
    refuses("gallery row 0 to 2 is out of range", TWO, [(0,), (2,)])
    refuses("query 1 has no positive", TWO, [(0,), ()])
    refuses("query 1 has no positive", TWO, torch.tensor([0]))
    # both directions are asked for: so each row of the gallery has one
    pairs = torch.tensor([[0, 0], [1, 1]])
    three = torch.ones(3, 3)
    mutual = ranking.mutual_ranks
    refuses("gallery row 2 has no positive", three, pairs, ranks=mutual)


def test_accuracy_recall_and_median():
    ranks = torch.tensor([0, 4, 5, 0])
    found = [ranking.topk_accuracy(ranks, k) for k in (1, 5, 6)]
    assert found == [0.5, 0.75, 1.0]
    assert ranking.median_rank(ranks) == 3.0  # 1-based 1, 1, 5, 6
    assert ranking.median_rank(torch.tensor([7, 0, 2])) == 3.0
    raises(ValueError, "non-empty", ranking.median_rank, ranks[:0])


def test_recall_of_every_class():
    correct = torch.tensor([True, False, True, True])
    labels = torch.tensor([0, 0, 3, 0])
    recall = ranking.per_class_recall(correct, labels, 5).tolist()
    expected = [2 / 3, math.nan, math.nan, 1.0, math.nan]
    assert recall == pytest.approx(expected, nan_ok=True)
    said = r"\[0, 3\), got 0 to 3"
    raises(ValueError, said, ranking.per_class_recall, correct, labels, 3)
