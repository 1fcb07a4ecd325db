"""``ContrastiveHeads`` in scikit-learn's hands: equal to the command, any matrices, splits by group, saved and read."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.utils.estimator_checks import check_estimator

import cloob
from cloob import ContrastiveHeads, cli
from support import raises

N = 240
QUICK = {"objective": "infoloob", "n_components": 8, "epochs": 8, "learning_rate": 1e-2, "batch_size": 60}
QUICK |= {"device": "cpu", "random_state": 3}
Matrices = tuple[np.ndarray, np.ndarray, list[str]]


@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(N, 5))
    X = (cause @ rng.normal(size=(5, 12)) + 2).astype(np.float32)
    return X, np.tanh(cause @ rng.normal(size=(5, 7)) / 2).astype(np.float32), [f"M{row // 3}" for row in range(N)]


def test_it_trains_what_the_command_trains(matrices, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, Y, groups = matrices
    drawn = np.random.get_state()[1].tolist()  # noqa: NPY002
    heads = ContrastiveHeads(**QUICK).fit(X, Y, groups=groups)
    assert np.random.get_state()[1].tolist() == drawn  # noqa: NPY002
    np.save("x.npy", X)
    np.save("y.npy", Y)
    Path("ids.txt").write_text("\n".join(groups))
    Path("small.toml").write_text("[align]\nembed_dim = 8\n[log]\ntensorboard = false\n")
    words = "train vectors --objective infoloob --a x.npy --b y.npy --ids ids.txt --epochs 8 --lr 0.01 --batch-size 60"
    assert cli.main(f"{words} --seed 3 --device cpu --out run --config small.toml".split()) == 0
    run = cloob.load_model("run")
    x, y = heads.transform(X, Y)
    assert (heads.transform(None, Y) == y).all()
    assert (x == run.encode_a(X).numpy()).all() and (y == run.encode_b(Y).numpy()).all()
    heads.save("saved")
    assert cli.main(["embed", "saved", "--a", "x.npy", "--out", "x-8.npz"]) == 0
    assert (np.load("x-8.npz")["vectors"] == x).all()
    assert cli.main(["eval", "saved", "run", "--a", "x.npy", "--b", "y.npy", "--out", "report"]) == 0
    again = pickle.loads(pickle.dumps(heads))
    assert (again.transform(X) == x).all() and (clone(heads).fit(X, Y, groups).transform(X) == x).all()
    assert heads.score(X, Y) == again.score(X.repeat(2, 0), Y.repeat(2, 0)) > 5 / N


def test_the_closed_form_is_an_objective(matrices, tmp_path):
    X, Y, groups = matrices
    heads = ContrastiveHeads("cca", random_state=0).fit(X, Y, groups=groups)
    assert heads.objective_["closed_form"] == "cca" and heads.transform(X).shape == (N, 7)
    heads.save(tmp_path / "saved")
    assert (cloob.load_model(tmp_path / "saved").encode_a(X).numpy() == heads.transform(X)).all()
    blind = ContrastiveHeads("cca", validation_fraction=0, n_components=3).fit(X, Y)
    assert blind.transform(X).shape == (N, 3) and min(heads.score(X, Y), blind.score(X, Y)) > 0.4
    raises(ValueError, "inv_tau is 9", ContrastiveHeads("cca", inv_tau=9).fit, X, Y)


def test_wrong_pairs_are_left_out(matrices):
    X, Y, _ = matrices
    wrong = np.arange(0, N, 4)
    swapped = Y.copy()
    swapped[wrong] = np.roll(Y[wrong], 1, 0)
    scores = [
        ContrastiveHeads("cca", clean=clean, random_state=0).fit(X, swapped).score(X, Y) for clean in (None, 0.25)
    ]
    assert scores[1] > scores[0] + 0.02
    raises(ValueError, r"clean is '2\.0'; it must be auto, or a share", ContrastiveHeads("cca", clean=2.0).fit, X, Y)


def test_it_takes_any_matrices_and_is_searched(matrices):
    X, Y, groups = matrices
    X = np.where(X > 2, X, 0)
    plain = ContrastiveHeads(**{**QUICK, "epochs": 2}).fit(X, Y).transform(X)
    forms = (torch.from_numpy(X), torch.from_numpy(Y)), (pd.DataFrame(X), pd.DataFrame(Y)), (sparse.csr_array(X), Y)
    for x, y in forms:
        heads = ContrastiveHeads(**{**QUICK, "epochs": 2}).fit(x, y)
        assert (heads.transform(x) == plain).all() and heads.n_features_in_ == 12
    folds = GroupKFold(2)
    assert len(cross_val_score(heads, X, Y, groups=groups, cv=folds)) == 2
    search = GridSearchCV(heads, {"objective": ["clip", "cloob"], "epochs": np.array([2])}, cv=folds)
    search.fit(X, Y, groups=groups)
    assert search.best_estimator_.encoder_.make_objective().name == search.best_params_["objective"]
    assert search.transform(X).shape == (N, 8)
    raises(ValueError, "NaN", heads.fit, np.where(X > 0, X, np.nan), Y)
    raises(ValueError, "inconsistent numbers of samples", heads.fit, X, Y[:-1])
    raises(ValueError, r"240 of 240 pairs.*X row 0: holds NaN", heads.fit, X.astype(float) * 1e300 + 1e300, Y)
    raises(ValueError, "must be one of", heads.set_params(objective="clop").fit, X, Y)


def test_sparse_rows_are_never_dense_all_at_once():
    X = sparse.random_array((16_000, 2_000), density=1e-3, format="csr", rng=0)
    tracemalloc.start()
    heads = ContrastiveHeads("clip", head="linear", n_components=2, epochs=1, batch_size=4096, device="cpu")
    heads.fit(X, X[:, :2].toarray())
    assert tracemalloc.get_traced_memory()[1] < 16_000 * 2_000 * 8
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("settings", "groups", "error"),
    [
        ({"learning_rate": -1}, None, "learning_rate is -1.0"),
        ({"n_components": 1}, None, "n_components is 1"),
        ({"validation_fraction": 1.5}, None, "validation_fraction is 1.5"),
        ({}, [None, "a", "b"] * 80, "groups: row 0 has none, as have 79 others"),
        ({}, [*"abc"] * 79 + [np.nan, "", "a"], "groups: row 237 has none, as have 1 others"),
        ({}, ["x"] * N, "X and y: 1 id; 2 to train on"),
    ],
)
def test_errors_name_the_parameters_of_the_estimator(matrices, settings, groups, error):
    X, Y, _ = matrices
    raises(ValueError, error, ContrastiveHeads(**{**QUICK, **settings}).fit, X, Y, groups)


# A unit row of one number is a sign, so there is no single component.
ONE_COMPONENT = [f"check_methods_{name}_invariance" for name in ("sample_order", "subset")]
ONE_COMPONENT += ["check_dont_overwrite_parameters", "check_fit2d_1feature", "check_fit2d_predict1d"]


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_finds_nothing_else():
    failed = dict.fromkeys(ONE_COMPONENT, "n_components=1")
    heads = ContrastiveHeads("infoloob", epochs=1, n_components=4)
    checks = check_estimator(heads, expected_failed_checks=failed, on_skip=None, on_fail="raise")
    assert {check["check_name"] for check in checks if check["status"] == "xfail"} == set(ONE_COMPONENT)
