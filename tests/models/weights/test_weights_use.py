"""What a loaded model can be used for: converted, trained on, evaluated."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cloob import cli, load_model
from support import originals

SOURCES = [
    "mljku/rn/published_like.pt",
    "crowsonkb/full_vocab/slim.pkl:port",
    "rinna/roberta",
    "openai/vit/vit-jit.pt",
    "hf_clip/vit_gelu",
    "open_clip/vit_quickgelu",
]


@pytest.mark.parametrize("source", SOURCES)
def test_convert_keeps_every_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    target = tmp_path / "converted"
    assert cli.main(["convert", str(originals(source)), str(target)]) == 0, capsys.readouterr().err
    first, second = load_model(originals(source)), load_model(target)
    folder = originals(source)
    inputs = np.load((folder if folder.is_dir() else folder.parent) / "inputs.npz", allow_pickle=False)
    images, tokens = torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["extra_tokens"])
    with torch.no_grad():
        assert torch.equal(first.encode_image(images), second.encode_image(images))
        assert torch.equal(first.encode_text(tokens), second.encode_text(tokens))
    assert second.objective_config == first.objective_config
    texts = inputs["extra_texts"].tolist()
    if source.startswith(("mljku/rn_full", "crowsonkb/full", "hf_clip", "open_clip")):
        assert torch.equal(first.tokenizer(texts), second.tokenizer(texts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"]


def test_a_converted_rinna_has_its_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    shutil.copytree(originals("rinna/roberta"), tmp_path / "r")
    shutil.copy(originals("rinna/tokenizer/spiece.model"), tmp_path / "r")
    assert cli.main(["convert", str(tmp_path / "r"), str(tmp_path / "m")]) == 0
    inputs = np.load(tmp_path / "r" / "inputs.npz", allow_pickle=False)
    assert load_model(tmp_path / "m").tokenizer(inputs["texts"].tolist()).tolist() == inputs["tokens"].tolist()
