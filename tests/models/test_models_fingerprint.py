"""Fingerprints of models in files: computed once for the same files, and never for others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from cloob.cache import Cache
from cloob.models.load import fingerprint, load_with_fingerprint
from make import tiny_model


def test_it_is_computed_once_for_the_same_files_and_anew_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tiny_model(tmp_path / "model"), Cache(tmp_path / "cache")
    # Three seconds later: a younger file may change again without another time.
    monkeypatch.setattr(time, "time_ns", lambda: int((time.time() + 3) * 1e9))
    encoder, first = load_with_fingerprint(folder, "cpu", cache)
    assert first == fingerprint(encoder)
    (kept,) = (tmp_path / "cache" / "digests").glob("*.txt")
    kept.write_text("0" * 32)
    assert load_with_fingerprint(folder, "cpu", cache)[1] == "0" * 32  # not computed again
    kept.write_text("damaged")
    assert load_with_fingerprint(folder, "cpu", cache)[1] == first == kept.read_text()
    kept.write_text("0" * 32)
    file = folder / "open_clip_model.safetensors"
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-4] + torch.tensor([0.25]).numpy().tobytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` or `touch -r` leaves it
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    encoder, second = load_with_fingerprint(folder, "cpu", cache)
    assert second == fingerprint(encoder) and second not in (first, "0" * 32)
