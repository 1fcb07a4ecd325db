"""What a list of shards may say, and what a server may do: nothing that it names is run, and nothing hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cloob import cache as cache_files
from cloob.cache import Cache
from cloob.cli import main
from cloob.data.open import open_source
from cloob.data.shards import fetch as opener
from cloob.data.shards.fetch import fetch
from cloob.errors import InputError
from support import OPENING

SIZES = {"00000.tar": 5, "00001.tar": 4, "00002.tar": 3}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="commands of a POSIX shell")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "_PAUSES", (0.0, 0.0))


class Web:
    """Answers by path: what ``pages`` holds, or what the function there writes itself."""

    def __init__(self) -> None:
        self.pages: dict[str, object] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                web.asked.append((self.path, dict(self.headers)))
                page = web.pages.get(self.path)
                if callable(page):
                    page(self)
                    return
                self.send_response(404 if page is None else 200)
                content = page if isinstance(page, bytes) else b""
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class Patient(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self.server = Patient(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    web.server.shutdown()
    thread.join()
    web.server.server_close()


def cloob(*words: str, cwd: Path) -> tuple[int, str]:
    """The exit code of the command, and what it said on stderr."""
    done = subprocess.run([sys.executable, "-m", "cloob.cli", *words], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("place", ["local", "fetched"])
def test_a_list_runs_no_command(
    place: str,
    shards: Path,
    tmp_path: Path,
    web: Web,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "executed"
    content = json.dumps({f"pipe:touch {marker}; cat x.tar": 5}).encode()
    (shards / "sizes.json").write_bytes(content)
    web.pages["/sizes.json"] = content
    spec = str(shards / "sizes.json") if place == "local" else f"{web.url}/sizes.json"
    # As a user runs it; the other commands in this process.
    tries = [cloob("train", "--data", spec, cwd=tmp_path)] if place == "local" else []
    for words in (
        ("train", "demo", "--data", "demo", spec, "--out", "new"),
        ("train", "demo", "--val-data", spec, "--out", "new"),
        ("eval", "x", "--retrieval", spec),
        ("analyze", "x", "--pairs", spec),
    ):
        tries.append((main(words), capsys.readouterr().err))  # noqa: PERF401
    for code, said in tries:
        *progress, line = said.splitlines()  # a list from elsewhere is fetched when the data are opened
        assert code == 2 and set(progress) <= {"cloob: opening data …"}, said
        assert f"{spec}: names 'pipe:touch" in line and "beside" in line
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar", "/etc/x.tar", "a/b.tar", "..", "-rf", "~/x.tar", "x.tar;id", "$(id).tar", "x\n.tar", " pipe:id",
        "PIPE:id",
        "file:///etc/passwd", "http://127.0.0.1:1/x.tar", "http://127.0.0.1@evil/x.tar", "s3://b/x.tar", "HTTP://h/x",
        "simplecache::http://h/x.tar", "", "x.tar\0", "{a,b}.tar", "*.tar",
    ],
)  # fmt: skip
def test_what_a_list_may_not_name(name: str, shards: Path, cache: Cache, web: Web) -> None:
    content = json.dumps({"00000.tar": 5, name: 2})
    (shards / "sizes.json").write_text(content)
    web.pages["/sizes.json"] = content.encode()
    for spec in (str(shards / "sizes.json"), f"{web.url}/sizes.json", f"pipe:cat {shards}/sizes.json"):
        with pytest.raises(InputError, match="may only name files beside itself") as caught:
            open_source(spec, cache=cache)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_coco_annotations_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(200)]
    annotations = [{"image_id": i, "caption": "a caption"} for i in range(200)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for command in (("train", "--data"), ("eval", "x", "--retrieval")):
        assert main((*command, "coco.json")) == 2
        said = capsys.readouterr().err.removeprefix(OPENING)
        assert said.count("\n") == 1 and len(said) < 400
        assert "coco.json: 'images' has" in said and ".jsonl" in said


def redirect(to: str) -> object:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", to)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def test_redirects(web: Web, tmp_path: Path) -> None:
    web.pages["/there"] = b"here"
    web.pages["/moved"] = redirect("/there")
    fetch(f"{web.url}/moved", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"here"
    for to in ("file:///etc/passwd", "ftp://127.0.0.1/x", "pipe:id"):
        web.pages["/away"] = redirect(to)
        with pytest.raises(InputError, match="/away"):
            fetch(f"{web.url}/away", tmp_path / "got")


def test_credentials_stay_with_their_host(web: Web, tmp_path: Path) -> None:
    other = Web()
    thread = threading.Thread(target=other.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        other.pages["/there"] = b"here"
        web.pages["/moved"] = redirect(f"{other.url}/there")
        fetch(f"{web.url.replace('//', '//me:secret@')}/moved", tmp_path / "got")
    finally:
        other.server.shutdown()
        thread.join()
        other.server.server_close()
    assert "Authorization" in web.asked[0][1] and "Authorization" not in other.asked[0][1]


def test_a_body_that_ends_early(web: Web, tmp_path: Path) -> None:
    def cut(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"x" * 10)
        request.close_connection = True

    web.pages["/cut"] = cut
    with pytest.raises(InputError, match=r"\(3 attempts\)"):
        fetch(f"{web.url}/cut", tmp_path / "got")
    web.pages["/once"] = lambda request: (web.pages.update({"/once": b"whole"}), cut(request))
    fetch(f"{web.url}/once", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"whole"


def test_a_server_that_says_nothing_is_given_up(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "_SILENT_SECONDS", 0.2)
    ended = threading.Event()
    web.pages["/silent"] = lambda request: ended.wait(60)
    try:
        with pytest.raises(InputError, match=r"/silent: .*\(3 attempts\)"):
            fetch(f"{web.url}/silent", tmp_path / "got")
    finally:
        ended.set()


_HOLDER = """
import sys, time
from pathlib import Path
from cloob.cache import Cache

