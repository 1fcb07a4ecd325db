"""Training with SigLIP's loss: its bias in log, checkpoint, open_clip's folder and another run."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
from train_helpers import lines

from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint
from cloob.training.config import TrainConfig
from cloob.training.loop import train


def test_the_bias_goes_into_the_folder_and_another_run(base: TrainConfig, tmp_path: Path) -> None:
    train(base.override(objective="siglip", out=tmp_path / "run", epochs=1))
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["beta"] is None and "saturation" not in line for line in found)  # that is of a softmax
    assert "effective_eigenvalues_text" in found[3]
    last = found[-1]
    config = TrainConfig.from_json(tmp_path / "run" / "config.json")
    assert (config.loss.bias, config.loss.inv_tau, config.loss.scale) == (-10.0, 10.0, "unit")
    trained = load_model(tmp_path / "run").make_objective()
    assert trained.name == "siglip" and trained.bias is not None
    assert trained.bias.item() == pytest.approx(last["bias"], rel=1e-6) and trained.bias.item() != -10.0
    theirs = open_clip.create_model(f"local-dir:{latest_checkpoint(tmp_path / 'run') / 'model'}")
    assert theirs.logit_bias.item() == pytest.approx(last["bias"], rel=1e-6)
    assert theirs.logit_scale.exp().item() == pytest.approx(last["inv_tau"], rel=1e-6)

    clip = base.override(objective="clip", model=None, init=str(tmp_path / "run"), steps=1, out=tmp_path / "clip")
    left = open_clip.create_model(f"local-dir:{train(clip).checkpoint}/model")
    assert left.logit_bias is None  # in a softmax it cancels
