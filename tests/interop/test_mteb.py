"""MTEB evaluates our checkpoints: in this environment where it is installed, else in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cloob.evaluation.embed import embed_images, embed_texts
from cloob.evaluation.embeddings import folder_key
from cloob.evaluation.sets.labelled import open_labelled
from cloob.models.load import load_model
from make import tiny_model
from support import overlaid


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_set_through_mteb(tmp_path: Path, shared_data: Path) -> None:
    """Against the embeddings that we make of it."""
    python = sys.executable if importlib.util.find_spec("mteb") else overlaid("mteb>=2.26,<3")
    data, model = shared_data / "zeroshot" / "tuxpaint-photos", tiny_model(tmp_path / "model")
    out = tmp_path / "found.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "MTEB_CACHE": str(tmp_path)}
    worker = Path(__file__).with_name("mteb_worker.py")
    command = [python, str(worker), str(model), str(data), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    labelled = open_labelled(data)
    encoder = load_model(model)
    texts = embed_texts(encoder, [labelled.templates[0].replace("{c}", name) for name in labelled.classnames])
    images = embed_images(encoder, labelled).features
    right = (images @ texts.T).argmax(1) == torch.tensor(labelled.labels)
    assert found["scores"]["Pictograms"]["accuracy"] == pytest.approx(float(right.double().mean()), abs=1e-9)
    assert found["model_name"] == f"cloob/{model}" and found["revision"] == folder_key(model, "cpu")
    assert found["embed_dim"] == encoder.embed_dim and found["known"] == [True, True]
    assert found["norms"] == pytest.approx([1.0], abs=1e-6)
