"""``cloob serve`` as a process: words, ports, Ctrl-C, kill -9 and a second start."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served_colours import draw

import cloob
from cloob import cli
from cloob.models.folder import save_model
from cloob.search.index import Index
from cloob.search.update import UpdateOptions
from support import fork


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index by a tiny model that lies in a folder."""
    root = tmp_path_factory.mktemp("serve")
    model = cloob.create_model("tiny-vit", seed=0)
    save_model(root / "model", model, {"contrast": "infonce", "inv_tau": 30.0})
    with Index.create(root / "idx") as index:
        index.update([draw(root / "pictures", range(8))], UpdateOptions(model=str(root / "model")))
    return root / "idx"


@contextmanager
def serving(place: Path, *words: str, stdout: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its address; it is killed at the end where it has not ended."""
    command = [sys.executable, "-m", "cloob", "serve", str(place), "--port", "0", *words]
    # A background job of a shell ignores Ctrl-C, and hands that on to what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                yield process, found[0]
                break
        else:
            pytest.fail("the server ended before it listened")
    finally:
        process.kill()
        process.communicate()


def get(address: str, token: str | None = None) -> Any:
    request = urllib.request.Request(address, headers={"authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer), answer.headers


def post(address: str, body: Any) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(address, data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_an_empty_index_is_served_and_ctrl_c_ends_cleanly(tmp_path: Path) -> None:
    Index.create(tmp_path / "idx").close()
    with serving(tmp_path / "idx") as (process, root):
        assert get(f"{root}api/health")[0]["pictures"] == 0
        assert get(f"{root}api/ids")[0]["ids"] == []
        for path in ("", "api/health"):
            with urllib.request.urlopen(urllib.request.Request(f"{root}{path}", method="HEAD")) as answer:
                assert answer.status == 200 and int(answer.headers["content-length"]) > 0 and answer.read() == b""
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(f"{root}api/search", {"parts": [{"words": "red"}]})
        assert refusal.value.code == 400
        refusal.value.close()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and said.strip().endswith("the server has ended"), said


def test_beyond_this_machine_it_prints_an_address_with_a_token_and_a_code_for_phones(tmp_path: Path) -> None:
    Index.create(tmp_path / "idx").close()
    controller, terminal = os.openpty()
    with serving(tmp_path / "idx", "--host", "0.0.0.0", stdout=terminal) as (_, root):
        root, token = root.split("?token=")
        assert "0.0.0.0" not in root and len(token) >= 40 and get(f"{root}api/health", token)[0]["status"] == "ok"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{root}api/health")
        if importlib.util.find_spec("segno"):
            assert "██" in os.read(controller, 4000).decode(errors="replace")
    os.close(controller), os.close(terminal)


@pytest.mark.parametrize(("told", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_its_end_does_not_wait_for_what_takes_minutes(told: signal.Signals, code: int, tmp_path: Path) -> None:
    models = Index.models

    def slow(index: Index) -> Any:  # the server's first question comes in a thread
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), told)
            time.sleep(60)
        return models.__get__(index)

    def child() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Index.models = property(slow)  # type: ignore[method-assign, assignment]
        return cli.main(["serve", str(tmp_path / "idx"), "--port", "0"])

    Index.create(tmp_path / "idx").close()
    before = time.monotonic()
    ranks = fork(tmp_path / "out", 1, child)
    assert os.waitstatus_to_exitcode(os.waitpid(ranks.pids[0], 0)[1]) == code, ranks.told()
    assert time.monotonic() - before < 40
