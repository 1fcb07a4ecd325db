"""CLIP_benchmark, in an environment of its own: it agrees with our evaluation to the last image."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cloob.evaluation.sets.labelled import open_labelled
from cloob.evaluation.suite import evaluate
from make import tiny_model
from support import overlaid


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_parity_to_the_last_image(tmp_path: Path, shared_data: Path) -> None:
    from benchmarks.overlay import CLIP_BENCHMARK

    python = overlaid(*CLIP_BENCHMARK)
    model, data = tiny_model(tmp_path / "model"), shared_data / "zeroshot" / "road-signs"
    worker = Path(__file__).with_name("clip_benchmark_worker.py")
    done = subprocess.run([python, str(worker), str(model), str(data)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = evaluate({"a": model}, [open_labelled(data)])["rows"][0]["zeroshot"]["road-signs"]
    for name in ("acc1", "acc5"):
        assert round(abs(ours[name] - theirs[name]) * ours["n"], 6) == 0, name
    assert ours["mean_per_class_recall"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
