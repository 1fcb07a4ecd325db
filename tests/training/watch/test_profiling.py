"""``--profile``: a run with and without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from train_helpers import Trained, exact

from cloob.training.loop import train


@pytest.mark.parametrize("epochs", [pytest.param(3, marks=pytest.mark.nightly), 1])
def test_a_profiled_run_is_the_run(epochs: int, trained: Trained, tmp_path: Path) -> None:
    whole = trained.config.override(epochs=epochs, schedule="constant", save_every=0)
    train(whole.override(out=tmp_path / "plain"))
    train(whole.override(out=tmp_path / "profiled", profile=True))
    assert exact(tmp_path / "plain") == exact(tmp_path / "profiled")
    assert not (tmp_path / "plain" / "profile").exists()
    table = (tmp_path / "profiled" / "profile" / "table.txt").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "profiled" / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    steps = [name for name in names if name.startswith("ProfilerStep#")]
    assert steps == [f"ProfilerStep#{i}" for i in ((1, 2, 3) if epochs == 1 else (6, 7, 8))]
    for part in ("waiting for data", "copy to the device", "forward", "objective", "backward"):
        assert f"cloob: {part}" in table and f"cloob: {part}" in names, part
