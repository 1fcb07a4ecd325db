"""Public files from a server on loopback; what a server may do wrong is in ``tests/data/test_data_remote.py``."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloob import load_model
from cloob.errors import InputError
from cloob.models import hub
from cloob.models.source import PUBLIC, PublicFile, PublicModel
from make import Web, web
from support import originals

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Web]:
    with web() as running:
        running.pages["/x"] = CONTENT
        yield running


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("path", "sha256", "said"), [("x", "0" * 64, "published is 0000"), ("missing", None, "no such file")]
)
def test_lies_are_refused_in_one_line(server: Web, tmp_path: Path, path: str, sha256: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        hub.fetch_public(PublicFile(f"{server.url}/{path}", "x.bin", sha256), tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("x.bin*"))


def test_two_processes_fetch_once(server: Web, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cloob.models.hub import PublicFile, fetch_public\n"
        "print(fetch_public(PublicFile(sys.argv[1], 'x.bin', sys.argv[2]), Path(sys.argv[3])).stat().st_size)"
    )
    words = [sys.executable, "-c", code, f"{server.url}/x", SHA256, str(tmp_path)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [str(len(CONTENT))] * 2
    assert server.asked == ["/x"]


def test_a_model_by_name(server: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = originals("crowsonkb/full_vocab/slim.pkl")
    server.pages["/slim.pkl"] = source.read_bytes()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    config = json.loads((source.parent / "config.json").read_text())
    model = PublicModel((PublicFile(f"{server.url}/slim.pkl", "slim.pkl", digest),), config=config)
    monkeypatch.setitem(PUBLIC, "crowsonkb/tiny", model)
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path))
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model("crowsonkb/tiny").encode_image(images), load_model(source).encode_image(images))
