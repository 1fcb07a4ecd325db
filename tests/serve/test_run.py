"""``cloob serve`` as a process: what it prints, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloob import cli
from cloob.search.index import Index
from support import fork


def test_an_empty_index_is_served_to_a_phone_until_the_server_is_ended(tmp_path: Path) -> None:
    Index.create(tmp_path / "idx").close()
    command = [sys.executable, "-m", "cloob", "serve", str(tmp_path / "idx"), "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline() + process.stderr.readline()
        found = re.search(r"(http://\S+)\?token=(\S{40,})", said)
        assert found and "0.0.0.0" not in found[1], said
        assert httpx.get(f"{found[1]}api/health").status_code == 401
        with httpx.Client(base_url=found[1], headers={"authorization": f"Bearer {found[2]}"}, timeout=60) as web:
            assert web.get("api/health").json()["pictures"] == 0 and web.get("api/ids").json()["ids"] == []
            for path in ("", "api/health"):
                answer = web.head(path)
                assert answer.status_code == 200 and int(answer.headers["content-length"]) > 0 and not answer.content
            assert web.post("api/search", json={"parts": [{"words": "red"}]}).status_code == 400
        process.terminate()
        assert process.communicate(timeout=60)[1].strip().endswith("the server has ended") and not process.returncode


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
