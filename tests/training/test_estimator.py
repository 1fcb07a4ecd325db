"""``ContrastiveHeads`` in scikit-learn's hands; ``--objective auto`` and ``members``:
what is tried, joined, cut.
"""

import json
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
from torch.nn import functional as F
from train_helpers import recall

import cloob
from cloob import ContrastiveHeads, cli
from cloob.training.select import Selection, crossed
from cloob.training.step import Stepper
from support import raises

N = 240
QUICK = {
    "objective": "infoloob",
    "n_components": 8,
    "epochs": 8,
    "learning_rate": 1e-2,
    "batch_size": 60,
}
QUICK |= {"device": "cpu", "random_state": 3}


@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(N, 5))
    X = (cause @ rng.normal(size=(5, 12)) + 2).astype(np.float32)
    return (
        X,
        np.tanh(cause @ rng.normal(size=(5, 7)) / 2).astype(np.float32),
        [f"M{row // 3}" for row in range(N)],
    )


def test_it_trains_what_the_command_trains(matrices, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, Y, groups = matrices
    drawn = np.random.get_state()[1].tolist()  # noqa: NPY002
    heads = ContrastiveHeads(**QUICK).fit(X, Y, groups=groups)
    assert np.random.get_state()[1].tolist() == drawn  # noqa: NPY002
    np.save("x.npy", X)
    np.save("y.npy", Y)
    Path("ids.txt").write_text("\n".join(groups))
    Path("small.toml").write_text(
        "[align]\nembed_dim = 8\n[log]\ntensorboard = false\n"
    )
    words = (
        "train vectors --objective infoloob --a x.npy --b y.npy --ids ids.txt --epochs"
        " 8 --lr 0.01 --batch-size 60"
    )
    assert (
        cli.main(f"{words} --seed 3 --device cpu --out run --config small.toml".split())
        == 0
    )
    run = cloob.load_model("run")
    x, y = heads.transform(X, Y)
    assert (heads.transform(None, Y) == y).all()
    assert (x == run.encode_a(X).numpy()).all() and (y == run.encode_b(Y).numpy()).all()
    heads.save("saved")
    assert cli.main(["embed", "saved", "--a", "x.npy", "--out", "x-8.npz"]) == 0
    assert (np.load("x-8.npz")["vectors"] == x).all()
    assert (
        cli.main(
            ["eval", "saved", "run", "--a", "x.npy", "--b", "y.npy", "--out", "report"]
        )
        == 0
    )
    again = pickle.loads(pickle.dumps(heads))
    assert (again.transform(X) == x).all() and (
        clone(heads).fit(X, Y, groups).transform(X) == x
    ).all()
    assert heads.score(X, Y) == again.score(X.repeat(2, 0), Y.repeat(2, 0)) > 5 / N


def test_the_closed_form_is_an_objective(matrices, tmp_path):
    X, Y, groups = matrices
    heads = ContrastiveHeads("cca", random_state=0).fit(X, Y, groups=groups)
    assert heads.objective_["closed_form"] == "cca" and heads.transform(X).shape == (
        N,
        7,
    )
    heads.save(tmp_path / "saved")
    assert (
        cloob.load_model(tmp_path / "saved").encode_a(X).numpy() == heads.transform(X)
    ).all()
    blind = ContrastiveHeads("cca", validation_fraction=0, n_components=3).fit(X, Y)
    assert ContrastiveHeads("cca").fit(X, Y[:, 0]).transform(None, Y[:, 0]).shape == (
        N,
        2,
    )  # auto tries it, too
    assert (
        blind.transform(X).shape == (N, 3)
        and min(heads.score(X, Y), blind.score(X, Y)) > 0.4
    )
    raises(ValueError, "inv_tau is 9", ContrastiveHeads("cca", inv_tau=9).fit, X, Y)


def test_wrong_pairs_are_left_out(matrices):
    X, Y, _ = matrices
    wrong = np.arange(0, N, 4)
    swapped = Y.copy()
    swapped[wrong] = np.roll(Y[wrong], 1, 0)
    scores = [
        ContrastiveHeads("cca", clean=clean, random_state=0).fit(X, swapped).score(X, Y)
        for clean in (None, 0.25)
    ]
    assert scores[1] > scores[0] + 0.02
    raises(
        ValueError,
        r"clean is '2\.0'; it must be auto, or a share",
        ContrastiveHeads("cca", clean=2.0).fit,
        X,
        Y,
    )


def test_it_takes_any_matrices_and_is_searched(matrices):
    X, Y, groups = matrices
    X = np.where(X > 2, X, 0)
    plain = ContrastiveHeads(**{**QUICK, "epochs": 2}).fit(X, Y).transform(X)
    forms = (
        (torch.from_numpy(X), torch.from_numpy(Y)),
        (pd.DataFrame(X), pd.DataFrame(Y)),
        (sparse.csr_array(X), Y),
    )
    for x, y in forms:
        heads = ContrastiveHeads(**{**QUICK, "epochs": 2}).fit(x, y)
        assert (heads.transform(x) == plain).all() and heads.n_features_in_ == 12
    folds = GroupKFold(2)
    assert len(cross_val_score(heads, X, Y, groups=groups, cv=folds)) == 2
    search = GridSearchCV(
        heads, {"objective": ["clip", "cloob"], "epochs": np.array([2])}, cv=folds
    )
    search.fit(X, Y, groups=groups)
    assert (
        search.best_estimator_.encoder_.make_objective().name
        == search.best_params_["objective"]
    )
    assert search.transform(X).shape == (N, 8)
    raises(ValueError, "NaN", heads.fit, np.where(X > 0, X, np.nan), Y)
    raises(ValueError, "inconsistent numbers of samples", heads.fit, X, Y[:-1])
    raises(
        ValueError,
        r"240 of 240 pairs.*X row 0: holds NaN",
        heads.fit,
        X.astype(float) * 1e300 + 1e300,
        Y,
    )
    raises(ValueError, "must be one of", heads.set_params(objective="clop").fit, X, Y)


def test_sparse_rows_are_never_dense_all_at_once():
    X = sparse.random_array((16_000, 2_000), density=1e-3, format="csr", rng=0)
    tracemalloc.start()
    heads = ContrastiveHeads(
        "clip", head="linear", n_components=2, epochs=1, batch_size=4096, device="cpu"
    )
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
        (
            {},
            [*"abc"] * 79 + [np.nan, "", "a"],
            "groups: row 237 has none, as have 1 others",
        ),
        ({}, ["x"] * N, "X and y: 1 id; 2 to train on"),
    ],
)
def test_errors_name_the_parameters_of_the_estimator(matrices, settings, groups, error):
    X, Y, _ = matrices
    raises(
        ValueError, error, ContrastiveHeads(**{**QUICK, **settings}).fit, X, Y, groups
    )


