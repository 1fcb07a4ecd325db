"""Models are replaced as a unit; an index of another format is made anew."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from index_fakes import FakeEncoder, Stopping, content, options, units, write_noise

from cloob import cli
from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.records import INDEX_FILE, IndexedModel
from search_colours import ColourModel, loads, write_pictures


@pytest.fixture
def place(tmp_path):
    """The address of a new index."""
    return str(tmp_path / "idx")


def test_a_model_is_replaced_and_an_interrupted_replacement_goes_on(place, tmp_path):
    folder = tmp_path / "p"
    for seed in range(12):
        write_noise(folder / f"{seed}.png", seed)
    write_noise(tmp_path / "q" / "q.png", 99)
    with Index.create(place) as index:
        index.update([folder, tmp_path / "q"], options(FakeEncoder()))
        index.update([folder, tmp_path / "q"], options(FakeEncoder("second", seed=5)))
        second = content(index, "second")
        new = FakeEncoder(seed=1, dim=5)
        with pytest.raises(InputError, match="--replace-model"):
            index.update([folder], options(new))
        stopping = Stopping(8, KeyboardInterrupt(), seed=1, dim=5)
        with pytest.raises(KeyboardInterrupt):
            index.update([folder], options(stopping, replace_model=True))
        assert index.search(units(1, 5)[0]).searched == 8
        done = index.update([folder, tmp_path / "q"], options(new, replace_model=True))
        assert done.embedded == new.seen == 5 and done.unchanged == 8
        assert [model.name for model in index.models] == ["fake", "second"]
        rows = index.store.vectors("fake", index.store.ids())
        assert rows.shape == (13, 5) and np.isfinite(rows).all()
        assert content(index, "second") == second
        assert len(list(Path(place).glob("vectors-*"))) == 2


def test_vectors_of_two_models_never_mix_whoever_writes(place, tmp_path):
    folder = tmp_path / "p"
    for seed in range(8):
        write_noise(folder / f"{seed}.png", seed)

    def replace():  # another process, before the second batch is written
        with Index.open(place, writable=True) as other:
            model = IndexedModel("fake", "x", "0" * 32, 16)
            other.store.add_model(model, replace=True)

    with Index.create(place) as index:
        with pytest.raises(InputError, match="no vectors of a model 'fake'"):
            index.update([folder], options(Stopping(4, replace)))
        assert not np.isfinite(index.store.vectors("fake", index.store.ids())).any()


def test_an_index_of_another_format_names_what_to_do(
    place, tmp_path, capsys, monkeypatch
):
    loads(monkeypatch)
    pictures = write_pictures(tmp_path / "p", n=1)
    make = ["index", str(pictures), "--model", "m", "--out", place]
    assert cli.main(make) == 0
    for version in (6, 99):
        with closing(sqlite3.connect(Path(place) / INDEX_FILE)) as file:
            file.execute(f"PRAGMA user_version = {version}")
        for words in (["search", place, "red"], ["index", "--out", place]):
            assert cli.main(words) == 2
            said = f"cloob index SRC --model MODEL --out {place} --anew"
            assert said in capsys.readouterr().err
    (Path(place) / "other").mkdir()
    assert cli.main([*make, "--anew"]) == 0
    assert "8 added; 8 embedded" in capsys.readouterr().out
    assert (Path(place) / "other").is_dir()


def test_a_search_refuses_other_weights_under_the_name_of_a_model(
    place, tmp_path, capsys, monkeypatch
):
    loads(monkeypatch)
    pictures = write_pictures(tmp_path / "p", n=1)
    make = ["index", str(pictures), "--model", "m", "--out", place]
    assert cli.main(make) == 0
    assert cli.main(["search", place, "red", "--cutoff", "none"]) == 0
    loads(monkeypatch, lambda *_, **__: ColourModel("other"))
    for words in (["search", place, "red"], ["classify", place, "--labels", "a,b"]):
        assert cli.main(words) == 2
        assert "m: has other weights" in capsys.readouterr().err
