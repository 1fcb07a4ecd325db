"""Ranking, the bootstrap and geometry against plain loops, hand-computed numbers and
definitions.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cloob.functional import geometry as g
from cloob.functional import ranking as r
from cloob.functional.bootstrap import bootstrap_interval, grouped_bootstrap
from paper_loops import count_flops
from paper_loops import unit as rows


def rank_loop(query, gallery, targets):
    """Position of the best positive after sorting, negatives first among equals."""
    result = []
    for q, positives in zip(query, targets, strict=True):
        scores = [round(float(q @ x), 9) for x in gallery]
        best = max(scores[j] for j in positives)
        result.append(
            sum(scores[j] >= best for j in range(len(gallery)) if j not in positives)
        )
    return result


@settings(max_examples=40)
@given(
    data=st.data(), q=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 999)
)
def test_ranks_are_the_loop_for_any_chunk(data, q, n, seed):
    query, gallery = rows(q, 3, seed), rows(n, 3, seed + 1)
    gallery = torch.cat(
        [gallery, gallery[: data.draw(st.integers(0, n))]]
    )  # duplicate rows
    positives = st.lists(st.integers(0, len(gallery) - 1), min_size=1, max_size=4)
    targets = [data.draw(positives) for _ in range(q)]
    chunk = data.draw(st.integers(1, 12))
    assert r.ranks(query, gallery, targets, chunk=chunk).tolist() == rank_loop(
        query, gallery, targets
    )
    first = [each[:1] for each in targets]
    assert r.ranks(query, gallery, torch.tensor(first)[:, 0]).tolist() == rank_loop(
        query, gallery, first
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_ranks_behind_its_copies_in_every_precision(dtype):
    gallery = rows(1, 67, dtype=dtype).repeat(33, 1)
    for chunk in (1, 5, 64):
        assert (
            r.ranks(
                rows(7, 67, 1, dtype), gallery, torch.arange(7), chunk=chunk
            ).tolist()
            == [32] * 7
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_and_under_autocast_rank_as_their_values_do(dtype):
    queries, noise = rows(60, 64), rows(60, 64, 1)
    x, y = (F.normalize(t, dim=1).to(dtype) for t in (queries, queries + 2.5 * noise))
    exact = r.ranks(x.double(), y.double(), torch.arange(60))
    assert torch.equal(r.ranks(x, y, torch.arange(60)), exact) and exact.max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(r.ranks(x.float(), y.float(), torch.arange(60)), exact)


def test_rows_that_are_not_finite():
    query, gallery = torch.eye(3), torch.eye(3)
    gallery[0] = float("nan")
    query[2] = float("inf")
    ranks = r.ranks(query, gallery, torch.tensor([0, 1, 2]), chunk=2)
    assert ranks.tolist() == [
        r.UNRANKED,
        0,
        r.UNRANKED,
    ]  # row 0 is ahead of nobody, query 1 is not touched
    assert (
        r.ranks(query, gallery, [(0, 2), (1,), (1,)])[0] == 1
    )  # the finite positive counts: row 2 ties with row 1
    assert r.topk_accuracy(ranks, 1000) == pytest.approx(1 / 3)
    assert r.median_rank(ranks) == float("inf")


@settings(max_examples=60)
@given(
    data=st.data(),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    seed=st.integers(0, 999),
    chunk=st.integers(1, 12),
)
def test_mutual_ranks_are_both_directions_and_groups_their_pairs_spelt_out(
    data, n, m, seed, chunk
):
    x, y = rows(n, 3, seed), rows(m, 3, seed + 1)
    if data.draw(st.booleans()):
        x[0] = y[0]
        y[-1] = float("nan")
    group = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    more = data.draw(
        st.lists(
            st.tuples(st.integers(0, int(group.max())), st.integers(0, m - 1)),
            max_size=5,
        )
    )
    pairs = torch.tensor([(int(group[i % n]), i % m) for i in range(max(n, m))] + more)
    spelt = torch.tensor(
        [(i, j) for i in range(n) for of, j in pairs.tolist() if of == group[i]]
    )
    expected = [r.ranks(x, y, spelt).tolist(), r.ranks(y, x, spelt.flip(1)).tolist()]
    assert [found.tolist() for found in r.mutual_ranks(x, y, spelt, chunk)] == expected
    assert [
        found.tolist() for found in r.mutual_ranks(x, y, pairs, chunk, group)
    ] == expected


@settings(max_examples=40)
@given(
    ids=st.lists(st.integers(-3, 9), min_size=1, max_size=14),
    seed=st.integers(0, 999),
    chunk=st.integers(1, 14),
)
def test_mutual_ranks_of_ids_are_those_of_both_directions(ids, seed, chunk):
    x, y, ids = rows(len(ids), 3, seed), rows(len(ids), 3, seed + 1), torch.tensor(ids)
    for own in (ids, torch.arange(len(ids)).flip(0)):
        both = r.mutual_ranks_of_ids(x, y, own, chunk)
        assert torch.equal(both[0], r.ranks_of_ids(x, y, own))
        assert torch.equal(both[1], r.ranks_of_ids(y, x, own))


def test_distinct_ids_are_ranked_in_one_sweep():
    n, d = 40, 64
    x, y = rows(n, d), rows(n, d, 1)
    repeated = torch.arange(n).clamp_min(1)
    flops = [
        count_flops(lambda own=own: r.mutual_ranks_of_ids(x, y, own))
        for own in (torch.arange(n), repeated)
    ]
    assert flops[0] < 1.1 * 2 * n * n * d < 0.6 * flops[1]


@pytest.mark.parametrize(
    ("query", "gallery", "targets", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 1]), r"\(2, 3\)"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3).double(),
            torch.tensor([0, 1]),
            "of one dtype",
        ),
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            torch.tensor([0, 2]),
            "gallery row 0 to 2 is out of range",
        ),
        (torch.ones(2, 3), torch.ones(2, 3), [(0,), ()], "query 1 has no positive"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            torch.tensor([0]),
            "query 1 has no positive",
        ),
        (torch.ones(2, 3), torch.ones(0, 3), torch.tensor([0, 0]), "non-empty"),
    ],
)
def test_ranking_errors(query, gallery, targets, message):
    with pytest.raises(ValueError, match=message):
        r.ranks(query, gallery, targets)
    with pytest.raises(ValueError, match="gallery row 2 has no positive"):
        r.mutual_ranks(
            torch.ones(2, 3), torch.ones(3, 3), torch.tensor([[0, 0], [1, 1]])
        )


def test_accuracy_recall_and_median():
    ranks = torch.tensor([0, 4, 5, 0])
    assert [r.topk_accuracy(ranks, k) for k in (1, 5, 6)] == [0.5, 0.75, 1.0]
    assert r.recall_at_k(ranks, 5) == 0.75
    assert r.median_rank(ranks) == 3.0  # 1-based 1, 1, 5, 6
    assert r.median_rank(torch.tensor([7, 0, 2])) == 3.0
    with pytest.raises(ValueError, match="non-empty"):
        r.median_rank(ranks[:0])
    correct, labels = (
        torch.tensor([True, False, True, True]),
        torch.tensor([0, 0, 3, 0]),
    )
    recall = r.per_class_recall(correct, labels, 5).tolist()
    assert recall[0] == pytest.approx(2 / 3) and recall[3] == 1.0
    assert [math.isnan(x) for x in recall] == [False, True, True, False, True]
    with pytest.raises(ValueError, match=r"\[0, 3\), got 0 to 3"):
        r.per_class_recall(correct, labels, 3)


def test_bootstrap_agrees_with_drawing_indices_and_is_a_function_of_its_seed():
    values = torch.tensor([0.0] * 30 + [1.0] * 50 + [4.0] * 20)
    index = torch.randint(
        0, 100, (20_000, 100), generator=torch.Generator().manual_seed(1)
    )
    expected = torch.quantile(
        values[index].mean(1), torch.tensor([0.05, 0.95])
    ).tolist()
    assert bootstrap_interval(values, n=20_000, level=0.9) == pytest.approx(
        expected, abs=0.02
    )
    state = torch.random.get_rng_state()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
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
        assert min(values) <= low + 1e-12 and high <= max(values) + 1e-12
    assert (low, high) == bootstrap_interval(
        torch.tensor(sorted(values)), n=100, seed=seed
    )
    if set(values) == {-2.5}:
        assert low == high == -2.5


@given(st.integers(1, 2000), st.floats(0.5, 0.99))
def test_all_right_and_all_wrong_are_as_unsure_as_the_binomial_says(number, level):
    low, high = bootstrap_interval(torch.ones(number), level=level)
    assert high == 1
    assert low**number == pytest.approx(
        (1 - level) / 2
    )  # how likely all are right at this rate
    assert bootstrap_interval(torch.zeros(number), level=level) == pytest.approx(
        (0, 1 - low)
    )
    assert bootstrap_interval(torch.full((number,), 0.5), level=level) == (0.5, 0.5)


def test_grouped_bootstrap_weighs_groups_alike():
    small, large = torch.tensor([1.0, 0.0]), torch.zeros(1000)
    mean, low, high = grouped_bootstrap([small, large])
    assert mean == pytest.approx(0.25)
    assert (low, high) == pytest.approx(
        (0.0, 0.5)
    )  # the small group's resamples are 0, ½ or 1, halved
    assert grouped_bootstrap([small])[1:] == bootstrap_interval(small)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_interval(torch.ones(0)),
        lambda: bootstrap_interval(torch.tensor([1.0, float("nan")])),
        lambda: bootstrap_interval(torch.ones(3), level=1.0),
        lambda: bootstrap_interval(torch.ones(3), n=0),
        lambda: bootstrap_interval(torch.ones(3), groups=torch.ones(2)),
        lambda: grouped_bootstrap([]),
    ],
)
def test_bootstrap_errors(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_rows_of_one_group_are_one_sample():
    once = torch.rand(60, generator=torch.Generator().manual_seed(0))
    groups, often = torch.arange(60).repeat_interleave(4), once.repeat_interleave(4)
    assert bootstrap_interval(often, groups=groups) == pytest.approx(
        bootstrap_interval(once)
    )
    assert bootstrap_interval(often)[1] < bootstrap_interval(once)[1]


GEOMETRY = {
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
    near = [
        (x[i] - x[j]).square().sum().item() for i in range(len(x)) for j in range(i)
    ]
    angles = sum(2 * math.asin(min(1.0, math.sqrt(d) / 2)) for d in near)
    p = [
        math.exp(5 * float(a @ y[i])) / sum(math.exp(5 * float(a @ c)) for c in y)
        for i, a in enumerate(x)
    ]
    return {
        "ajne": len(x) / 4 - angles / (math.pi * len(x)),
        "uniformity": math.log(sum(math.exp(-3 * d) for d in near) / len(near)),
        "saturation": 1 - sum(p) / len(p),
        "alignment": sum(
            math.dist(a, b) ** 1.5 for a, b in zip(x.tolist(), y.tolist(), strict=True)
        )
        / len(x),
    }


@settings(max_examples=40)
@given(
    n=st.integers(2, 9),
    d=st.integers(2, 5),
    seed=st.integers(0, 999),
    chunk=st.integers(1, 12),
)
def test_measures_of_pairs_are_the_loops_for_any_chunk(n, d, seed, chunk):
    x, y = rows(n, d, seed), rows(n, d, seed + 1)
    found = {
        "ajne": g.ajne(x, chunk=chunk),
        "uniformity": g.uniformity(x, t=3, chunk=chunk),
        "saturation": g.saturation(x, y, 5.0, chunk=chunk),
        "alignment": g.alignment(x, y, alpha=1.5),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        loops(x, y), abs=1e-9
    )


def test_ajne_is_the_mean_over_half_circles_of_the_squared_excess():
    # Ajne's own definition: A = mean over half circles of (points inside − N/2)² / N,
    # here by a fine grid of them.
    x = rows(9, 2, seed=4)
    angle = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (2 * math.pi / 200_000)
    inside = (torch.stack([angle.cos(), angle.sin()], 1) @ x.T > 0).sum(1)
    assert float(g.ajne(x)) == pytest.approx(
        float(((inside - 4.5) ** 2 / 9).mean()), abs=1e-3
    )


def test_spectrum_of_hand_made_data():
    # Points (±3, 0), (0, ±1): variances 2·9/4 and 2·1/4.
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]) + torch.tensor([7.0, -5])
    assert g.covariance_spectrum(x).tolist() == pytest.approx([4.5, 0.5])
    assert int(g.effective_eigenvalues(x, 0.9)) == 1
    assert int(g.effective_eigenvalues(x, 0.91)) == 2


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-7), (torch.float32, 1e-6)]
)
def test_equal_rows(dtype, close):
    x = rows(1, 7, dtype=dtype).repeat(8, 1)
    assert float(g.ajne(x)) == pytest.approx(2, abs=close)  # N/4
    assert int(g.effective_eigenvalues(x)) == 0 and not g.covariance_spectrum(x).any()
    assert float(g.uniformity(x)) == pytest.approx(0, abs=1e-12)


def test_gap_of_known_pairs():
    x = torch.tensor([[1.0, 0], [0, 1]])
    y = torch.tensor([[-1.0, 0], [0, 1]])
    assert float(g.modality_gap(x, y)) == pytest.approx(1)  # centres (±½, ½)
    assert float(g.modality_gap(x, -x)) == pytest.approx(math.sqrt(2))
    assert float(g.modality_gap(x, x[:1])) == pytest.approx(math.sqrt(0.5))


def test_saturation_keeps_its_digits_where_p_is_one():
    x = torch.eye(
        2, dtype=torch.float64
    )  # 1 − p = e^−60 / (1 + e^−60), far below the rounding of 1
    assert float(g.saturation(x, x, 60.0)) == pytest.approx(math.exp(-60), rel=1e-9)
    assert float(g.saturation(x, -x, 1e6)) == pytest.approx(1.0)
    assert float(
        g.saturation(x[:1].repeat(4, 1), x[:1].repeat(4, 1), torch.tensor(30.0))
    ) == pytest.approx(3 / 4)


def test_dtype_follows_the_input():
    x = rows(6, 4)
    for name, measure in GEOMETRY.items():
        single, double = measure(x.float()), measure(x)
        assert name == "effective" or (single.dtype, double.dtype) == (
            torch.float32,
            torch.float64,
        )
        assert torch.allclose(single.double(), double.double(), atol=1e-5)


X, ZERO, NAN = (
    rows(4, 3),
    torch.tensor([[1.0, 0], [0, 0]]),
    torch.ones(5, 3).index_fill_(0, torch.tensor(3), math.nan),
)
MISSHAPEN = (
    torch.ones(1, 3),
    torch.ones(3),
    torch.ones(2, 3, 4),
    torch.ones(3, 2, dtype=torch.int64),
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda measure=measure: measure(NAN), "row 3")
            for measure in GEOMETRY.values()
        ),
        *(
            (lambda measure=measure, bad=bad: measure(bad), "expected")
            for measure in (
                g.covariance_spectrum,
                g.effective_eigenvalues,
                g.ajne,
                g.uniformity,
            )
            for bad in MISSHAPEN
        ),
        *(
            (lambda bad=bad: g.saturation(bad, bad, 1.0), "expected")
            for bad in MISSHAPEN
        ),
        (lambda: g.alignment(X, X[:3]), "x 4 and y 3"),
        (lambda: g.modality_gap(X, X[:, :2]), "dimension 2"),
        (lambda: g.ajne(ZERO), "row 1 is zero"),
        (lambda: g.saturation(X, X, -1.0), "inv_tau"),
    ],
)
def test_geometry_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_interval_does_not_depend_on_what_was_asked_before():
    """Draws are kept by counts and seed."""
    values = torch.arange(40) % 7 / 7.0
    first = bootstrap_interval(values, n=200, seed=1)
    others = [bootstrap_interval(values, n=200, seed=seed) for seed in range(2, 9)]
    assert first not in others
    assert bootstrap_interval(values, n=200, seed=1) == first
    assert bootstrap_interval(1 - values, n=200, seed=1) != first
