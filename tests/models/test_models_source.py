"""What a model is loaded from: names taken apart, the hub and its cache, paths as people write them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.models.load import load_model
from cloob.models.runs import CONFIG_FILE
from cloob.models.source import TINY_MODELS, Source, known_models
from cloob.models.towers import open_clip
from make import web
from support import free_port, use_hub


def test_what_is_of_a_fixed_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pkl").touch()
    names = ["ViT-B/32/openai", "crowsonkb/vit-b-16-laion400m-16:port", "ViT-B/32", "ViT-B/32/w.pkl", "hf-hub:a/b"]
    assert [Source.parse(name).is_public for name in names] == [True, True, False, False, False]


def test_what_is_not_there_and_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    use_hub(monkeypatch, address, tmp_path)
    for offline, reason in ((False, f"{address} does not answer"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        for source in ("ViT-B-32/laion2b_s34b_b79k", "hf-hub:nobody/nothing"):
            with pytest.raises(InputError) as caught:
                load_model(source)
            assert str(caught.value).startswith(f"{source}: not on this machine, and {reason}; a model folder on this")
            assert "\n" not in str(caught.value)


def test_a_tokenizer_in_the_folder_asks_nobody(
    tower: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tower, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder / name)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with web() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "hub")
        assert load_model(folder).encode_text(["a red car"]).shape == (1, 256)
    assert hub.asked == []


def test_names_from_files_are_those_that_open_clip_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    library = open_clip()
    shipped = [path.stem for path in (Path(library.__file__).parent / "model_configs").glob("*.json")]
    listed = [name for name in library.list_models() if name in shipped]
    monkeypatch.delitem(sys.modules, "open_clip")
    assert known_models() == [*TINY_MODELS, *listed]


def test_home_is_a_tilde(tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").symlink_to(tower)
    (tmp_path / "w.pt").write_bytes(b"none")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~/mine", "local-dir:~/mine"):
        assert load_model(source).name == "tiny-vit"
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_model("~/w.pt")
