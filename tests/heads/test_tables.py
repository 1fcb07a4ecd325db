"""Tables: how their columns become numbers, at every door."""

import datetime
import json
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose
from sklearn.model_selection import GridSearchCV
from views import views

import cloob
from cloob import ContrastiveHeads, HeadSettings
from cloob.errors import InputError
from support import exit_code, raises, read_json, run_cloob

N = 400
DAY = datetime.date(2020, 1, 1)
CLOSED = HeadSettings("cca", standardise="column")


def frames(n=N, seed=0):
    """Two tables of one cause; a has a column of each kind, and missing cells."""
    x, b = views(n, (6, 8), seed)
    a = pd.DataFrame(x[:, :2], columns=["mass", "width"])
    a["count"] = np.exp(x[:, 2]).astype(int)
    a["is_old"] = x[:, 3] > 0
    a["kind"] = np.array(["leaf", "root", "stem"])[np.digitize(x[:, 4], [-1, 1])]
    a["day"] = [DAY + datetime.timedelta(int(100 * value)) for value in x[:, 5]]
    a.loc[::7, "mass"] = np.nan
    a.loc[::11, "kind"] = None
    a["nothing"] = None
    return a, pd.DataFrame(b).add_prefix("b")


def encoded_by_a_loop(a, training):
    """The columns of the first table, by its training rows."""
    mass = a["mass"].tolist()
    present = [mass[row] for row in training if not np.isnan(mass[row])]
    median = statistics.median(present)
    columns = [[median if np.isnan(value) else value for value in mass]]
    columns.append([float(np.isnan(value)) for value in mass])
    columns += [a[name].astype(float).tolist() for name in ("width", "count", "is_old")]
    kinds = [kind if isinstance(kind, str) else None for kind in a["kind"]]
    for level in sorted({kinds[row] for row in training} - {None}):
        columns.append([float(kind == level) for kind in kinds])
    columns.append([float(kind is None) for kind in kinds])
    columns.append([(day - datetime.date(1970, 1, 1)).days for day in a["day"]])
    return np.array(columns).T


def test_a_table_is_a_matrix_by_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = frames()
    a.to_csv("a.csv", index=False)
    b.to_csv("b.csv", index=False)
    words = "train vectors --a a.csv --b b.csv --objective cca --out run --device cpu"
    run_cloob(words)
    held_out = read_json(tmp_path / "run/decisions.json")["held_out"]
    training = sorted({*range(N)} - {*held_out})
    model = cloob.load_model("run", "cpu")
    wanted = encoded_by_a_loop(a, training)
    assert np.array_equal(model.numbers("a", a), wanted)
    b_rows = b.to_numpy()
    head = model.heads[0]
    assert head.options["features"] == wanted.shape[1] == 10
    plain = cloob.fit_heads(
        wanted[training],
        b_rows[training],
        held_out=(wanted[held_out], b_rows[held_out]),
        settings=HeadSettings("cca"),
    )
    for name, value in plain.heads[0].state_dict().items():
        assert_allclose(value, head.state_dict()[name], atol=1e-4)


def trained(folder, options):
    """A run on two tables in a folder, which has the bookkeeping of samples."""
    a, b = frames()
    a.insert(0, "sample", [f"S{row}" for row in range(N)])
    b.insert(3, "sample", a["sample"])
    a.to_csv(folder / "a.csv", index=False)
    b.to_csv(folder / "b.csv", index=False)
    words = "train vectors --a a.csv --b b.csv --drop sample --out run --device cpu"
    run_cloob(f"{words} {options}")
    return a, b


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two tables, a run on them, and their unit rows as the model gives them."""
    monkeypatch.chdir(tmp_path)
    a, b = trained(tmp_path, "--objective infoloob --epochs 2")
    model = cloob.load_model("run", "cpu")
    return a, b, {"a": model.encode_a(a).numpy(), "b": model.encode_b(b).numpy()}


def do(words):
    run_cloob(f"{words} --device cpu")


def test_a_table_is_embedded_in_any_order_of_its_columns(run, caplog):
    """Some of which are not the model's."""
    a, b, rows = run
    a.iloc[:, ::-1].to_csv("a.tsv", sep="\t", index=False)
    a.sample(frac=1, axis=1, random_state=0).to_parquet("a.parquet", index=False)
    b.iloc[:, ::-1].assign(other=1).to_csv("more.csv", index=False)
    a[17:18].to_csv("one.csv", index=False)
    for side, file in (("a", "a.tsv"), ("a", "a.parquet"), ("b", "more.csv")):
        do(f"embed run --{side} {file} --out {file}.npy")
        assert (np.load(f"{file}.npy") == rows[side]).all()
    said = "more.csv: sample, other left out: the model was trained without"
    assert said in caplog.messages
    do("embed run --a one.csv --out one.npy")
    assert_allclose(np.load("one.npy")[0], rows["a"][17], atol=1e-5)
    assert (cloob.load_model("run", "cpu").encode_b(pa.table(b)) == rows["b"]).all()


