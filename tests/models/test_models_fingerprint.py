"""Fingerprints of models in files: computed once for the same files, and never for others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cloob.cache import Cache
from cloob.models import fingerprint as fingerprints
from cloob.models.fingerprint import fingerprint, load_with_fingerprint
from cloob.models.folder import save_model
from cloob.models.towers import create_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder whose files count as old at once."""
    monkeypatch.setattr(fingerprints, "_YOUNG_SECONDS", 0.0)
    save_model(tmp_path / "model", create_model("tiny-vit", seed=0), {})
    return tmp_path / "model"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fingerprints that were computed and not found."""
    made: list[str] = []
    monkeypatch.setattr(fingerprints, "fingerprint", lambda encoder: made.append(fingerprint(encoder)) or made[-1])
    return made


def test_it_is_computed_once_for_the_same_files(folder: Path, computed: list[str], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    encoder, first = load_with_fingerprint(folder, "cpu", cache)
    assert first == fingerprint(encoder) and computed == [first]
    assert load_with_fingerprint(folder, "cpu", cache)[1] == first and len(computed) == 1
    (kept,) = (tmp_path / "cache" / "digests").glob("*.txt")
    kept.write_text("damaged")
    assert load_with_fingerprint(folder, "cpu", cache)[1] == first and len(computed) == 2
    assert load_with_fingerprint(folder, "cpu", cache)[1] == first and len(computed) == 2


def test_other_weights_of_the_same_size_and_time_are_seen(folder: Path, computed: list[str], tmp_path: Path) -> None:
    cache, file = Cache(tmp_path / "cache"), folder / "open_clip_model.safetensors"
    first = load_with_fingerprint(folder, "cpu", cache)[1]
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-4:] = (torch.tensor([0.25]).numpy()).tobytes()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` or `touch -r` leaves it
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    encoder, second = load_with_fingerprint(folder, "cpu", cache)
    assert second != first and second == fingerprint(encoder) and len(computed) == 2
