"""What a list of counts may say, and what a server may do: nothing that it names is run, and nothing hangs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cloob import open_source
from cloob.cli import main
from cloob.data.shards import remote as opener
from cloob.data.shards.remote import fetch
from cloob.errors import InputError
from support import OPENING, served, serving

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="commands of a POSIX shell")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "_PAUSES", (0.0, 0.0))


class Web:
    """Answers by path: what ``pages`` holds, or what the function there writes itself."""

    def __init__(self, stack: ExitStack) -> None:
        self.pages: dict[str, object] = {}
        self.asked: list[dict[str, str]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                web.asked.append(dict(self.headers))
                page = web.pages.get(self.path)
                if callable(page):
                    page(self)
                else:
                    self.answer(404 if page is None else 200, page or b"")

            def answer(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(length or len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = True

        self.url = stack.enter_context(served(serving(Handler)))

    def redirect(self, path: str, to: str) -> None:
        self.pages[path] = lambda request: request.answer(302, b"", Location=to)


@pytest.fixture
def web() -> Iterator[Web]:
    with ExitStack() as stack:
        yield Web(stack)


def test_a_list_of_counts_runs_no_command(shards: Path, tmp_path: Path, web: Web) -> None:
    marker = tmp_path / "executed"
    content = json.dumps({f"pipe:touch {marker}; cat x.tar": 5, "../x.tar": 1, "/etc/x.tar": 1}).encode()
    (shards / "sizes.json").write_bytes(content)
    assert len(open_source(shards)) == 12
    web.pages["/sizes.json"] = content
    with pytest.raises(InputError, match=r"sizes\.json: has no count for 0\.tar"):
        open_source(f"{web.url}/0.tar")
    with pytest.raises(InputError, match="expected a folder, a table"):
        open_source(shards / "sizes.json")
    assert not marker.exists()


def test_redirects(web: Web, tmp_path: Path) -> None:
    target = tmp_path / "got"
    web.pages["/there"] = b"here"
    web.redirect("/moved", "/there")
    fetch(f"{web.url}/moved", target)
    assert target.read_bytes() == b"here"
    for to in ("file:///etc/passwd", "ftp://127.0.0.1/x", "pipe:id"):
        web.redirect("/away", to)
        with pytest.raises(InputError, match="/away"):
            fetch(f"{web.url}/away", target)
    with ExitStack() as stack:
        other = Web(stack)
        other.pages["/there"] = b"here"
        web.redirect("/moved", f"{other.url}/there")
        web.asked.clear()
        fetch(f"{web.url.replace('//', '//me:secret@')}/moved", target)
    assert "Authorization" in web.asked[0] and "Authorization" not in other.asked[0]


def test_a_body_that_ends_early_and_a_server_that_says_nothing(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opener, "_SILENT_SECONDS", 0.2)
    target = tmp_path / "got"
    cut: Callable[..., None] = lambda request: request.answer(200, b"x" * 10, length=1000)  # noqa: E731
    web.pages["/cut"] = cut
    web.pages["/once"] = lambda request: (web.pages.update({"/once": b"whole"}), cut(request))
    web.pages["/silent"] = lambda request: request.rfile.read(1)  # until the client goes
    for page in ("/cut", "/silent"):
        with pytest.raises(InputError, match=rf"{page}: .*\(3 attempts\)"):
            fetch(web.url + page, target)
    fetch(f"{web.url}/once", target)
    assert target.read_bytes() == b"whole"


def test_paths_as_people_write_them(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(shards.parent))
    monkeypatch.chdir(tmp_path)
    assert len(open_source("~/shards/{00000..00002}.tar")) == len(open_source(f"file://{shards}")) == 12
    for words, told in (
        (("train", "--data", "demo", "--out=s3://bucket/run"), "--out: is an address"),
        (("train", "--data", "file://data/train.csv"), "names a host, 'data'"),
        (("eval", "x", "--zeroshot", "https://host/set"), "https://host/set: labelled pictures are read from a folder"),
        (("eval", "x", "--suite", "paper", "https://host/sets"), "https://host/sets: the sets of a suite are read"),
    ):
        code, said = main(words), capsys.readouterr().err.removeprefix(OPENING)
        assert code == 2 and said.count("\n") == 1 and told in said, said
