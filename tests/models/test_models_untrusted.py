"""Folders from strangers: none of their Python runs, no path leaves them, what is no config is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloob.errors import InputError
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.load import load_model
from cloob.models.runs import CONFIG_FILE

AUTO_MAP = {"AutoTokenizer": ["evil.Words", None], "AutoConfig": "evil.Config", "AutoModel": "evil.Model"}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "evil was here"


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def plant(folder: Path, marker: Path, name: str) -> Path:
    """Puts Python that leaves a marker into a folder, and an ``auto_map`` that asks for it into one of its files."""
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import BertConfig as Config, BertModel as Model, BertTokenizerFast as Words\n"
    )
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | {"auto_map": AUTO_MAP}))
    return folder


@pytest.fixture
def hostile(tower: Path, bert: Path, tmp_path: Path, marker: Path) -> Path:
    """A model folder of open_clip whose tokeniser is Python of its own."""
    folder = shutil.copytree(tower, tmp_path / "hostile")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder / name)
    text = {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"trust_remote_code": True}}
    change(folder / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].update(text))
    return plant(folder, marker, "tokenizer_config.json")


def refused(load: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "trust_remote_code=True" not in str(caught.value)


def cached(folder: Path, hub: Path, owner: str, name: str) -> None:
    """Puts a folder into a hub cache, as what was fetched before."""
    place = hub / f"models--{owner}--{name}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(folder))
    return folder


def test_a_model_of_the_hub_runs_none_of_its_python(
    hostile: Path,
    tower: Path,
    bert: Path,
    tmp_path: Path,
    marker: Path,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("builtins.input")  # nobody is asked whether to run it
    cached(tower, hub_cache, "some", "good")
    assert load_model("hf-hub:some/good").embed_dim == 256
    cached(hostile, hub_cache, "some", "hostile")
    refused(lambda: load_model("hf-hub:some/hostile"), "Python code of the model's own")
    cached(plant(shutil.copytree(bert, tmp_path / "bert"), marker, "config.json"), hub_cache, "some", "bert")
    refused(lambda: open_text_encoder("hf:some/bert", load_model), "some--bert", "auto_map")
    refused(lambda: open_image_encoder("timm:hf-hub:some/bert", load_model), "auto_map")
    good = hub_cache / "models--some--good"  # whose main is, and whose older revision is not
    shutil.copytree(tmp_path / "bert", good / "snapshots" / ("1" * 40))
    (good / "refs" / "old").write_text("1" * 40)
    refused(lambda: open_image_encoder("timm:hf-hub:some/good@old", load_model), "auto_map")
    for key in ("hf_tokenizer_name", "hf_model_name"):  # a good model that names a bad one
        other = shutil.copytree(tower, tmp_path / key)
        change(other / CONFIG_FILE, lambda c, key=key: c["model_cfg"]["text_cfg"].update({key: "some/bert"}))
        cached(other, hub_cache, "by", key)
        refused(lambda key=key: load_model(f"hf-hub:by/{key}"), "auto_map")
    refused(lambda: load_model(tmp_path / "hf_model_name"), "auto_map")
    assert not marker.exists()
