"""Every setting of heads, at every door: another value than the default changes what is
fitted, or is refused in one line that names it.
"""

import dataclasses
import inspect
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import FunctionTransformer
from views import views

import cloob
from cloob import ContrastiveHeads, HeadSettings
from cloob.errors import InputError
from cloob.heads.config import HeadsConfig
from cloob.heads.settings import OF_THE_LOOP
from support import read_json

N = 240
START = {"epochs": 2, "embed_dim": 16, "batch_size": 24, "device": "cpu"}
# Another value of every setting of a fit, whose effect shows in two epochs.
VALUES = {
    "objective": "clip",
    "inv_tau": 5.0,
    "beta": 2.0,
    "bias": -1.0,
    "learnable_inv_tau": True,
    "learnable_beta": True,
    "scale": "unit",
    "exclude_above": -0.01,
    "members": 3,
    "clean": "auto",
    "head": "linear",
    "embed_dim": 4,
    "dropout": 0.4,
    "standardise": "column",
    "start": "closed-form",
    "lr": 5e-3,
    "weight_decay": 3.0,
    "epochs": 3,
    "batch_size": 16,
    "patience": 1,
    "refit": True,
    "seed": 1,
}
# What no number of a fit shows.
ELSEWHERE = {
    "device": "auto is the CPU here",
    "workers": "how many processes decode; no vectors are decoded",
    "out": "the folder",
    "kind": "has one value",
    "resume": "a folder that holds a run",
    "overwrite": "a folder that holds a run",
}
# Where pairs come from.
OF_PAIRS = {
    "drop": ("a0",),
    "data": ("demo",),
    "val_data": ("demo",),
    "image_encoder": "timm:resnet18",
    "text_encoder": "hf:words",
    "image_size": 32,
    "image_column": "picture",
    "caption_column": "caption",
    "mask_duplicates": True,
    "val_split": 0.3,
    "max_bad_fraction": 0.001,
}
# Its effect shows where epochs get worse.
OF_THE_END = ("patience",)


PARAMETERS = inspect.signature(ContrastiveHeads).parameters


def data():
    """Two views, in part wrong."""
    a, b = views(N)
    b[::6] = np.roll(b[::6], 1, 0)
    return a, b


def shown(history, decisions):
    lines = [{**line, "seconds": 0} for line in history]
    return json.dumps([lines, decisions], sort_keys=True, default=str)


def weights_of(heads):
    return [x.numpy().tobytes() for head in heads for x in head.state_dict().values()]


def without_effect(fitted, changes):
    """The settings of which neither an effect nor a refusal shows."""
    usual = fitted({})
    silent = []
    for name, change in changes.items():
        try:
            if fitted(change) == usual:
                silent.append(name)
        except (InputError, ValueError) as error:
            text = str(error)
            assert name in text.replace("-", "_") and "\n" not in text, (name, text)
    return silent


def changes_of(values):
    return {name: {name: value} for name, value in values.items()}


def test_the_values_are_of_all_settings():
    fields = dataclasses.fields(HeadSettings)
    assert {field.name for field in fields} == {*VALUES, "device"}
    for field in fields:
        assert VALUES.get(field.name) != field.default


def fits(objective, held_out=0.1, **more):
    """What is fitted with a change of settings."""
    a, b = data()
    start = {**START, "objective": objective, **more}
    if objective == "cca":
        start = {"objective": objective, "embed_dim": 6, "device": "cpu"}

    def fitted(change):
        settings = HeadSettings(**{**start, **change})
        found = cloob.fit_heads(a, b, held_out=held_out, settings=settings)
        return weights_of(found.heads), shown(found.history, found.decisions)

    return fitted


@pytest.mark.parametrize("objective", ["infoloob", "cloob", "siglip"])
def test_every_setting_of_a_fit(objective):
    values = {name: VALUES[name] for name in VALUES if name not in OF_THE_END}
    if objective == "siglip":  # which learns its inverse temperature, in its unit
        values |= {"learnable_inv_tau": False, "scale": "paper"}
    assert without_effect(fits(objective), changes_of(values)) == []


