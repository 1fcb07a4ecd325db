"""What is fitted is the same however rows stand, and in whatever units columns are: the
closed form, members and cleaning.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from views import pairs_of, views

import cloob
from cloob import HeadSettings
from cloob.functional.cca import PairMoments, canonical_directions
from cloob.heads.closed import fit_closed_form
from cloob.heads.head import Members, fit_members, unit_rows

quick = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 99)


def cosines(heads, a, b):
    x = unit_rows(heads[0], torch.from_numpy(a))
    y = unit_rows(heads[1], torch.from_numpy(b))
    return x @ y.T


def recall(products):
    right = products.argmax(1) == torch.arange(len(products))
    return float(right.double().mean())


def closed(a, b, labels=None):
    return fit_closed_form(pairs_of(a, b, labels)).heads


@quick
@given(seed=seeds, n=st.sampled_from([9, 40, 120]), by_column=st.booleans())
def test_permuted_rows_have_the_same_directions(seed, n, by_column):
    a, b = views(n, seed=seed)
    order = np.random.default_rng(seed).permutation(n)
    found = []
    for rows in (np.arange(n), order, np.argsort(a[:, 0])):
        moments = PairMoments.of(*map(torch.from_numpy, (a[rows], b[rows])))
        found.extend(canonical_directions(moments, [0.1], by_column=by_column))
    for other in found[1:]:
        assert_close(found[0].correlations, other.correlations)
        for side, turned in ((found[0].a, other.a), (found[0].b, other.b)):
            signs = (side * turned).sum(0).sign()
            assert_close(side, turned * signs, atol=1e-6, rtol=1e-6)
    plain = cosines(closed(a, b), a, b)
    turned = cosines(closed(a[order], b[order]), a, b)
    assert_close(plain, turned, atol=1e-4, rtol=0)


@quick
@given(seed=seeds, row=st.integers(0, 199))
def test_one_spoilt_row_spoils_nothing_whichever_it_is(seed, row):
    a, b = views(400, seed=seed)
    spoilt = a[:200].copy()
    spoilt[row] *= 1e6
    recalls = []
    for of_train in (a[:200], spoilt):
        heads = closed(of_train, b[:200])
        recalls.append(recall(cosines(heads, a[200:], b[200:])))
    assert recalls[1] > 0.7 * recalls[0]


@quick
@given(seed=seeds, copies=st.integers(2, 4))
def test_repeated_ids_in_blocks_or_side_by_side(seed, copies):
    a, b = views(60, seed=seed)
    blocks = np.tile(np.arange(60), copies)
    once = cosines(closed(a, b), a, b)
    for rows in (blocks, np.sort(blocks)):
        labels = [str(row) for row in rows]
        repeated = cosines(closed(a[rows], b[rows], labels), a, b)
        assert_close(once, repeated, atol=1e-4, rtol=0)


@quick
@given(seed=seeds)
def test_constant_columns_say_nothing_and_copied_ones_nothing_new(seed):
    """A copy weights its side's columns alike, so only the recall is compared."""
    a, b = views(120, seed=seed)
    once = recall(cosines(closed(a, b), a, b))
    constant = np.full((120, 2), 1e6 + 0.1)
    more_a = np.hstack([a, a, constant])
    more_b = np.hstack([b, constant, b])
    products = cosines(closed(more_a, more_b), more_a, more_b)
    assert products.isfinite().all()
    assert abs(recall(products) - once) <= 0.05


@quick
@given(
    seed=seeds,
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
)
def test_units_of_float64_change_no_recall(seed, scale, offset):
    a, b = views(120, seed=seed)
    once = cosines(closed(a, b), a, b)
    moved_a = (a + offset) * scale
    moved_b = (b - offset) / scale
    moved = cosines(closed(moved_a, moved_b), moved_a, moved_b)
    assert_close(once, moved, atol=1e-4, rtol=0)
    assert recall(once) == pytest.approx(recall(moved), abs=0.01)


def joined(a, b, ids=None):
    how = HeadSettings("infoloob", members=2, embed_dim=32, epochs=2, patience=0)
    return cloob.fit_heads(a, b, ids, 0.2, how)


@quick
@given(seed=seeds, strength=st.sampled_from([0.25, 0.5]))
def test_a_permuted_bank_is_the_same_bias(seed, strength):
    a, b = views(60, seed=seed)
    heads = closed(a, b)
    width = heads[0].options["embed_dim"]
    found = []
    for rows in (np.arange(60), np.random.default_rng(seed).permutation(60)):
        of_a = Members([heads[0]], side=0, rows=60, strength=strength)
        of_b = Members([heads[1]], side=1, rows=60, strength=strength)
        x = unit_rows(heads[0], torch.from_numpy(a[rows]))
        y = unit_rows(heads[1], torch.from_numpy(b[rows]))
        fit_members(of_a, of_b, [x], [y])
        with torch.no_grad():
            sides = of_a(torch.from_numpy(a)), of_b(torch.from_numpy(b))
        assert sides[0].shape == (60, width + 4)
        for side in sides:
            assert float(side.norm(dim=1).var()) < 1e-9
        found.append(sides[0] @ sides[1].T)
    assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", ["plain", "by class", "blocks", "interleaved"])
def test_joined_heads_find_partners_however_rows_stand(change):
    a, b = views(200)
    rows = np.arange(200)
    if change == "by class":
        rows = np.argsort(a[:, 0] > 0, kind="stable")
    elif change == "blocks":
        rows = np.tile(rows, 2)
    elif change == "interleaved":
        rows = rows.repeat(2)
    fitted = joined(a[rows], b[rows], rows)
    products = cosines(fitted.heads, a, b)
    assert products.isfinite().all()
    assert recall(products) > 0.5
    for head, side in zip(fitted.heads, (a, b), strict=True):
        if isinstance(head, Members):
            with torch.no_grad():
                lengths = head(torch.from_numpy(side)).norm(dim=1)
            assert float(lengths.max() - lengths.min()) < 1e-3
