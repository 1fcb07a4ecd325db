"""``cloob serve`` as a process: what it prints, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from cloob.search.index import Index
from support import exit_code, fork, refused


def test_an_empty_index_is_served_to_a_phone_until_the_server_is_ended(tmp_path):
    Index.create(tmp_path / "idx").close()
    words = f"-m cloob serve {tmp_path}/idx --port 0 --host 0.0.0.0"
    command = [sys.executable, *words.split()]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        said = process.stderr.readline() + process.stderr.readline()
        found = re.search(r"(http://\S+)\?token=(\S{40,})", said)
        assert found and "0.0.0.0" not in found[1], said
        assert httpx.get(f"{found[1]}api/ids").status_code == 401
        assert httpx.get(f"{found[1]}api/health").json() == {
            "status": "ok"
        }  # nothing of the collection
        with httpx.Client(
            base_url=found[1],
            headers={"authorization": f"Bearer {found[2]}"},
            timeout=60,
        ) as web:
            assert web.get("api/health").json()["pictures"] == 0
            assert web.get("api/ids").json()["ids"] == []
            for path in ("", "api/health"):
                answer = web.head(path)
                assert answer.status_code == 200
                assert int(answer.headers["content-length"]) > 0
                assert not answer.content
            assert (
                web.post("api/search", json={"parts": [{"words": "red"}]}).status_code
                == 400
            )
        process.terminate()
        assert (
            process.communicate(timeout=60)[1].strip().endswith("the server has ended")
        )
        assert not process.returncode


def test_numpy_is_imported_after_its_threads_are_limited():
    read = (
        "serve.check_index = lambda _: sys.exit('numpy' in sys.modules or"
        " 'OPENBLAS_NUM_THREADS' not in os.environ)"
    )
    code = (
        f"import os, sys; from cloob.commands import serve; {read};"
        " serve.run(serve.Options('idx'))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_token_comes_from_the_environment(tmp_path, monkeypatch, capsys):
    Index.create(tmp_path / "idx").close()
    monkeypatch.setenv("CLOOB_TOKEN", "of-the-environment-1")
    words = f"serve {tmp_path}/idx --port 0"

    def child():
        monkeypatch.setattr("cloob.serve.app.serve", lambda *_: None)
        return exit_code(f"{words} --host 0.0.0.0")

    ranks = fork(tmp_path / "out", 1, child)
    assert ranks.wait() == [0]
    assert "/?token=of-the-environment-1 " in ranks.told()
    for wrong in ("short", "with a blank; in it, yes"):
        monkeypatch.setenv("CLOOB_TOKEN", wrong)
        assert "CLOOB_TOKEN: it needs 16 letters" in refused(capsys, words)


@pytest.mark.parametrize("words", ["", "--no-token"])
def test_other_users_of_the_machine_need_the_token_that_is_printed(words, tmp_path):
    """A folder that its owner alone may read is not open to whoever runs curl here."""
    Index.create(tmp_path / "idx").close()

    def child():
        os.environ.pop("CLOOB_TOKEN", None)
        return exit_code(f"serve {tmp_path}/idx --port 0 {words}")

    server = fork(tmp_path / "out", 1, child)
    try:
        server.until(lambda: server.outputs[0].exists() and "Ctrl-C" in server.told())
        address, token = re.findall(
            r"(http://\S+?/)(?:\?token=(\S+))?\s", server.told()
        )[0]
        assert len(token) == (0 if words else 43)
        with httpx.Client(base_url=address) as web:
            status = web.get("/api/ids").status_code
            assert status == (200 if words else 401)
            assert web.get("/api/health").json().get("pictures") == (
                0 if words else None
            )
            if token:
                bearer = {"authorization": f"Bearer {token}"}
                assert web.get("/api/ids", headers=bearer).status_code == 200
                assert web.get(f"/?token={token}").status_code == 303
            assert web.get("/api/ids").json()["ids"] == [], "the cookie is kept"
    finally:
        os.kill(server.pids[0], signal.SIGTERM)
        assert server.wait() == [0]


def test_the_browser_is_started_without_the_token_in_its_command(tmp_path, monkeypatch):
    Index.create(tmp_path / "idx").close()
    token = "of-letters-and-numbers-16"
    monkeypatch.setenv("CLOOB_TOKEN", token)

    def look(address):
        page = Path(urlsplit(address).path)
        modes = [oct(place.stat().st_mode & 0o077) for place in (page.parent,)]
        print("opened", address, modes, page.read_text(encoding="utf-8"))

    def child():
        monkeypatch.setattr("cloob.serve.app.serve", lambda *_: None)
        monkeypatch.setattr("webbrowser.open", look)
        return exit_code(f"serve {tmp_path}/idx --port 0 --open")

    server = fork(tmp_path / "out", 1, child)
    assert server.wait() == [0]
    (said,) = [line for line in server.told().splitlines() if "opened" in line]
    _, address, modes, page = said.split(maxsplit=3)
    assert address.startswith("file:")
    assert token not in address
    assert modes == "['0o0']"
    assert f"?token={token}" in page
    assert not Path(urlsplit(address).path).exists(), "it goes with the server"


@pytest.mark.parametrize(("told", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_its_end_does_not_wait_for_what_takes_minutes(told, code, tmp_path):
    model = Index.model

    def slow(index):  # the server's first question comes in a thread
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), told)
            time.sleep(60)
        return model(index)

    def child():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Index.model = slow
        return exit_code(f"serve {tmp_path}/idx --port 0")

    Index.create(tmp_path / "idx").close()
    before = time.monotonic()
    ranks = fork(tmp_path / "out", 1, child)
    assert os.waitstatus_to_exitcode(os.waitpid(ranks.pids[0], 0)[1]) == code, (
        ranks.told()
    )
    assert time.monotonic() - before < 40
