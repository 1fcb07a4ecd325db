"""Repositories of the hub: what ``hf upload`` of an export leaves there loads as the
folder does.
"""

import json
import shutil

import pytest
from small_models import OBJECTIVE, same_rows

from cloob import load_model
from cloob.errors import InputError
from support import fill_hub_cache, raises, read_json, use_hub

NAME = "me/small"


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Puts a folder where it lies once the hub has given it; the hub is away."""
    use_hub(monkeypatch, "http://hub.invalid", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return lambda folder: fill_hub_cache(tmp_path / "cache", NAME, folder)


def test_a_repository_of_transformers_files_alone_is_read_as_its_folder(
    upload, exported, small, tmp_path
):
    from transformers import CLIPModel

    folder = shutil.copytree(exported, tmp_path / "clip")
    CLIPModel.from_pretrained(exported).save_pretrained(folder)
    (folder / "open_clip_config.json").unlink(missing_ok=True)
    upload(folder)
    here = load_model(f"hf-hub:{NAME}", device="cpu")
    assert here.name == f"hf-hub:{NAME}"
    assert here.objective_config == OBJECTIVE
    same_rows(here, load_model(small, device="cpu"))


def test_a_repository_that_asks_for_code_is_refused_before_its_weights_are_needed(
    upload, exported, tmp_path
):
    config = read_json(exported / "config.json")
    config["auto_map"] = {"AutoModel": "evil.M"}
    folder = tmp_path / "asks"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    upload(folder)
    message = "auto_map asks for Python code"
    raises(InputError, message, load_model, f"hf-hub:{NAME}")
