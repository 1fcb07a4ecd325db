"""Columns that are transformed: every door gives the rows of every other."""

import numpy as np
import pytest
from views import views

import cloob
from cloob import ContrastiveHeads, HeadSettings
from cloob.heads.settings import CLOSED_FORMS
from support import read_json, run_cloob


@pytest.mark.parametrize("objective", ["cca", "kcca", "auto"])
def test_every_door_transforms_columns(objective, tmp_path, monkeypatch):
    """Large numbers ask for transforms; without them rows are others."""
    monkeypatch.chdir(tmp_path)
    sides = [np.exp(side) for side in views(600, noise=0.5)]
    for name, side in zip("ab", sides, strict=True):
        np.save(f"{name}.npy", side)
    is_closed = objective in CLOSED_FORMS
    options = "" if is_closed else "--epochs 3 --embed-dim 16"
    words = f"train vectors --a a.npy --b b.npy --device cpu --objective {objective}"
    run_cloob(f"{words} {options} --refit --out run")
    decisions = read_json(tmp_path / "run/decisions.json")
    columns = (decisions if is_closed else decisions["ridge"])["columns"]
    for transform, _ in columns:
        assert transform != "plain"

    model = cloob.load_model("run", "cpu")
    rows = model.encode_a(sides[0]).numpy(), model.encode_b(sides[1]).numpy()
    for name, wanted in zip("ab", rows, strict=True):
        embed = f"embed run --{name} {name}.npy --out {name}-rows.npy --device cpu"
        run_cloob(embed)
        assert (np.load(f"{name}-rows.npy") == wanted).all()
    loop = {} if is_closed else {"epochs": 3, "n_components": 16}
    heads = ContrastiveHeads(objective, **loop, device="cpu", random_state=0)
    for one in (ContrastiveHeads.load("run", "cpu"), heads.fit(*sides)):
        found = one.transform(*sides)
        for x, y in zip(found, rows, strict=True):
            assert (x == y).all()


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
