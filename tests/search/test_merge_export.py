"""Two indices in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from index_fakes import FakeEncoder, options, write_noise

from cloob.errors import InputError
from cloob.search.index import Index


def make(folder: Path, pictures: dict[str, int], *encoders: FakeEncoder, name: str = "p") -> Index:
    for path, seed in pictures.items():
        write_noise(folder / name / path, seed)
    index = Index.create(folder / "index")
    for encoder in encoders:
        index.update([folder / name], options(encoder))
    return index


def test_a_merge_adds_what_is_not_there(tmp_path: Path) -> None:
    first, second = FakeEncoder(), FakeEncoder("second", seed=1, dim=5)
    here = make(tmp_path / "a", {"x.png": 1, "y.png": 2}, first)
    there = make(tmp_path / "b", {"u.png": 2, "v.png": 3}, FakeEncoder("other name"), second)
    done = here.merge(there)
    assert (done.added, done.vectors, done.present, done.other) == (2, 4, 0, 0)
    assert len(here) == 4 and [model.name for model in here.models] == ["fake", "second"]
    ids = here.store.ids().tolist()
    assert np.isfinite(here.store.vectors("fake", ids)).all()
    assert np.isfinite(here.store.vectors("second", ids)).all(1).tolist() == [False, False, True, True]
    assert here.store.nearest("fake", here.store.vectors("fake", [4])[0], 1).ids.tolist() == [4]
    again = here.merge(there)
    assert (again.added, again.vectors, again.present) == (0, 0, 2)


def test_a_merge_of_one_source_completes_models_and_keeps_what_is_said_here(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    here = make(folder, {"x.png": 1, "y.png": 2}, FakeEncoder())
    there = Index.create(tmp_path / "there")
    (folder / "p" / "x.txt").write_text("said later")
    write_noise(folder / "p" / "y.png", 5)
    there.update([folder / "p"], options(FakeEncoder("second", seed=1)))
    done = here.merge(there)
    assert (done.added, done.vectors, done.present, done.other) == (0, 1, 1, 1)
    item = here.items([1])[0]
    assert item.path.endswith("x.png") and item.caption is None
    assert np.isfinite(here.store.vectors("second", [1, 2])).all(1).tolist() == [True, False]


def test_vectors_of_two_models_never_mix_and_no_picture_is_there_twice(tmp_path: Path) -> None:
    here = make(tmp_path / "a", {"x.png": 1}, FakeEncoder())
    there = make(tmp_path / "b", {"u.png": 2}, FakeEncoder(seed=1))
    before = here.revision()
    with pytest.raises(InputError, match="another model 'fake'"):
        here.merge(there)
    with pytest.raises(InputError, match="--replace-model"):
        here.update([tmp_path / "a" / "p"], options(FakeEncoder(seed=1)))
    with pytest.raises(InputError, match="other weights"):
        here.use("fake", FakeEncoder(seed=1))
    assert here.revision() == before
    (tmp_path / "a" / "p" / "sub").mkdir()
    write_noise(tmp_path / "a" / "p" / "sub" / "b.png", 3)
    inside = Index.create(tmp_path / "inside")
    inside.update([tmp_path / "a" / "p" / "sub"], options(FakeEncoder("second", seed=2)))
    with pytest.raises(InputError, match="which is a source of this index"):
        here.merge(inside)
    assert here.revision() == before and len(here.models) == 1
