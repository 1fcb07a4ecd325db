"""Repositories of the hub, from a stand-in: what ``hf upload`` of an export leaves
there loads as the folder does.
"""

import json
import shutil

import pytest
from hub import StandIn
from small_models import OBJECTIVE, same_rows

from cloob import load_model
from cloob.errors import InputError
from make import served
from support import use_hub

NAME = "me/small"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process reads from, with an empty cache."""
    with served(server := StandIn()):
        use_hub(monkeypatch, server.address, tmp_path / "hub-cache")
        yield server


def offer(hub, folder):
    """A repository with the files of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    hub.repositories[NAME] = files
    return files


def test_a_repository_of_transformers_files_alone_is_read_as_its_folder(
    hub, exported, small, tmp_path, monkeypatch
):
    from transformers import CLIPModel

    folder = shutil.copytree(exported, tmp_path / "clip")
    CLIPModel.from_pretrained(exported).save_pretrained(folder)
    (folder / "open_clip_config.json").unlink(missing_ok=True)
    assert "open_clip_config.json" not in offer(hub, folder)
    original = load_model(small, device="cpu")
    here = load_model(f"hf-hub:{NAME}", device="cpu")
    assert here.name == f"hf-hub:{NAME}"
    assert here.objective_config == OBJECTIVE
    same_rows(here, original)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same_rows(load_model(f"hf-hub:{NAME}", device="cpu"), original)


def test_a_repository_that_asks_for_code_is_refused_before_any_weight_is_fetched(
    hub, exported
):
    files = offer(hub, exported)
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModel": "evil.M"}}
    files["config.json"] = json.dumps(config).encode()
    with pytest.raises(InputError, match="auto_map asks for Python code"):
        load_model(f"hf-hub:{NAME}")
    assert not any("model.safetensors" in request for request in hub.requests)
