"""``--profile``: a run with and without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from train_helpers import exact, lines

from cloob.training.config import TrainConfig
from cloob.training.loop import train


@pytest.mark.parametrize("leaves", [{"micro_batch_size": 4, "ema": 0.9}, {"epochs": 1}], ids=["micro-batches", "short"])
def test_a_profiled_run_is_the_run(leaves: dict[str, object], base: TrainConfig, tmp_path: Path) -> None:
    settings = base.override(save_every=0, **leaves)
    train(settings.override(out=tmp_path / "plain"))
    train(settings.override(out=tmp_path / "profiled", profile=True))
    assert exact(tmp_path / "plain") == exact(tmp_path / "profiled")
    assert not (tmp_path / "plain" / "profile").exists()
    table = (tmp_path / "profiled" / "profile" / "table.txt").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "profiled" / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    steps = [name for name in names if name.startswith("ProfilerStep#")]
    assert steps == [f"ProfilerStep#{i}" for i in ((1, 2, 3) if "epochs" in leaves else (6, 7, 8))]
    parts = ["waiting for data", "copy to the device", "forward"]
    for part in parts if "ema" in leaves else [*parts, "objective", "backward"]:
        assert f"cloob: {part}" in table and f"cloob: {part}" in names, part
    assert len(lines(tmp_path / "profiled" / "metrics.jsonl")) == (5 if "epochs" in leaves else 15)
