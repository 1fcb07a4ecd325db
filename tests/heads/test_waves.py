"""The closed form of random waves: its equation, and when auto takes it."""

import numpy as np
import pytest
import torch
from views import pairs_of, views

from cloob.heads.choose import choose
from cloob.heads.closed import fit_closed_form
from cloob.heads.head import N_WAVES, unit_rows
from cloob.heads.settings import HeadSettings

KCCA = HeadSettings("kcca", embed_dim=8, standardise="column")


def folded_views(n=900, seed=0):
    """No linear function of one side says much of the other."""
    rng = np.random.default_rng(seed)
    cause = rng.standard_normal((n, 3))
    noise = rng.standard_normal((n, 3))
    return cause, np.abs(cause) + 0.02 * noise


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors / np.sqrt(values) @ vectors.T


def solved_plainly(sides, heads, ridge, power):
    """(n, n) cosines by the equations of ``cloob.functional.cca``, in float64."""
    n = len(sides[0])
    whitened = []
    for side, head in zip(sides, heads, strict=True):
        scaled = (side - side.mean(0)) / side.std(0)
        frequencies = head.frequencies.numpy().astype(float)
        waves = np.cos(scaled @ frequencies + head.phases.numpy())
        rows = waves - waves.mean(0)
        covariance = rows.T @ rows / n
        size = np.trace(covariance) / N_WAVES
        covariance += ridge * size * np.eye(N_WAVES)
        whitened.append(rows @ inverse_root(covariance))
    of_a, of_b = whitened
    u, s, vt = np.linalg.svd(of_a.T @ of_b / n)
    weights = s[:8] ** power
    x = of_a @ u[:, :8] * weights
    y = of_b @ vt.T[:, :8] * weights
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return x @ y.T


@pytest.mark.parametrize("n", [200, 900])
def test_it_is_the_algebra_of_waves(n):
    a, b = folded_views(n)
    train, held_out = pairs_of(a, b).split(0.2)
    fitted = fit_closed_form(train, held_out, KCCA)
    chosen = fitted.decisions
    places = train.rows[:, 0]
    sides = a[places], b[places]
    wanted = solved_plainly(sides, fitted.heads, chosen["ridge"], chosen["power"])
    x, y = map(unit_rows, fitted.heads, map(torch.from_numpy, sides))
    np.testing.assert_allclose((x @ y.T).numpy(), wanted, atol=2e-3)


def waves_of(a, b):
    """Frequencies of the head of a."""
    head, _ = fit_closed_form(pairs_of(a, b), None, KCCA).heads
    return head.frequencies


def test_a_wave_is_as_long_as_rows_are_apart():
    """In any unit and of repeated rows; a head without differences has some waves."""
    a, b = folded_views(300)
    spread = float(waves_of(a, b).std())
    scaled = waves_of(a * 1e6 + 1e7, b)
    assert float(scaled.std()) == pytest.approx(spread, rel=1e-3)
    repeated = waves_of(a.repeat(3, 0), b.repeat(3, 0))
    assert float(repeated.std()) == pytest.approx(spread, rel=0.1)
    constant = np.ones((300, 2))
    assert waves_of(constant, b).isfinite().all()


def test_it_finds_what_no_matrix_finds():
    train, held_out = pairs_of(*folded_views()).split(0.2)
    waved = fit_closed_form(train, held_out, HeadSettings("kcca"))
    plain = fit_closed_form(train, held_out, HeadSettings("cca"))
    assert waved.recall > plain.recall + 0.2


@pytest.mark.parametrize("folded", [True, False])
def test_auto_takes_the_closed_form_that_finds_more(folded):
    a, b = folded_views() if folded else views(800, (60, 40), noise=2.0)
    train, held_out = pairs_of(a, b).split(0.2)
    settings = HeadSettings(epochs=2, device="cpu", refit=True)
    fitted = choose(train, held_out, settings)
    trials = fitted.decisions["objective"]["trials"]
    objectives = [line["objective"] for line in trials]
    starts = [line["start"] for line in trials]
    if folded:
        assert objectives == ["infoloob", "kcca"]
        assert starts == ["random", None]
    else:
        assert objectives == ["infoloob", "infoloob", "cca"]
        assert starts == ["closed-form", "random", None]
    assert (fitted.decisions["ridge"]["bandwidth"] is not None) == folded
    linear = choose(train, held_out, settings.override(head="linear", epochs=1))
    assert linear.decisions["ridge"]["bandwidth"] is None
