"""Labels by names and by examples."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from cloob.errors import InputError
from cloob.search import classify as heads
from cloob.search.classify import LabelOptions
from cloob.search.index import Index
from search_colours import ColourModel, make_index, open_index, write_pictures

NAMES = ("red", "green", "blue")


def stems(index: Index, ids: np.ndarray) -> list[str]:
    return [Path(item.path).stem.split("-")[0] for item in index.items(ids.tolist())]


def test_probabilities_are_the_softmax_at_the_models_temperature(index: Index) -> None:
    index.encoder().objective_config = {"inv_tau": 12.0}  # type: ignore[attr-defined]
    labels = index.classify(NAMES, LabelOptions(templates=("{c}", "a thing of colour {c}")))
    assert labels.inv_tau == 12.0 and not labels.by_default
    model = ColourModel()
    prompts = {name: model.encode_text([name, f"a thing of colour {name}"]).double().mean(0) for name in NAMES}
    rows = index.store.vectors("colours", labels.ids.tolist())
    for place in (0, 7, 31):
        powers = [math.exp(12 * float(rows[place] @ (prompts[n] / prompts[n].norm()).numpy())) for n in NAMES]
        assert labels.probabilities[place].tolist() == pytest.approx([p / sum(powers) for p in powers], abs=1e-5)
    for name, chosen in zip(stems(index, labels.ids), labels.chosen, strict=True):
        assert len(chosen) == 1 and (name not in NAMES or NAMES[chosen[0]] == name)


def clouds(n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` rows around each of three directions."""
    rows = np.repeat(np.eye(3, 8), n, axis=0) + 0.1 * np.random.default_rng(0).standard_normal((3 * n, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), np.repeat(np.arange(3), n)


def test_a_head_is_judged_on_what_it_has_not_seen() -> None:
    # Labels without a meaning: it knows the examples by heart, and cross-validation does not fall for that.
    rows, labels = clouds(8)
    judged = heads.fit_head(rows, np.random.default_rng(1).permutation(labels), ("a", "b", "c"), "f")
    assert judged.accuracy < 0.6 and judged.folds == 5 and judged.examples == 24
    rows, labels = clouds(2)
    judged = heads.fit_head(rows, labels, ("a", "b", "c"), "f")
    assert judged.accuracy == 1 and judged.folds == 2
    for count, names, said in ((2, ("a",), "are needed"), (5, ("a", "b", "c"), "example of 'c'")):
        with pytest.raises(InputError, match=said):
            heads.fit_head(rows[:count], labels[:count], names, "f")


def test_a_head_is_kept_as_numbers(tmp_path: Path) -> None:
    head, path = heads.fit_head(*clouds(3), ("a", "b", "c"), "f"), tmp_path / "heads" / "x.safetensors"
    heads.save_head(path, head)
    read = heads.load_head(path, "f")
    np.testing.assert_array_equal(read.weight, head.weight)
    assert (tuple(read.names), read.accuracy, read.strength) == (head.names, head.accuracy, head.strength)
    with pytest.raises(InputError, match="for this model"):
        heads.load_head(path, "g")
    whole = path.read_bytes()
    for content in (whole[:50], b"", pickle.dumps({"weight": 1}), whole.replace(b"cloob-head-1", b"cloob-head-2")):
        path.write_bytes(content)
        with pytest.raises(InputError, match="or damaged"):
            heads.load_head(path, "f")


def test_an_example_lies_in_a_folder_of_its_label(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "examples", n=1)
    loose = pytest.raises(InputError, match=r"black-0\.png: lies in no folder of a label")
    with open_index(make_index(tmp_path / "index", folder)) as examples, loose:
        heads.head_of(examples.view(), folder)