def test_every_door_takes_a_table(run):
    a, b, rows = run
    heads = ContrastiveHeads.load("run", "cpu")
    x, y = heads.transform(a.drop(columns="sample"), b)
    assert (x == rows["a"]).all()
    assert (y == rows["b"]).all()
    heads.save("saved")
    do("match saved --a a.csv --b b.csv --top 1 --out hits.csv --a-ids a.csv:sample")
    hits = pd.read_csv("hits.csv")
    assert hits["a"].tolist() == a["sample"].tolist()
    scores = rows["a"].astype(float) @ rows["b"].astype(float).T
    assert hits["b"].tolist() == scores.argmax(1).tolist()
    do("eval saved run --a a.csv --b b.csv --out report")
    for row in read_json(Path("report/results.json"))["rows"]:
        found = row["vectors"]["a.csv and b.csv"]["a_to_b@1"]
        expected = np.mean(hits["b"] == np.arange(N))
        assert found == pytest.approx(expected, abs=1e-6)
    words = "data --a a.csv --b b.csv --suspects s.csv --model run"
    run_cloob(words)


OTHER_TABLES = [
    (lambda a: a.drop(columns="width"), "x.csv: has no column 'width', which the"),
    (lambda a: a.assign(count="many"), "x.csv: column 'count' is a category; the"),
    (lambda a: a.assign(day=3), "x.csv: column 'day' is a number; the model was"),
    (
        lambda a: pd.concat([a, a["mass"]], axis=1),
        "x.csv: has several columns 'mass'",
    ),
]


@pytest.mark.parametrize(
    ("change", "error"),
    OTHER_TABLES,
)
def test_other_columns_are_refused_in_one_line(
    change, error, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    a, _ = trained(tmp_path, "--objective cca")
    change(a).to_csv("x.csv", index=False)
    for words in (
        "embed run --a x.csv --out x.npy",
        "match run --a x.csv --b b.csv",
        "eval run --a x.csv --b b.csv --out report",
    ):
        assert exit_code(f"{words} --device cpu") != 0
        assert error in capsys.readouterr().err


def test_what_is_no_table_of_columns_is_refused():
    a, b = frames()
    texts = [f"a cell of the {row}th plant" for row in range(N)]
    times = [datetime.time(row) for row in range(10, 20)] * (N // 10)
    for column, error in (
        (texts, "'note' holds 'a cell of the 0th plant' in row 0, and so many diff"),
        (times, r"'note' holds time64\[us\], which is no number, date or category"),
    ):
        noted = a.assign(note=column)
        raises(InputError, error, cloob.fit_heads, noted, b, None, 0, CLOSED)
    named = a.assign(name=texts)
    own = b.assign(own=texts)
    error = "column 'name' of a is column 'own' of b, row by row, and gives the pairs"
    raises(InputError, error, cloob.fit_heads, named, own, None, 0, CLOSED)


def test_one_word_among_numbers_is_named_with_its_row():
    a, b = frames()
    a["note"] = [*map(str, range(N))]
    a.loc[250, "note"] = "n.d."
    said = "'note' holds 'n.d.' in row 250, .* leave that cell empty"
    raises(InputError, said, cloob.fit_heads, a, b, None, 0, CLOSED)


def test_numbers_that_are_texts_are_named():
    a, b = frames()
    a["note"] = [None, *map(str, range(1, N))]
    said = "'note' holds numbers as texts, such as '1'"
    raises(InputError, said, cloob.fit_heads, a, b, None, 0, CLOSED)


def test_texts_that_are_all_dates_are_dates():
    """As in a CSV, of which pyarrow makes them."""
    a, b = frames()
    fitted = cloob.fit_heads(a, b, settings=CLOSED).encodings[0]
    texts = a.assign(day=a["day"].astype(str))
    assert cloob.fit_heads(texts, b, settings=CLOSED).encodings[0] == fitted


def test_a_constant_column_and_a_row_without_cells():
    a, b = frames()
    a = a.assign(always=5, once="yes").astype(object)
    a.loc[3] = None
    error = "1 row of 400 cannot be used, such as a row 3"
    raises(InputError, error, cloob.fit_heads, a, b)
    fitted = cloob.fit_heads(a.drop(3), b.drop(3), settings=CLOSED)
    assert fitted.history[0]["val_recall"] > 0.5


def test_data_frames_are_split_and_searched():
    """By scikit-learn, which refuses another order of X; that of y is by name."""
    a, b = frames()
    heads = ContrastiveHeads("cca").fit(b, a)
    assert heads.n_features_in_ == 8
    assert list(heads.feature_names_in_) == [*b.columns]
    y = heads.transform(None, a)
    assert (heads.transform(None, a[a.columns[::-1]]) == y).all()
    raises(ValueError, "same order as they were", heads.transform, b[b.columns[::-1]])
    less = a.drop(columns="mass")
    raises(ValueError, "y: has no column 'mass'", heads.score, b, less)
    search = GridSearchCV(heads, {"standardise": ["one", "column"]}, cv=3).fit(b, a)
    assert search.best_params_ == {"standardise": "column"}


def test_a_stranger_s_table_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path, "--objective cca")
    run_cloob("export run --to cloob --out model")
    capsys.readouterr()
    file = tmp_path / "model/vectors.json"
    config = read_json(file)
    column = {"name": "mass", "kind": "number"}
    for tables, error in (
        ("x", "a valid tuple"),
        ([{"columns": 3}, None], "a valid tuple"),
        ([{"columns": [{**column, "median": "x"}]}, None], "a valid number"),
        ([{"columns": [column]}, None], "takes an array (n, 10), not (400, 1)"),
    ):
        file.write_text(json.dumps({**config, "tables": tables}))
        run_cloob("embed model --a a.csv --out x.npy", code=2)
        said = capsys.readouterr().err
        assert error in said
        assert said.count("\n") == 1
