"""What a model is loaded from: names taken apart, the hub and its cache, paths as people write them."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.models.hub import closed_hub
from cloob.models.load import load_model
from cloob.models.runs import CONFIG_FILE
from cloob.models.source import TINY_MODELS, Source, known_models
from cloob.models.towers import open_clip
from support import free_port, run_script, served, serving, use_hub

WITHOUT_COMPILER = """
import sys, torch
from cloob.models.importing import import_open_clip
disable = torch.compiler.disable
library = import_open_clip()
assert torch.compiler.disable is disable and "torch._dynamo.utils" not in sys.modules
from cloob.models.weights.keymap import build
build(library.get_model_config("ViT-B-32"), {}, "")
build(library.get_model_config("RN50"), {}, "")
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
import torchvision
pixels, boxes = torch.rand(1, 1, 8, 8), [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
assert torchvision.ops.roi_align(pixels, boxes, 2).shape == (1, 1, 2, 2)
assert torchvision.ops.roi_align.__globals__["is_compile_supported"]("cpu") is not None
assert torch.equal(torch.compile(lambda x: x + 1, backend="eager")(pixels), pixels + 1)
"""


class Hub(BaseHTTPRequestHandler):
    """Has nothing, and says so."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with nothing; what it is asked for."""
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    with served(serving(Hub)) as address:
        use_hub(monkeypatch, address, tmp_path / "hub")
        yield Hub.asked


@pytest.mark.parametrize(
    ("text", "kind", "name", "variant"),
    [
        ("runs/mine", "folder", "runs/mine", ""),
        ("local-dir:runs/mine:last", "folder", "runs/mine", "last"),
        ("runs/gone:best", "folder", "runs/gone", "best"),
        ("w.pkl:port", "file", "w.pkl", ""),
        ("ViT-B/32/openai", "towers", "ViT-B-32", "openai"),
        ("ViT-B/32/w.pkl", "towers", "ViT-B-32", "w.pkl"),
        ("ViT-B/32", "towers", "ViT-B-32", ""),
        ("crowsonkb/vit-b-16-laion400m-16:port", "public", "crowsonkb/vit-b-16-laion400m-16", ""),
        ("hf-hub:some/model", "hub", "some/model", ""),
        ("timm:hf-hub:some/model@old", "hub", "some/model", "old"),
        ("timm:local-dir:runs/mine", "folder", "runs/mine", ""),
        ("timm:resnet18", "timm", "resnet18", ""),
        ("hf:some/model", "hub", "some/model", ""),
        ("hf:runs/mine", "folder", "runs/mine", ""),
        ("pypi:some-package", "package", "some-package", ""),
        ("nowhere/nothing", "unknown", "nowhere/nothing", ""),
    ],
)
def test_a_source_is_taken_apart(
    text: str, kind: str, name: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "w.pkl").touch()
    source = Source.parse(text)
    assert (source.kind, source.name, source.variant) == (kind, name, variant)
    assert (source.path is not None) == ("runs" in text or "w.pkl" in text)
    assert source.is_public == (text in ("ViT-B/32/openai", "crowsonkb/vit-b-16-laion400m-16:port"))


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


def test_a_closed_hub_is_closed_for_its_own_thread_alone(hub: list[str]) -> None:
    inside, asked = threading.Event(), threading.Event()

    def closed() -> None:
        with closed_hub("it is closed"):
            inside.set()
            assert asked.wait(20)
            with pytest.raises(InputError, match="hf-hub:some/closed: not on this machine, and it is closed"):
                load_model("hf-hub:some/closed")

    thread = threading.Thread(target=closed)
    thread.start()
    assert inside.wait(20)
    for number in range(2):  # while the other is closed, and after
        with pytest.raises(InputError, match="hf-hub:some/open"):
            load_model(f"hf-hub:some/open{number}")
        asked.set()
        thread.join()
    assert {path.partition("some/")[2].partition("/")[0] for path in hub} == {"open0", "open1"}


def test_a_tokenizer_in_the_folder_asks_nobody(tower: Path, bert: Path, tmp_path: Path, hub: list[str]) -> None:
    folder = shutil.copytree(tower, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder / name)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert load_model(folder).encode_text(["a red car"]).shape == (1, 256)
    assert hub == []


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
    with pytest.raises(InputError, match=r"w.pt: neither a file of torch's"):
        load_model("~/w.pt")


@pytest.mark.nightly
def test_the_compiler_stays_away_until_it_is_asked_for() -> None:
    done = run_script(WITHOUT_COMPILER)
    assert done.returncode == 0, done.stderr
