"""Heads with a pipeline of scikit-learn for each side."""

import pickle

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from views import views

from cloob import ContrastiveHeads
from support import raises, run_cloob

N = 300


class Scaled(TransformerMixin, BaseEstimator):
    """Scales by the largest number that it was fitted to."""

    def fit(self, X, y=None):
        self.rows_ = np.asarray(X).copy()
        self.largest_ = np.abs(self.rows_).max()
        return self

    def transform(self, X):
        return np.asarray(X) / self.largest_


def texts_of(b):
    """What is large in a row, in words."""
    return [
        " ".join(f"w{column}" for column in np.flatnonzero(row > row.mean()))
        for row in b
    ]


@pytest.mark.parametrize("refit", [False, True])
def test_held_out_rows_say_nothing_of_a_pipeline(refit):
    """Nor do rows of other folds."""
    X, y = views(N)
    plain = ContrastiveHeads("cca", validation_fraction=0.2, refit=refit)
    heads = clone(plain).set_params(x_pipeline=Scaled()).fit(X, y)
    fitted = heads.x_pipeline_.rows_
    assert len(fitted) == N * 0.8
    assert {*fitted[:, 0]} < {*X[:, 0]}
    assert not hasattr(heads.x_pipeline, "rows_")
    assert heads.y_pipeline_ is None
    # the same pairs are held out as without a pipeline
    before, after = (h.history_[0]["val_recall"] for h in (plain.fit(X, y), heads))
    assert after == pytest.approx(before, abs=0.01)
    scaled = X / heads.x_pipeline_.largest_
    wanted = clone(plain).fit(scaled, y).transform(scaled)
    assert_allclose(heads.transform(X), wanted, atol=1e-4)


def test_any_rows_go_through_and_are_searched():
    """Data frames on one side, texts on the other, which become sparse rows."""
    a, b = views(N)
    X = pd.DataFrame(a).add_prefix("a").assign(kind=np.where(a[:, 0] > 0, "x", "y"))
    y = texts_of(b)
    numbers = StandardScaler(), [f"a{place}" for place in range(12)]
    heads = ContrastiveHeads(
        "cca",
        x_pipeline=make_column_transformer(numbers, (OneHotEncoder(), ["kind"])),
        y_pipeline=make_pipeline(CountVectorizer()),
    ).fit(X, y)
    assert heads.score(X, y) > 0.05 > 10 / N
    assert heads.predict(X).shape == heads.score_samples(X, y).shape == (N,)
    expected = heads.transform(None, y[:1]).shape
    assert heads.transform(X.iloc[:1]).shape == expected
    again = pickle.loads(pickle.dumps(heads))
    assert (again.transform(X) == heads.transform(X)).all()
    name = "y_pipeline__countvectorizer__max_features"
    search = GridSearchCV(heads, {name: [2, 6]}, cv=KFold(3, shuffle=True))
    search.fit(X, y)
    best = search.best_estimator_.y_pipeline_[-1]
    assert search.best_params_ == {name: 6}
    assert len(best.vocabulary_) == 6


def test_equal_rows_are_one_id_before_a_pipeline_sees_them(caplog):
    caplog.set_level("INFO", "cloob")
    X = views(100)[0].repeat(2, 0)
    y = views(200, seed=1)[1]
    scaler = StandardScaler(with_mean=False)
    forms = [(rows, scaler) for rows in (X, sparse.csr_array(X), pd.DataFrame(X))]
    forms.append(([" ".join(f"{x:.3f}" for x in row) for row in X], CountVectorizer()))
    for rows, pipeline in forms:
        caplog.clear()
        ContrastiveHeads("cca", x_pipeline=pipeline).fit(rows, y)
        assert "100 of 200 rows are equal" in caplog.text


def test_a_folder_keeps_no_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, y = views(N)
    heads = ContrastiveHeads("cca", x_pipeline=StandardScaler()).fit(X, y)
    raises(
        ValueError, "StandardScaler: a pipeline is code, which no", heads.save, "saved"
    )
    assert not (tmp_path / "saved").exists()
    rows = heads.x_pipeline_.transform(X)
    plain = ContrastiveHeads("cca").fit(rows, y)
    plain.save("saved")
    np.save("rows.npy", rows)
    run_cloob("embed saved --a rows.npy --out x.npy")
    assert_allclose(np.load("x.npy"), plain.transform(rows))


def test_what_a_pipeline_gives_is_checked():
    X, y = views(N)
    classifier = ContrastiveHeads("cca", y_pipeline=LogisticRegression())
    said = r"y_pipeline is LogisticRegression\(\), which has no transform"
    raises(ValueError, said, classifier.fit, X, y)
    X[0, 0] = np.nan
    heads = ContrastiveHeads("cca", x_pipeline=StandardScaler())
    raises(ValueError, "contains NaN", heads.fit, X, y)
    raises(ValueError, "y to be passed", heads.fit, X, None)
    raises(ValueError, "inconsistent numbers of samples", heads.fit, X, y[1:])
