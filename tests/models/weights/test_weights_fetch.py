"""Public files from a server on loopback that breaks off, lies, serves ranges and redirects."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from cloob import load_model
from cloob.errors import InputError
from cloob.models import hub
from cloob.models.source import PUBLIC, PublicFile, PublicModel
from make import served
from support import originals

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content`` at every path; the path's first word says how it behaves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.asked: list[str | None] = []
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        asked = self.headers.get("Range")
        with self.server.lock:
            self.server.asked.append(asked)
            number = len(self.server.asked)
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", self.path.replace("redirect", "plain"))
            self.end_headers()
            return
        if kind == "missing":
            self.send_error(404)
            return
        content, start = self.server.content, 0
        if asked:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start + 1000 * (kind == "claimsmore")))
        self.end_headers()
        breaks = kind == "breaks" and number < 4
        self.wfile.write(content[start : start + 300_000] if breaks else content[start:])


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    with served(running):
        yield running


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize(("kind", "known"), [("redirect", True), ("breaks", True), ("breaks", False)])
def test_a_file_arrives_whole(server: Server, tmp_path: Path, kind: str, known: bool) -> None:
    file = PublicFile(server.url(f"{kind}/x"), "x.bin", SHA256 if known else None)
    for _ in range(3 if kind == "breaks" else 0):
        with pytest.raises(InputError, match=r"broke off after .* goes on from there"):
            hub.fetch_public(file, tmp_path)
        assert names(tmp_path) == ["x.bin.part"]
    path = hub.fetch_public(file, tmp_path)
    assert path.read_bytes() == CONTENT and names(tmp_path) == ["x.bin"]
    if kind == "breaks":  # without a hash nothing could tell another version of the file
        later = ["bytes=300000-", "bytes=600000-", "bytes=900000-"]
        assert server.asked == [None, *(later if known else [None] * 3)]
    before = len(server.asked)
    assert hub.fetch_public(file, tmp_path) == path and len(server.asked) == before


@pytest.mark.parametrize(
    ("kind", "sha256", "said"),
    [("claimsmore", None, "broke off"), ("plain", "0" * 64, "published is 0000"), ("missing", None, "404")],
)
def test_lies_are_refused_in_one_line(server: Server, tmp_path: Path, kind: str, sha256: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        hub.fetch_public(PublicFile(server.url(f"{kind}/x"), "x.bin", sha256), tmp_path)
    assert "\n" not in str(caught.value) and "x.bin" not in names(tmp_path)


def test_no_redirect_leaves_encryption() -> None:
    request = urllib.request.Request("https://a.example/x")
    with pytest.raises(InputError, match="not encrypted"):
        hub._SafeRedirects().redirect_request(request, None, 302, "", {}, "http://a.example/x")


def test_two_processes_fetch_once(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cloob.models.hub import PublicFile, fetch_public\n"
        "print(fetch_public(PublicFile(sys.argv[1], 'x.bin', sys.argv[2]), Path(sys.argv[3])).stat().st_size)"
    )
    words = [sys.executable, "-c", code, server.url("plain/x"), SHA256, str(tmp_path)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [str(len(CONTENT))] * 2
    assert len(server.asked) == 1


def test_a_model_by_name(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = originals("crowsonkb/full_vocab/slim.pkl")
    server.content = source.read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    config = json.loads((source.parent / "config.json").read_text())
    model = PublicModel((PublicFile(server.url("plain/slim.pkl"), "slim.pkl", digest),), config=config)
    monkeypatch.setitem(PUBLIC, "crowsonkb/tiny", model)
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path))
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model("crowsonkb/tiny").encode_image(images), load_model(source).encode_image(images))
