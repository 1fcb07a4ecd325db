"""Public files from a server on loopback that breaks off, lies, serves ranges and redirects."""

from __future__ import annotations

import email
import hashlib
import io
import json
import subprocess
import sys
import urllib.request
import urllib.response
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    """``/plain`` serves ranges, ``/breaks`` breaks off three times, ``/claims`` says that there is more."""
    with web() as made:

        def serve(request: Any) -> None:
            start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            breaks = request.path == "/breaks" and len(made.asked) < 4
            some = CONTENT[start:][: 300_000 if breaks else None]
            length = len(CONTENT) - start + 1000 * (request.path == "/claims")
            request.answer(206 if start else 200, some, length)

        made.pages = dict.fromkeys(("/plain", "/breaks", "/claims"), serve)
        made.redirect("/redirect", "/plain")
        yield made


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize(("kind", "known"), [("redirect", True), ("breaks", True), ("breaks", False)])
def test_a_file_arrives_whole(
    server: Web, tmp_path: Path, kind: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = PublicFile(f"{server.url}/{kind}", "x.bin", SHA256 if known else None)
    for _ in range(3 if kind == "breaks" else 0):
        with pytest.raises(InputError, match=r"broke off after .* goes on from there"):
            hub.fetch_public(file, tmp_path)
        assert names(tmp_path) == ["x.bin.part"]
    path = hub.fetch_public(file, tmp_path)
    assert path.read_bytes() == CONTENT and names(tmp_path) == ["x.bin"]
    if kind == "breaks":  # without a hash nothing could tell another version of the file
        later = ["bytes=300000-", "bytes=600000-", "bytes=900000-"] if known else [None] * 3
        assert [headers.get("Range") for headers in server.headers] == [None, *later]
    before = len(server.asked)
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert hub.fetch_public(file, tmp_path) == path and len(server.asked) == before
    with pytest.raises(InputError, match=r"not in the cache, and HF_HUB_OFFLINE is set.*put it at .*y\.bin"):
        hub.fetch_public(PublicFile(file.url, "y.bin", None), tmp_path)


@pytest.mark.parametrize(
    ("kind", "sha256", "said"),
    [("claims", None, "broke off"), ("plain", "0" * 64, "published is 0000"), ("missing", None, "404")],
)
def test_lies_are_refused_in_one_line(server: Web, tmp_path: Path, kind: str, sha256: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        hub.fetch_public(PublicFile(f"{server.url}/{kind}", "x.bin", sha256), tmp_path)
    assert "\n" not in str(caught.value) and "x.bin" not in names(tmp_path)


def test_no_redirect_leaves_encryption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = email.message_from_string("Location: http://a.example/x")
    answer = urllib.response.addinfourl(io.BytesIO(), moved, "https://a.example/x", 302)
    answer.msg = "Found"  # type: ignore[attr-defined]
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", lambda *_: answer)
    with pytest.raises(InputError, match="not encrypted"):
        hub.fetch_public(PublicFile("https://a.example/x", "x.bin", None), tmp_path)


def test_two_processes_fetch_once(server: Web, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cloob.models.hub import PublicFile, fetch_public\n"
        "print(fetch_public(PublicFile(sys.argv[1], 'x.bin', sys.argv[2]), Path(sys.argv[3])).stat().st_size)"
    )
    words = [sys.executable, "-c", code, f"{server.url}/plain", SHA256, str(tmp_path)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [str(len(CONTENT))] * 2
    assert len(server.asked) == 1


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