def test_every_setting_of_a_closed_form_and_of_a_choice():
    assert without_effect(fits("cca"), changes_of(VALUES)) == []
    names = VALUES.keys() - {"objective", *OF_THE_LOOP}
    of_choice = {name: VALUES[name] for name in names}
    assert without_effect(fits("auto"), changes_of(of_choice)) == []


def test_what_ends_a_fit():
    changes = changes_of({name: VALUES[name] for name in OF_THE_END})
    assert without_effect(fits("infoloob", epochs=12, lr=0.05), changes) == []


def test_every_setting_of_a_fit_that_holds_nothing_out():
    fitted = fits("infoloob", held_out=0.0, patience=0)
    assert without_effect(fitted, changes_of(VALUES)) == []


def test_every_parameter_of_the_estimator():
    X, Y = data()
    start = {
        "objective": "infoloob",
        "epochs": 6,
        "n_components": 16,
        "batch_size": 24,
        "learning_rate": 0.05,
        "device": "cpu",
        "random_state": 0,
    }
    values = {name: VALUES[name] for name in VALUES if name in PARAMETERS}
    values |= {
        "n_components": 4,
        "learning_rate": 5e-3,
        "validation_fraction": 0.3,
        "random_state": 1,
        "refit": False,
        "x_pipeline": FunctionTransformer(np.tanh),
        "y_pipeline": FunctionTransformer(np.tanh),
    }
    assert PARAMETERS.keys() == {*values, "device"}

    def fitted(change):
        heads = ContrastiveHeads(**{**start, **change}).fit(X, Y)
        return heads.transform(X, Y)[0].tobytes(), shown(
            heads.history_, heads.decisions_
        )

    assert without_effect(fitted, changes_of(values)) == []


@pytest.fixture
def folder(tmp_path):
    """Vectors, of which one cannot be used, and what else is known of their rows."""
    a, b = data()
    a[7, 3] = np.inf
    for name, rows in (("a", a), ("b", b), ("val_a", a[::3]), ("val_b", b[::3])):
        frame = pd.DataFrame(rows).add_prefix(name[-1])
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    number = np.arange(N)
    held_out = number[: N // 3]
    columns = {"a_ids": number, "b_ids": number ^ 1, "weights": 1 + number % 3}
    columns |= {"ids": number // 2, "groups": number // 8}
    columns |= {"val_ids": held_out // 2, "val_groups": held_out // 8}
    for name, numbers in columns.items():
        np.savetxt(tmp_path / name, numbers, "%d")
    return tmp_path


def test_every_leaf_of_a_run_of_vectors(folder):
    """Those of a fit again, and where the pairs come from."""

    def files(**names):
        return {name: str(folder / file) for name, file in names.items()}

    held_out = files(val_a="val_a.csv", val_b="val_b.csv")
    of_a_fit = {name: VALUES[name] for name in VALUES if name not in OF_THE_END}
    changes = changes_of({**of_a_fit, **OF_PAIRS})
    for name in ("ids", "groups", "weights", "b_ids"):
        changes[name] = files(**{name: name})
    changes["a_ids"] = files(a_ids="a_ids", b_ids="b_ids")
    changes["a"] = files(a="val_a.csv")
    changes["b"] = files(b="val_b.csv")
    changes["val_a"] = held_out
    changes["val_b"] = files(val_b="val_b.csv")
    for name in ("val_ids", "val_groups"):
        changes[name] = held_out | files(**{name: name})
    names = {field.name for field in dataclasses.fields(HeadsConfig)}
    assert names == changes.keys() | ELSEWHERE.keys() | set(OF_THE_END)
    sides = files(a="a.csv", b="b.csv")
    recipe = cloob.get_recipe("vectors", objective="infoloob")
    start = recipe.override(**START, **sides, lr=0.02)
    numbers = iter(range(1000))

    def run(change):
        out = folder / f"run{next(numbers)}"
        history = []
        config = start.override(**{**change, "out": out})
        cloob.train_heads(config, on_epoch=history.append)
        weights = [x.read_bytes() for x in sorted(out.rglob("*.safetensors"))]
        decisions = read_json(out / "decisions.json")
        del decisions["of"], decisions["finished"]
        names = [x.name for x in sorted(out.rglob("*")) if x.is_file()]
        return weights, shown(history, decisions), names

    assert without_effect(run, changes) == []
    assert run(changes["val_ids"]) != run(changes["val_a"])
