"""An ONNX folder of a small model, made once by the command line."""

import json

import pytest

from cloob import cli
from cloob.models.folder import save_model
from cloob.models.towers import open_clip
from support import made_once


@pytest.fixture(scope="session")
def model(lively, tmp_path_factory):
    config = open_clip().get_model_config("tiny-resnet")
    config["vision_cfg"]["layers"], config["text_cfg"]["layers"] = [1, 1, 1, 1], 1  # a graph that is soon traced
    place = tmp_path_factory.mktemp("configs") / "small-resnet.json"
    place.write_text(json.dumps(config))
    open_clip().add_model_config(place)
    encoder = lively(place.stem)
    encoder.objective_config = {"contrast": "infoloob", "hopfield": True, "inv_tau": 30.0, "beta": 8.0}
    return encoder


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """``model`` as ``cloob export --to onnx`` writes it."""

    def work(folder):
        save_model(folder / "model", model, model.objective_config)
        assert cli.main(["export", str(folder / "model"), str(folder / "onnx"), "--to", "onnx"]) == 0

    return made_once(tmp_path_factory, "onnx-exported", work) / "onnx"
