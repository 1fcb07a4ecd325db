"""An ONNX folder of a small model, made once by the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cloob import cli
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from support import made_once


@pytest.fixture(scope="session")
def model(lively: Callable[..., DualEncoder]) -> DualEncoder:
    encoder = lively("tiny-resnet")
    encoder.objective_config = {"contrast": "infoloob", "hopfield": True, "inv_tau": 30.0, "beta": 8.0}
    return encoder


@pytest.fixture(scope="session")
def exported(model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` as ``cloob export --to onnx`` writes it."""

    def work(folder: Path) -> None:
        save_model(folder / "model", model, model.objective_config)
        assert cli.main(["export", str(folder / "model"), str(folder / "onnx"), "--to", "onnx"]) == 0

    return made_once(tmp_path_factory, "onnx-exported", work) / "onnx"
