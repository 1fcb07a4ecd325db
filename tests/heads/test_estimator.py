"""ContrastiveHeads: what scikit-learn expects, ids and groups, scores, refit."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn import config_context
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.utils.estimator_checks import check_estimator
from views import views

import cloob
from cloob import ContrastiveHeads
from cloob.heads.head import unit_rows
from cloob.heads.settings import HeadSettings
from make import sent
from support import raises, run_cloob

N = 240
QUICK = {
    "objective": "infoloob",
    "n_components": 8,
    "epochs": 8,
    "learning_rate": 1e-2,
    "batch_size": 60,
    "refit": False,
    "device": "cpu",
    "random_state": 3,
}


OF_THE_CLOSED_FORM = {"objective": "cca", "n_components": 7, "refit": False}


@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(N, 5))
    X = cause @ rng.normal(size=(5, 12)) + 2
    Y = np.tanh(cause @ rng.normal(size=(5, 7)) / 2)
    ids = [f"M{row // 3}" for row in range(N)]
    return X.astype(np.float32), Y.astype(np.float32), ids


def state_of_generators():
    """Of those of the process."""
    numpys = np.random.get_state()[1]  # noqa: NPY002
    return numpys.tolist(), torch.get_rng_state().tolist()


def test_it_is_a_face_of_fit_heads(matrices):
    X, Y, ids = matrices
    before = state_of_generators()
    heads = ContrastiveHeads(**QUICK).fit(X, Y, ids=ids)
    assert state_of_generators() == before
    settings = HeadSettings(
        "infoloob", embed_dim=8, epochs=8, lr=1e-2, batch_size=60, device="cpu", seed=3
    )
    fitted = cloob.fit_heads(X, Y, ids, settings=settings)
    x, y = heads.transform(X, Y)
    rows = unit_rows(fitted.heads[0], torch.from_numpy(X))
    assert np.allclose(x, rows.numpy(), atol=1e-6)
    assert (heads.transform(None, Y) == y).all()
    assert (sent(heads).transform(X) == x).all()
    fitted_anew = clone(heads).fit(X, Y, ids)
    assert (fitted_anew.transform(X) == x).all()


def test_saved_heads_are_read_by_every_door(matrices, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, Y, _ = matrices
    heads = ContrastiveHeads(**QUICK).fit(X, Y)
    heads.save("saved")
    np.save("x.npy", X)
    np.save("y.npy", Y)
    run_cloob("embed saved --a x.npy --out x-8.npy")
    assert (np.load("x-8.npy") == heads.transform(X)).all()
    run_cloob("eval saved --a x.npy --b y.npy --out report")
    loaded = ContrastiveHeads.load("saved", "cpu")
    assert (loaded.transform(X) == heads.transform(X)).all()
    assert loaded.n_features_in_ == 12
    assert (loaded.predict(X, Y) == heads.predict(X)).all()
    raises(ValueError, "give predict one", loaded.predict, X)


def test_scores_are_those_of_a_plain_loop(matrices):
    X, Y, ids = matrices
    heads = ContrastiveHeads(**QUICK).fit(X, Y, ids=ids)
    x, y = heads.transform(X, Y)
    scores = x @ y.T
    assert heads.score_samples(X, Y) == pytest.approx(scores.diagonal(), abs=1e-6)
    best = scores.argmax(1)
    assert (heads.predict(X) == best).all()
    of_nine = scores[:, :9].argmax(1)
    assert (heads.predict(X, Y[:9]) == of_nine).all()
    score = heads.score(X, Y)
    right = [best == range(N), scores.argmax(0) == range(N)]
    assert score == pytest.approx(np.mean(right))
    assert score > 5 / N
    # rows that are there twice say the same as once, and so do ids
    twice = np.arange(N).repeat(2)
    assert heads.score(X[twice], Y[twice]) == score
    odd = twice[:, None] % 2
    jittered = X[twice] * (1 + np.float32(1e-6) * odd)
    of_ids = heads.score(jittered, Y[twice], twice)
    assert of_ids == pytest.approx(score, abs=0.01)


def test_rows_that_say_nothing_score_as_chance(matrices):
    X, Y, _ = matrices
    heads = ContrastiveHeads(**QUICK).fit(X, Y)
    constant = np.ones_like(X)
    assert heads.score(constant, Y) <= 1 / N
    constant[::2] = 0
    assert heads.score(constant, Y) <= 1 / N
    assert heads.score(X, np.ones_like(Y)) <= 1 / N


def test_groups_are_held_out_together_and_are_no_ids(matrices):
    """As negatives they count: with groups as ids the whole of a group is masked."""
    X, Y, _ = matrices
    groups = np.arange(N) % 6
    settings = {**QUICK, "validation_fraction": 0.34}
    heads = ContrastiveHeads(**settings).fit(X, Y, groups=groups)
    assert heads.history_[0]["samples_seen"] == 120  # two groups of six held out
    as_ids = ContrastiveHeads(**settings).fit(X, Y, ids=groups)
    assert heads.score(X, Y) > as_ids.score(X, Y) + 0.1


def test_weights_of_zero_leave_pairs_out(matrices):
    X, Y, _ = matrices
    wrong = Y.copy()
    wrong[::3] = np.roll(Y[::3], 1, 0)
    weights = np.ones(N)
    weights[::3] = 0
    for settings in (OF_THE_CLOSED_FORM, {**QUICK, "n_components": 7}):
        heads = ContrastiveHeads(**settings, standardise="one")
        score = heads.fit(X, wrong).score(X, Y)
        weighted = heads.fit(X, wrong, sample_weight=weights).score(X, Y)
        assert weighted > score + 0.05


def test_equal_rows_of_a_side_are_one_id_and_said_once(caplog):
    """A picture with three captions is held out with all of them."""
    caplog.set_level("INFO", "cloob")
    a, b = views(100, noise=1.0)
    X = a.repeat(3, 0)
    captions = np.stack([b, b + 0.01, b - 0.01], 1)
    Y = captions.reshape(300, -1)
    with_ids = ContrastiveHeads(**QUICK).fit(X, Y, ids=np.arange(100).repeat(3))
    n_said = caplog.text.count("are one id with them")
    heads = ContrastiveHeads(**QUICK).fit(X, Y)
    assert n_said == 0
    assert caplog.text.count("are one id with them") == 1
    assert "200 of 300 rows are equal" in caplog.text
    assert heads.history_[0]["samples_seen"] == with_ids.history_[0]["samples_seen"]


def test_rows_of_few_values_are_no_ids():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 5))
    y = rng.integers(0, 3, 200)
    heads = ContrastiveHeads(**QUICK).fit(X, y)
    assert heads.history_[0]["samples_seen"] == 180


def test_the_closed_form_is_an_objective(matrices):
    X, Y, ids = matrices
    heads = ContrastiveHeads("cca", random_state=0).fit(X, Y, ids=ids)
    assert heads.objective_["closed_form"] == "cca"
    assert heads.score(X, Y) > 0.4
    blind = ContrastiveHeads("cca", validation_fraction=0, n_components=3).fit(X, Y)
    assert blind.transform(X).shape == (N, 3)
    column = ContrastiveHeads("cca").fit(X, Y[:, 0])
    assert column.transform(None, Y[:, 0]).shape == (N, 2)
    error = "n_components is 400, but the closed form finds 7"
    too_many = ContrastiveHeads("cca", n_components=400)
    raises(ValueError, error, too_many.fit, X, Y)


def test_it_takes_any_matrices(matrices):
    X, Y, _ = matrices
    X = np.where(X > 2, X, 0)
    heads = ContrastiveHeads(**{**QUICK, "epochs": 2})
    plain = clone(heads).fit(X, Y).transform(X)
    for form in (torch.from_numpy, pd.DataFrame, sparse.csr_array):
        x = form(X)
        y = Y if form is sparse.csr_array else form(Y)
        heads.fit(x, y)
        assert (heads.transform(x) == plain).all()
        assert heads.n_features_in_ == 12
    unknown = np.where(X > 0, X, np.nan)
    raises(ValueError, "NaN", heads.fit, unknown, Y)
    raises(ValueError, "inconsistent numbers of samples", heads.fit, X, Y[:-1])
    error = r"a and b: 240 rows of 240.*a row 0: holds NaN"
    too_large = X.astype(float) * 1e300 + 1e300
    raises(ValueError, error, heads.fit, too_large, Y)


def test_it_is_searched_by_groups(matrices):
    X, Y, groups = matrices
    objectives = {"objective": ["clip", "cloob"], "epochs": np.array([2])}
    with config_context(enable_metadata_routing=True):
        searched = ContrastiveHeads(**QUICK).set_fit_request(groups=True)
        search = GridSearchCV(searched, objectives, cv=GroupKFold(2))
        search.fit(X, Y, groups=groups)
    name = search.best_estimator_.encoder_.make_objective().name
    assert name == search.best_params_["objective"]


def test_sparse_rows_are_never_dense_all_at_once():
    X = sparse.random_array((16_000, 2_000), density=1e-3, format="csr", rng=0)
    tracemalloc.start()
    heads = ContrastiveHeads(
        "clip",
        head="linear",
        n_components=2,
        epochs=1,
        batch_size=4096,
        validation_fraction=0,
        device="cpu",
    )
    heads.fit(X, X[:, :2].toarray())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16_000 * 2_000 * 8


MISTAKES = [
    ({"learning_rate": -1}, "learning_rate is -1;"),
    ({"n_components": 1}, "n_components is 1"),
    ({"objective": "clop"}, "objective is 'clop'; it must be"),
    ({"clean": "0.2"}, r"clean is '0\.2'; it must be 'auto'"),
    ({"validation_fraction": 1.5}, "validation_fraction is 1.5"),
    ({"validation_fraction": 0, "refit": True}, "refit is True; it must be left out"),
    ({"validation_fraction": 0, "patience": 3}, "patience is 3; it must be 0"),
    ({"objective": "auto", "validation_fraction": 0}, "without held-out pairs"),
]


@pytest.mark.parametrize(("settings", "error"), MISTAKES)
def test_errors_name_the_parameters_of_the_estimator(matrices, settings, error):
    X, Y, _ = matrices
    heads = ContrastiveHeads(**{**QUICK, **settings})
    raises(ValueError, error, heads.fit, X, Y)


def test_columns_beside_the_matrices_have_a_value_in_each_row(matrices):
    X, Y, _ = matrices
    fit = ContrastiveHeads(**QUICK).fit
    raises(ValueError, "ids: row 0 has none", fit, X, Y, ids=[None, "a", "b"] * 80)
    raises(ValueError, "a and b: 1 id; 2 to train on", fit, X, Y, ids=["x"] * N)
    groups = ["a"] * 237 + [np.nan, "", "a"]
    raises(ValueError, "groups: row 237 has none", fit, X, Y, groups=groups)
    weights = [-1.0] * N
    raises(ValueError, "weights: row 0 is -1", fit, X, Y, sample_weight=weights)


# A unit row of one number is a sign, so there is no single component.
ONE_COMPONENT = [
    f"check_methods_{name}_invariance" for name in ("sample_order", "subset")
]
ONE_COMPONENT += [
    "check_dont_overwrite_parameters",
    "check_fit2d_1feature",
    "check_fit2d_predict1d",
]


# Weights are factors of the loss: repeated rows make other batches.
WEIGHTED = [
    f"check_sample_weight_equivalence_on_{kind}_data" for kind in ("dense", "sparse")
]


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_finds_nothing_else():
    failed = dict.fromkeys(ONE_COMPONENT, "n_components=1")
    failed |= dict.fromkeys(WEIGHTED, "other batches")
    heads = ContrastiveHeads("infoloob", epochs=1, n_components=4)
    options = {"on_skip": None, "on_fail": "raise"}
    checks = check_estimator(heads, expected_failed_checks=failed, **options)
    found = {check["check_name"] for check in checks if check["status"] == "xfail"}
    assert found == set(failed)


def test_a_score_has_an_interval_over_groups(matrices):
    """Hard rows come in groups, some of which are large."""
    X, Y, _ = matrices
    heads = ContrastiveHeads("cca").fit(X, Y)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), [5, 15] * 12)
    hard = groups % 3 == 0
    Y = Y + hard[:, None] * rng.normal(size=Y.shape)
    score, low, high = heads.score_interval(X, Y, groups=groups)
    x, y = heads.transform(X, Y)
    scores = x @ y.T
    right = [scores.argmax(1) == range(N), scores.argmax(0) == range(N)]
    found = np.mean(right, axis=0)
    assert score == heads.score(X, Y)
    assert score == pytest.approx(found.mean())
    draws = []
    for drawn in rng.integers(0, 24, (4000, 24)):
        rows = np.concatenate([found[groups == group] for group in drawn])
        draws.append(rows.mean())
    wanted = np.quantile(draws, (0.025, 0.975))
    np.testing.assert_allclose((low, high), wanted, atol=0.03)
    of_ids = heads.score_interval(X, Y)
    _, low_of_ids, high_of_ids = of_ids
    assert high - low > 1.3 * (high_of_ids - low_of_ids)
    assert heads.score_interval(X, Y, groups=np.arange(N)) == of_ids