def make(path):
    print("making", flush=True)
    time.sleep(1000)

Cache(Path(sys.argv[1])).get("shards", "shard", make)
"""


def test_a_holder_that_hangs_is_passed_over(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process is stopped in the middle of a fetch: the shard is fetched here all the same."""
    monkeypatch.setattr(cache_files, "_PATIENCE_SECONDS", 0.2)
    assert cache.folder is not None
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(cache.folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"making\n"
        path = cache.get("shards", "shard", lambda path: path.write_bytes(b"content") and None)
        assert path.read_bytes() == b"content"
    finally:
        holder.kill()
        holder.communicate()
    assert "its holder has done nothing" in caplog.text


def test_a_holder_that_gets_on_is_waited_for(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "_PATIENCE_SECONDS", 0.2)
    begun, made = threading.Event(), []

    def slowly(path: Path) -> None:
        for count in range(1, 12):
            path.write_bytes(b"x" * count)
            begun.set()
            threading.Event().wait(0.05)
        made.append(path)

    first = threading.Thread(target=cache.get, args=("shards", "shard", slowly))
    first.start()
    assert begun.wait(20)
    cache.get("shards", "shard", lambda path: pytest.fail("fetched twice"))
    first.join()
    assert len(made) == 1


def test_a_cache_that_others_can_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_files.private_folder()
    assert folder.parent == tmp_path and cache_files.private_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(InputError, match=r"not yours alone.*CLOOB_CACHE"):
        cache_files.private_folder()


def test_paths_as_people_write_them(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(shards.parent))
    monkeypatch.chdir(tmp_path)
    assert len(open_source("~/shards/{00000..00002}.tar")) == len(open_source(f"file://{shards}")) == 12
    for words, told in (
        (("train", "--data", "demo", "--out=s3://bucket/run"), "--out is an address (s3:…)"),
        (("train", "--data", "file://data/train.csv"), "names a host, 'data'"),
        (("train", "--data", "some\\train.csv"), "(folders are parted by '/' here: some/train.csv)"),
        (("train", "--data=~/absent.csv"), f"{shards.parent}/absent.csv: no such file"),
        (("eval", "x", "--zeroshot", "https://host/set"), "https://host/set: labelled pictures are read from a folder"),
        (("eval", "x", "--suite", "paper", "https://host/sets"), "https://host/sets: the sets of a suite are read"),
        (
            ("eval", "x", "--zeroshot", "demo:noto-emoji", "--cache-dir", "file:///x"),
            "--cache-dir is an address (file:…)",
        ),
    ):
        code, said = main(words), capsys.readouterr().err.removeprefix(OPENING)
        assert code == 2 and said.count("\n") == 1 and told in said, said
