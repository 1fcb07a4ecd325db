"""An ONNX folder of a small model, made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cloob.models.encoder import DualEncoder
from cloob.models.onnx.tokens import store_tokenizer
from cloob.models.towers import create_model
from support import made_once


@pytest.fixture(scope="session")
def model(lively: Callable[..., DualEncoder]) -> DualEncoder:
    encoder = lively("tiny-resnet")
    encoder.objective_config = {"contrast": "infoloob", "hopfield": True, "inv_tau": 30.0, "beta": 8.0}
    return encoder


@pytest.fixture(scope="session")
def exported(model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` as ``cloob export --to onnx`` writes it."""
    from cloob.export.programs.onnx import export_onnx

    def work(folder: Path) -> None:
        export_onnx(model, folder)
        (folder / "objective.json").write_text(json.dumps(model.objective_config))

    return made_once(tmp_path_factory, "onnx-exported", work)


@pytest.fixture(scope="session")
def clip_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tokenizer.json`` of open_clip's tokenizer for 24 tokens."""
    folder = tmp_path_factory.mktemp("words")
    store_tokenizer(create_model("tiny-vit", seed=0).tokenizer, folder, 24)
    return folder / "tokenizer.json"