# A unit row of one number is a sign, so there is no single component.
ONE_COMPONENT = [
    f"check_methods_{name}_invariance" for name in ("sample_order", "subset")
]
ONE_COMPONENT += [
    "check_dont_overwrite_parameters",
    "check_fit2d_1feature",
    "check_fit2d_predict1d",
]


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_finds_nothing_else():
    failed = dict.fromkeys(ONE_COMPONENT, "n_components=1")
    heads = ContrastiveHeads("infoloob", epochs=1, n_components=4)
    checks = check_estimator(
        heads, expected_failed_checks=failed, on_skip=None, on_fail="raise"
    )
    assert {
        check["check_name"] for check in checks if check["status"] == "xfail"
    } == set(ONE_COMPONENT)


# What is tried, joined, cut, resumed and refused


ROWS = 500


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two noisy views of one hidden cause."""
    folder = tmp_path_factory.mktemp("auto")
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(ROWS, 6))
    a = cause @ rng.normal(size=(6, 12)) + 0.3 * rng.normal(size=(ROWS, 12))
    b = np.tanh(cause @ rng.normal(size=(6, 8))) + 0.3 * rng.normal(size=(ROWS, 8))
    np.save(folder / "a.npy", a.astype(np.float32))
    np.save(folder / "b.npy", b.astype(np.float32))
    return folder


@pytest.fixture
def config(files, tmp_path):
    start = cloob.get_recipe("vectors").override(
        a=str(files / "a.npy"), b=str(files / "b.npy"), epochs=6
    )
    return start.override(
        device="cpu", tensorboard=False, lr=1e-2, batch_size=50, out=tmp_path / "run"
    )


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """What is tried and joined takes no more steps than three trainings."""
    out, steps, launch = tmp_path_factory.mktemp("run") / "run", [0], Stepper.launch

    def counting(*args, **options):
        steps[0] += 1
        return launch(*args, **options)

    words = (
        f"--a {files}/a.npy --b {files}/b.npy --epochs 6 --batch-size 50 --lr 0.01"
        f" --device cpu --out {out}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "launch", counting)
        assert cli.main(["train", "vectors", *words.split()]) == 0
    one_training = 6 * (ROWS - ROWS // 10) // 50
    assert one_training < steps[0] <= 3 * one_training
    return out


def test_all_are_tried_and_what_finds_most_is_joined(run, files):
    choice = json.loads((run / "objectives.json").read_text())
    tried = [(trial["objective"], trial["standardise"]) for trial in choice["trials"]]
    assert tried[:3] == [("cca", None), ("infoloob", "one"), ("infoloob", "column")]
    assert [name for name, _ in tried[3:]] == ["clip", "siglip", "cloob"] and len(
        {way for _, way in tried[3:]}
    ) == 1
    assert choice["clear"] == (choice["difference"][1] > 0) and (
        choice["clear"] or choice["chosen"] == "infoloob"
    )
    assert [each["objective"] for each in choice["beside"]][-1] == "cca" and len(
        choice["beside"]
    ) == 2
    newest = max((run / "checkpoints").iterdir())
    joined = json.loads((newest / "joined.json").read_text())
    epochs = [
        json.loads(line)["val_recall"]
        for line in (run / "epochs.jsonl").read_text().splitlines()
    ]
    assert joined["recall"] > max(epochs) and not (run / "members").exists()
    model, again = cloob.load_model(run), cloob.load_model(f"{run}:last")
    a, b = np.load(files / "a.npy")[:50], np.load(files / "b.npy")[:50]
    x, y = model.encode_a(a), model.encode_b(b)
    assert torch.equal(x, again.encode_a(a)) and x.shape[1] == model.embed_dim
    assert torch.allclose(x.norm(dim=1), torch.ones(50)) and torch.allclose(
        y.norm(dim=1), torch.ones(50)
    )


def test_rows_are_the_heads_side_by_side_less_the_hubs(run, files):
    """Cosines of the joined rows, from the heads alone by the formula of CSLS."""
    model = cloob.load_model(run)
    sides = model.model.image_head, model.model.text_head
    hubs = sides[0].options["hubs"]
    rows = []
    for side, name in zip(sides, "ab", strict=True):
        x = torch.from_numpy(np.load(files / f"{name}.npy")[:50])
        parts = zip(side.options["weights"], side.heads, strict=True)
        rows.append(
            F.normalize(
                torch.cat([w * F.normalize(head(x), dim=1) for w, head in parts], 1),
                dim=1,
            )
        )
    expected = rows[0] @ rows[1].T
    if hubs["rows"]:
        means = [
            (x @ side.bank.T).topk(10).values.mean(1) - side.usual
            for x, side in zip(rows, sides, strict=True)
        ]
        expected = (
            expected - hubs["strength"] * (means[0].unsqueeze(1) + means[1])
        ) / 1.5
    a, b = (np.load(files / f"{name}.npy")[:50] for name in "ab")
    found = model.encode_a(a) @ model.encode_b(b).T
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("seed", [4, 6])
def test_a_bias_against_hubs_does_not_lower_recall_at_ten(seed, tmp_path):
    """Of three equal closed forms, where all that joining can change is the bias; by
    the pairs that chose it.
    """
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=(300, 6))
    a = (cause @ rng.normal(size=(6, 12)) + rng.normal(size=(300, 12))).astype(
        np.float32
    )
    b = (
        np.tanh(cause @ rng.normal(size=(6, 8))) + 0.5 * rng.normal(size=(300, 8))
    ).astype(np.float32)
    files = {"a": a[:240], "b": b[:240], "val_a": a[240:], "val_b": b[240:]}
    for name, rows in files.items():
        np.save(tmp_path / f"{name}.npy", rows)
    config = cloob.get_recipe("vectors").override(
        **{name: f"{tmp_path}/{name}.npy" for name in files}
    )
    config = config.override(
        objective="cca",
        members=2,
        device="cpu",
        tensorboard=False,
        out=tmp_path / "run",
    )
    model = cloob.load_model(cloob.train(config).run)
    rows = [model.encode_a(a[240:]), model.encode_b(b[240:])]
    width = sum(
        head.options["embed_dim"]
        for head in getattr(model.heads[0], "heads", [model.heads[0]])
    )
    assert recall(10, *rows) >= recall(
        10, *(F.normalize(side[:, :width], dim=1) for side in rows)
    )


def test_a_joined_run_is_searched_and_judged_as_any_other(run, files, tmp_path):
    index = tmp_path / "b.idx"
    np.save(tmp_path / "q.npy", np.load(files / "a.npy")[:3])
    (tmp_path / "names.txt").write_text("".join(f"row {i}\n" for i in range(ROWS)))
    words = [
        "index",
        "--b",
        f"{files}/b.npy",
        "--labels",
        f"{tmp_path}/names.txt",
        "--model",
        str(run),
    ]
    assert cli.main([*words, "--out", str(index)]) == 0
    with cloob.Index.open(index) as opened:
        model = cloob.load_model(run)
        query = model.encode_a(np.load(tmp_path / "q.npy"))
        scores = query @ model.encode_b(np.load(files / "b.npy")).T
        best = [opened.search(row.numpy(), top=1).hits[0].item.path for row in query]
    assert best == [f"row {i}" for i in scores.argmax(1).tolist()]
    assert (
        cli.main(["eval", str(run), "--held-out", "--out", str(tmp_path / "report")])
        == 0
    )


def test_members_of_other_seeds_are_resumed_and_cut(config, monkeypatch):
    """A run that ended before its heads were joined joins them when it is resumed; a
    longer one joins anew.
    """
    config = config.override(objective="clip", members=2, embed_dim=16)
    with monkeypatch.context() as patch:
        patch.setattr(Selection, "join", lambda self, result: result)
        alone = cloob.train(config)
    resumed = cloob.train(config.override(resume="auto"))
    assert resumed.already_finished and resumed.checkpoint > alone.checkpoint
    head = cloob.load_model(resumed.run).model.image_head
    kinds = [member["kind"] for member in head.options["members"]]
    assert (
        set(kinds) <= {"mlp", "linear"}
        and head.options["embed_dim"] == 16 == head(torch.zeros(1, 12)).shape[1]
    )
    assert cloob.train(config.override(resume="auto")).checkpoint == alone.checkpoint
    longer = cloob.train(config.override(resume="auto", epochs=12, patience=0))
    assert (longer.run / "checkpoints").is_dir() and longer.epochs == 12


def test_gains_are_those_of_ids_that_did_not_choose():
    """The second is better on even ids alone, the third on odd ones: what half of them
    chooses loses on the other.
    """
    even, odd = torch.tensor([1.0, 0.0]).repeat(50), torch.tensor([0.0, 1.0]).repeat(50)
    usual = torch.full((100,), 0.5)
    assert (
        crossed([usual, even, odd])[0] == -0.5
        and crossed([usual, usual + 0.25])[0] == 0.25
    )


def test_the_estimator_chooses_too(files):
    X, Y = (np.load(files / f"{name}.npy") for name in "ab")
    heads = ContrastiveHeads(
        epochs=4, n_components=20, learning_rate=1e-2, device="cpu", random_state=0
    ).fit(X, Y)
    assert heads.objectives_["chosen"] and heads.transform(X).shape[1] <= 20
    assert heads.score(X, Y) > 0.1
