"""Names without what they name: towers that do not exist, models that cannot be fetched, paths as people write them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cloob.errors import InputError
from cloob.models import names
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.names import check_path, known_models
from cloob.models.towers import create_model, open_clip
from support import served, serving


class Hub(BaseHTTPRequestHandler):
    """Has nothing, and says so."""

    asked: list[str] = []  # noqa: RUF012 - one for the test that uses it

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[str]:
    with served(serving(Hub)) as address:
        yield address


@pytest.fixture
def silent() -> Iterator[tuple[str, socket.socket]]:
    """Somebody who takes a call and never says a word, as a network that drops what is sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", server


@pytest.fixture
def closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def cloob(*words: str, **environment: str) -> tuple[int, list[str], set[str]]:
    """Exit code, lines on the screen, and which of the slow libraries were imported."""
    script = (
        "import sys; from cloob import cli; code = cli.main(sys.argv[1:]);"
        "print('imported', *({'torch', 'open_clip', 'timm'} & sys.modules.keys())); sys.exit(code)"
    )
    environment = {**{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}, **environment}
    done = subprocess.run([sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines(), set(done.stdout.splitlines()[-1].split()[1:])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\na.png\ta\n")
    return tmp_path / "pairs.csv"


@pytest.mark.parametrize(
    "words",
    [
        ["finetune"],
        ["--init", "hf-hub:some/model"],
    ],
    ids=["finetune", "hub"],
)
def test_without_a_network_what_would_be_fetched_is_refused_at_once(
    words: list[str], table: Path, tmp_path: Path, silent: tuple[str, socket.socket]
) -> None:
    url, server = silent
    words = ["train", *words, "--data", str(table), "--out", str(tmp_path / "o")]
    home = {"HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "HF_ENDPOINT": url}
    for network, said in (({}, f"{url} does not answer"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        code, lines, imported = cloob(*words, **home, **network)
        assert code == 2 and len(lines) == 1 and not imported
        assert f"not on this machine, and {said}; a model folder on this disk" in lines[0]
    server.settimeout(0)
    server.accept()[0].close()
    with pytest.raises(BlockingIOError):  # asked once, and not again and again
        server.accept()


def test_a_model_that_is_partly_there_is_one_line(closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in ("ViT-B-32/laion2b_s34b_b79k", "hf-hub:nobody/nothing"):
        with pytest.raises(InputError) as caught:
            load_model(source)
        assert str(caught.value).startswith(f"{source}: not on this machine, and {closed} does not answer; ")
        assert "\n" not in str(caught.value)


def test_names_from_files_are_those_that_open_clip_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    library = open_clip()
    shipped = [path.stem for path in (Path(library.__file__).parent / "model_configs").glob("*.json")]
    listed = [name for name in library.list_models() if name in shipped]
    monkeypatch.delitem(sys.modules, "open_clip")
    from_files = known_models()
    assert from_files[:3] == list(names.TINY_MODELS)
    assert from_files[3:] == listed


def test_paths_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "runs" / "mine", create_model("tiny-vit", seed=0), {"inv_tau": 30.0})
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~/runs/mine", "local-dir:~/runs/mine"):
        assert load_model(source).name == "tiny-vit"
    (tmp_path / "w.pt").write_bytes(b"none")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "x"}')
    for source, said in (("~/w.pt", "w.pt: neither a file of torch's"), ("~/hf", "config.json: model_type is 'x'")):
        with pytest.raises(InputError, match=said):
            load_model(source)
    monkeypatch.chdir(tmp_path)
    for source in ("runs\\mine", "local-dir:runs\\mine"):
        with pytest.raises(InputError, match=r"runs.mine: no such folder; did you mean runs/mine\?"):
            load_model(source)
    (tmp_path / "odd\\name").mkdir()
    assert check_path("odd\\name") == "odd\\name"
