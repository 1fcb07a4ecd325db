"""What an index names as its model is fetched only where it was typed on this machine, or is of a fixed list."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from index_fakes import FakeEncoder, options, write_noise

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.update import UpdateOptions
from make import Web, web
from support import use_hub

TRACKER = "hf-hub:evil/tracker"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A hub that has nothing; nothing was typed or fetched."""
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    with web() as server:
        use_hub(monkeypatch, server.url, tmp_path / "hub")
        yield server


def theirs(folder: Path, spec: str) -> Path:
    """An index of somebody else, who names this model."""
    write_noise(folder / "pictures" / "a.png", 1)
    with Index.create(folder / "index") as index:
        index.update([folder / "pictures"], options(FakeEncoder()))
    with sqlite3.connect(folder / "index" / "index.sqlite") as file:
        file.execute("UPDATE cloob_models SET spec = ?", [spec])
    file.close()
    return folder / "index"


def test_a_model_of_the_hub_is_not_fetched_for_the_index_alone(tmp_path: Path, hub: Web) -> None:
    said, replace = f"so it is not fetched; .* type it once: --model {TRACKER}$", UpdateOptions(replace_model=True)
    with Index.open(theirs(tmp_path, TRACKER), writable=True) as index, pytest.raises(InputError, match=said):
        index.update([], replace)
    assert not hub.asked
    for typed in (TRACKER, None):  # which is remembered
        index = Index.open(tmp_path / "index", model=typed, writable=True)
        with index, pytest.raises(InputError, match="tracker"):
            index.update([], replace)
        assert hub.asked
        hub.asked.clear()


def test_a_folder_that_names_an_encoder_of_the_hub_takes_it_from_the_cache_alone(tmp_path: Path, hub: Web) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    head = {"features": 2, "embed_dim": 2, "kind": "linear", "dropout": 0.0}
    said = {"format": 1, "image_size": 32, "image_encoder": TRACKER, "text_encoder": TRACKER}
    marks = {"image_fingerprint": "a", "text_fingerprint": "a", "heads": {"image": head, "text": head}}
    marks["probe"] = {"image": [1.0], "text": [1.0]}
    (folder / "aligned.json").write_text(json.dumps(said | marks))
    with Index.open(theirs(tmp_path, str(folder))) as index, pytest.raises(InputError, match="so it is not fetched"):
        index.encoder()
    assert not hub.asked
    with Index.open(tmp_path / "index", model=str(folder)) as index, pytest.raises(InputError, match="tracker"):
        index.encoder()
    assert hub.asked
