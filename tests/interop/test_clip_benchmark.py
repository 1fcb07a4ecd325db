"""CLIP_benchmark, in an environment of its own: it agrees with our evaluation to the last image."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cloob.evaluation.sets.labelled import open_labelled
from cloob.evaluation.suite import evaluate
from cloob.models.folder import save_model
from cloob.models.towers import create_model
from cloob.objective import make_objective
from support import overlaid


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", create_model("tiny-vit", seed=0), make_objective("cloob").config())
    return tmp_path / "model"


@pytest.fixture(scope="module")
def python() -> str:
    """An environment with CLIP_benchmark in it, from PyPI."""
    from benchmarks.overlay import CLIP_BENCHMARK

    return overlaid(*CLIP_BENCHMARK)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_parity_to_the_last_image(python: str, model: Path, shared_data: Path) -> None:
    data = shared_data / "zeroshot" / "road-signs"
    worker = Path(__file__).with_name("clip_benchmark_worker.py")
    done = subprocess.run([python, str(worker), str(model), str(data)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = evaluate({"a": model}, [open_labelled(data)])["rows"][0]["zeroshot"]["road-signs"]
    for name in ("acc1", "acc5"):
        assert round(abs(ours[name] - theirs[name]) * ours["n"], 6) == 0, name
    assert ours["mean_per_class_recall"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
