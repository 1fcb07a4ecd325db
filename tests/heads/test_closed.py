"""The closed form from blocks, weights and few rows; what held-out pairs choose."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from views import pairs_of, views

from cloob.errors import InputError
from cloob.functional.cca import CentredRows, PairMoments, canonical_directions
from cloob.heads import closed
from cloob.heads.closed import fit_closed_form
from cloob.heads.fitted import Rows, recalls, recalls_of_ids
from cloob.heads.head import unit_rows
from cloob.heads.settings import HeadSettings
from support import raises


def cosines(fitted, a, b):
    rows = [
        unit_rows(head, torch.from_numpy(side))
        for head, side in zip(fitted.heads, (a, b), strict=True)
    ]
    return rows[0] @ rows[1].T


@given(st.integers(8, 30), st.integers(0, 99), st.booleans(), st.sampled_from([0, 60]))
def test_rows_give_the_directions_of_their_moments(n, seed, by_column, width):
    """Fewer rows than columns on one side, or on both; tolerance 1e-6."""
    a, b = map(torch.from_numpy, views(n, (50, width or 6), seed))
    ways = [PairMoments.of(a, b), CentredRows.of(a, b)]
    found = []
    for pairs in ways:
        (directions,) = canonical_directions(pairs, [0.1], by_column=by_column)
        x, y = directions.weighted(1.0)
        found.append(((a - a.mean(0)) @ x) @ ((b - b.mean(0)) @ y).T)
    assert torch.allclose(*found, atol=1e-6)


def test_few_rows_of_many_columns_need_no_square_matrix():
    a, b = views(50, (300, 200))
    train, held_out = pairs_of(a, b).split(0.2)
    fitted = fit_closed_form(train, held_out)
    assert isinstance(closed.gathered(train, fitted.heads), CentredRows)
    assert fitted.history[0]["val_recall"] > 0.9


@pytest.mark.parametrize("n", [30, 300])
def test_weights_count_as_repetitions(n):
    a, b = views(n, (40, 8))
    weights = np.random.default_rng(1).integers(0, 4, n)
    rows = np.arange(n).repeat(weights)
    pairs = dataclasses.replace(pairs_of(a, b), weights=weights.astype(float))
    weighted = fit_closed_form(pairs)
    repeated = fit_closed_form(pairs_of(a[rows], b[rows]))
    torch.testing.assert_close(
        cosines(weighted, a, b), cosines(repeated, a, b), atol=1e-4, rtol=0
    )


def test_the_best_of_all_choices_is_taken():
    """float32 chooses, so another one may be better by what it does not see."""
    a, b = views(400)
    train, held_out = pairs_of(a, b).split(0.2)
    fitted = fit_closed_form(train, held_out)
    x, y = (head.standardised for head in fitted.heads)
    rows = Rows.of(train)
    judges = Rows.of(held_out)
    moments = PairMoments.of(x(rows.a), y(rows.b))
    found = {}
    solutions = canonical_directions(moments, closed.RIDGES)
    for ridge, directions in zip(closed.RIDGES, solutions, strict=True):
        for power in closed.POWERS:
            of_a, of_b = directions.weighted(power)
            found[ridge, power] = recalls_of_ids(
                F.normalize((x(judges.a) - moments.mean_a) @ of_a, dim=1),
                F.normalize((y(judges.b) - moments.mean_b) @ of_b, dim=1),
                judges.ids,
            ).mean()
    chosen = tuple(fitted.decisions[key] for key in ("ridge", "power"))
    assert found[chosen] >= max(found.values()) - 0.005
    recall = fitted.history[0]["val_recall"]
    assert recall == pytest.approx(float(found[chosen]), abs=0.005)
    whole = float(recalls(fitted.heads, judges).mean())
    assert whole == pytest.approx(recall, abs=0.005)


@pytest.mark.parametrize("way", [lambda x: x * x * x, np.exp])
@pytest.mark.parametrize("side", [0, 1])
def test_columns_are_transformed_where_that_finds_more(way, side):
    sides = [*views(1000, noise=0.5)]
    sides[side] = way(sides[side])
    train, held_out = pairs_of(*sides).split(0.1)
    fitted = fit_closed_form(train, held_out)
    ways = [transform for transform, _ in fitted.decisions["columns"]]
    assert ways[side] != "plain" == ways[1 - side]
    settings = HeadSettings("cca", standardise="one")
    without = fit_closed_form(train, held_out, settings).history[0]["val_recall"]
    assert fitted.history[0]["val_recall"] > without + 0.05


def test_what_it_cannot_do_is_one_line():
    a, b = views(50)
    wide = HeadSettings(objective="cca", embed_dim=9)
    most = "finds 8 directions at most"
    raises(InputError, most, fit_closed_form, pairs_of(a, b), None, wide)
    one = pairs_of(a, b).only(np.array([0]))
    raises(InputError, "1 pairs", fit_closed_form, one)
    alone = pairs_of(a, b, ["x"] * len(a))
    raises(InputError, "all pairs have one id", fit_closed_form, alone)


@pytest.mark.parametrize("raises", [True, False])
def test_float64_solves_what_float32_does_not(monkeypatch, raises):
    """LAPACK gives up on some covariances of counts, or says nothing and gives NaN."""
    eigh = torch.linalg.eigh

    def weak(matrix):
        if matrix.dtype == torch.float64:
            return eigh(matrix)
        if raises:
            raise RuntimeError("failed to converge")
        return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)

    train, held_out = pairs_of(*views(200)).split(0.2)
    usual = fit_closed_form(train, held_out)
    monkeypatch.setattr(torch.linalg, "eigh", weak)
    assert fit_closed_form(train, held_out).recall == pytest.approx(usual.recall)
