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
from support import fill_hub_cache

AUTO_MAP = {"AutoTokenizer": ["evil.Words", None], "AutoConfig": "evil.Config", "AutoModel": "evil.Model"}


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


def refused(load: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "trust_remote_code=True" not in str(caught.value)


def test_a_model_of_the_hub_runs_none_of_its_python(
    tower: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("builtins.input")  # nobody is asked whether to run it
    hub, marker = tmp_path / "hub", tmp_path / "evil was here"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(hub))
    good = fill_hub_cache(hub, "some/good", tower)
    assert load_model("hf-hub:some/good").embed_dim == 256
    hostile = shutil.copytree(tower, tmp_path / "hostile")  # whose tokeniser is Python of its own
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, hostile / name)
    text = {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"trust_remote_code": True}}
    change(hostile / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].update(text))
    fill_hub_cache(hub, "some/hostile", plant(hostile, marker, "tokenizer_config.json"))
    refused(lambda: load_model("hf-hub:some/hostile"), "Python code of the model's own")
    fill_hub_cache(hub, "some/bert", plant(shutil.copytree(bert, tmp_path / "bert"), marker, "config.json"))
    refused(lambda: open_text_encoder("hf:some/bert", load_model), "some--bert", "auto_map")
    refused(lambda: open_image_encoder("timm:hf-hub:some/bert", load_model), "auto_map")
    # Of the good one the main is, and an older revision is not.
    shutil.copytree(tmp_path / "bert", good / "snapshots" / ("1" * 40))
    (good / "refs" / "old").write_text("1" * 40)
    refused(lambda: open_image_encoder("timm:hf-hub:some/good@old", load_model), "auto_map")
    for key in ("hf_tokenizer_name", "hf_model_name"):  # a good model that names a bad one
        other = shutil.copytree(tower, tmp_path / key)
        change(other / CONFIG_FILE, lambda c, key=key: c["model_cfg"]["text_cfg"].update({key: "some/bert"}))
        fill_hub_cache(hub, f"by/{key}", other)
        refused(lambda key=key: load_model(f"hf-hub:by/{key}"), "auto_map")
    refused(lambda: load_model(tmp_path / "hf_model_name"), "auto_map")
    assert not marker.exists()
