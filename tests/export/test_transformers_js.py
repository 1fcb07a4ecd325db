"""``cloob export --to onnx`` read by transformers.js, where Node finds the package by ``NODE_PATH``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_model

from cloob import cli, load_model
from make import noise_image

pytest.importorskip("onnxscript")
SCRIPT = Path(__file__).with_name("transformers_js.cjs")
TEXTS = ["a photo of a dog", "", "far too long " * 40, "it's “quoted”, fine & WIDE", "ΟΔΥΣΣΕΥ 日本語 <x>"]


def node(*words: str) -> Any:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run(["node", *words], capture_output=True, text=True, env=os.environ, timeout=300)
    if "Cannot find module '@huggingface/transformers'" in done.stderr:
        pytest.skip("node finds no @huggingface/transformers: npm install it and set NODE_PATH")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_rows_and_scores_are_the_models(tmp_path: Path, dtype: str) -> None:
    node("-e", "require('@huggingface/transformers'); console.log(0)")  # skips before the export, which takes a while
    source, folder = write_model(tmp_path / "small"), tmp_path / "exported"
    words = ["export", str(source), str(folder), "--to", "onnx", *(["--int8"] if dtype == "q8" else [])]
    assert cli.main(words) == 0
    picture = tmp_path / "picture.png"
    noise_image(0, 32, 32).save(picture)
    own_texts, own_pictures, scores = node(str(SCRIPT), str(folder), dtype, str(picture), json.dumps(TEXTS))
    model = load_model(folder, device="cpu")
    texts, pictures = model.encode_text(TEXTS), model.encode_image([picture])
    torch.testing.assert_close(torch.tensor(own_texts), texts, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(own_pictures), pictures, rtol=0, atol=1e-4)
    wanted = (model.model.logit_scale.exp() * pictures @ texts.T).softmax(-1)[0].tolist()
    found = {row["label"]: row["score"] for row in scores}
    assert [found[text] for text in TEXTS] == pytest.approx(wanted, abs=1e-4)
