"""Columns that are transformed: every door gives the rows of every other."""

import csv
import json

import numpy as np
import pytest
from views import views

import cloob
from cloob import ContrastiveHeads, HeadSettings, cli
from cloob.heads.settings import CLOSED_FORMS


@pytest.mark.parametrize("objective", ["cca", "kcca", "auto"])
def test_every_door_transforms_columns(objective, tmp_path, monkeypatch):
    """Large numbers ask for transforms; without them rows are others."""
    monkeypatch.chdir(tmp_path)
    a, b = views(600, noise=0.5)
    sides = {"a": np.exp(a), "b": np.exp(b)}
    for name, side in sides.items():
        np.save(f"{name}.npy", side)
    words = "--a a.npy --b b.npy --device cpu"
    of_loop = "" if objective in CLOSED_FORMS else "--epochs 3 --embed-dim 16"
    train = f"train vectors {words} --objective {objective} {of_loop} --refit --out run"
    assert cli.main(train.split()) == 0
    decisions = json.loads((tmp_path / "run/decisions.json").read_text())
    of_closed = decisions if objective in CLOSED_FORMS else decisions["ridge"]
    columns = of_closed["columns"]
    assert all(transform != "plain" for transform, _ in columns)

    model = cloob.load_model("run", "cpu")
    rows = {"a": model.encode_a(sides["a"]), "b": model.encode_b(sides["b"])}
    for name, wanted in rows.items():
        embed = f"embed run --{name} {name}.npy --out {name}-rows.npy --device cpu"
        assert cli.main(embed.split()) == 0
        assert (np.load(f"{name}-rows.npy") == wanted.numpy()).all()
    x, y = ContrastiveHeads.load("run", "cpu").transform(sides["a"], sides["b"])
    assert (x == rows["a"].numpy()).all() and (y == rows["b"].numpy()).all()
    loop = {} if objective in CLOSED_FORMS else {"epochs": 3, "n_components": 16}
    heads = ContrastiveHeads(objective, **loop, device="cpu", random_state=0)
    x, y = heads.fit(sides["a"], sides["b"]).transform(sides["a"], sides["b"])
    assert (x == rows["a"].numpy()).all() and (y == rows["b"].numpy()).all()

    assert cli.main(f"match run {words} --top 1 --out hits.csv".split()) == 0
    with (tmp_path / "hits.csv").open(newline="") as file:
        hits = list(csv.DictReader(file))
    scores = rows["a"].double() @ rows["b"].double().T
    assert [int(hit["b"]) for hit in hits] == scores.argmax(1).tolist()
    found = [float(hit["score"]) for hit in hits]
    assert found == pytest.approx(scores.amax(1).tolist(), abs=1e-5)


def test_columns_that_say_nothing_stay_small():
    """By their spreads alone all columns would be divided; for a named objective, too,
    pairs say that this finds less.
    """
    a, b = views(600, noise=0.5)
    noise = 0.3 * np.random.default_rng(0).normal(size=(600, 60))
    a = np.concatenate([10 * a, noise], 1)
    settings = HeadSettings("clip", epochs=6, embed_dim=8, device="cpu")
    recalls = {}
    for way in ("one", "column", "auto"):
        fitted = cloob.fit_heads(a, b, settings=settings.override(standardise=way))
        recalls[way] = max(line["val_recall"] for line in fitted.history)
    assert fitted.heads[0].standardise == "one"
    assert recalls["auto"] == recalls["one"] > recalls["column"] + 0.1


def test_pairs_of_no_weight_choose_no_columns():
    """Half of the rows of b are another thing, whose ranks alone agree with a's."""
    a, b = views(800, noise=0.5)
    is_other = np.arange(800) % 2 == 1
    weights = np.where(is_other, 0.0, 1.0)
    spoilt = np.where(is_other[:, None], np.exp(4 * b), b)
    found = []
    for side in (b, spoilt):
        settings = HeadSettings("cca")
        train = ~is_other if side is b else slice(None)
        fitted = cloob.fit_heads(
            a[train], side[train], None, 0, settings, weights=weights[train]
        )
        found.append(fitted.decisions["columns"])
    assert found[0] == found[1]
