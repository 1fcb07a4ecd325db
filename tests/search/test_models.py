"""An index has one model; of another one, or of another format, it is made anew."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from index_fakes import (
    FakeEncoder,
    Stopping,
    content,
    item,
    options,
    units,
    write,
    write_noise,
)

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.records import INDEX_FILE, IndexedModel
from search_colours import ColourModel, loads, write_pictures
from support import run_cloob


@pytest.fixture
def place(tmp_path):
    """The address of a new index."""
    return str(tmp_path / "idx")


@pytest.fixture
def made(place, tmp_path, monkeypatch):
    """The words that made the index at ``place``."""
    loads(monkeypatch)
    pictures = write_pictures(tmp_path / "p", n=1)
    words = f"index {pictures} --model m --out {place}"
    run_cloob(words)
    return words


def test_an_interrupted_update_goes_on_and_other_weights_are_refused(place, tmp_path):
    folder = tmp_path / "p"
    for seed in range(12):
        write_noise(folder / f"{seed}.png", seed)
    with Index.create(place) as index:
        with pytest.raises(KeyboardInterrupt):
            index.update([folder], options(Stopping(8, KeyboardInterrupt())))
        assert len(index) == 8
        done = index.update([folder], options(FakeEncoder()))
        assert done.embedded == 4
        assert done.unchanged == 8
        before = content(index)
        write_noise(folder / "new.png", 99)
        for other in (FakeEncoder(seed=1), FakeEncoder("second", seed=1, dim=5)):
            with pytest.raises(InputError, match=r"other weights .* --anew"):
                index.update([folder], options(other))
        assert content(index) == before


def test_vectors_of_two_models_never_mix_whoever_writes(place, tmp_path):
    write_noise(tmp_path / "p" / "a.png", 1)

    def write_first():  # another process, before the first batch is written
        with Index.open(place, writable=True) as other:
            model = IndexedModel("other", "x", "0" * 32, 16)
            write(other.store, [item("b")], model, units(1, 16))

    with Index.create(place) as index:
        with pytest.raises(InputError, match="other weights"):
            index.update([tmp_path / "p"], options(Stopping(0, write_first)))
        assert len(index) == 1


@pytest.mark.parametrize("version", [6, 99])
def test_an_index_of_another_format_names_what_to_do(place, made, capsys, version):
    with closing(sqlite3.connect(Path(place) / INDEX_FILE)) as file:
        file.execute(f"PRAGMA user_version = {version}")
    for words in (f"search {place} red", f"index --out {place}"):
        run_cloob(words, code=2)
        command = f"cloob index SRC --model MODEL --out {place} --anew"
        assert command in capsys.readouterr().err
    (Path(place) / "other").mkdir()
    run_cloob(f"{made} --anew")
    assert "8 added; 8 embedded" in capsys.readouterr().out
    assert (Path(place) / "other").is_dir()


@pytest.mark.usefixtures("made")
def test_other_weights_in_the_place_of_the_model_are_refused(
    place, capsys, monkeypatch
):
    run_cloob(f"search {place} red --cutoff none")
    loads(monkeypatch, lambda *_, **__: ColourModel("other"))
    for words in (f"search {place} red", f"classify {place} --labels a,b"):
        run_cloob(words, code=2)
        assert "m: has other weights" in capsys.readouterr().err
