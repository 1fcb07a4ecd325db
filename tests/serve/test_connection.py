"""Clients that are slow or many, by real sockets: nobody is locked out."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from cloob.serve import run
from cloob.serve.guard import Guard
from cloob.serve.settings import ServeConfig

HALF = b"POST /x HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = HALF + b"Content-Length: 4\r\n\r\n"
LONG = 3600.0


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> Iterator[tuple[str, int]]:
    """The address of a server that says how long a body was; it answers /late once `late` is set."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        begun.set()
        await asyncio.to_thread(late.wait, 60 if scope["path"] == "/late" else 0)
        await PlainTextResponse(f"{len(body)} bytes")(scope, receive, send)

    monkeypatch.setattr(run, "_END_SECONDS", LONG)
    config = ServeConfig(**limits)
    server = run._server(Guard(app, config, b""), config)
    with run.bind("127.0.0.1", 0) as opened:
        place = opened.getsockname()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield place
        finally:
            late.set()
            server.should_exit = True
            thread.join()


begun, late = threading.Event(), threading.Event()


@contextmanager
def connected(place: tuple[str, int], sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(place, timeout=60) as client:
        client.sendall(sent)
        yield client


def closed(client: socket.socket) -> bool:
    """Whether the server closes it; it may reset it too, where something was not read."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def answer(client: socket.socket) -> bytes:
    got = b""
    while not got.endswith((b" bytes", b"}")) and (more := client.recv(4096)):
        got += more
    return got


def test_half_a_head_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    late.clear()
    with (
        served(monkeypatch, max_wait_seconds=0.3) as place,
        connected(place, HALF.replace(b"/x", b"/late") + b"\r\n") as asking,
        connected(place, b"") as silent,
        connected(place, HALF) as half,
        connected(place, HALF + b"\r\n") as second,
    ):
        assert answer(second).endswith(b"0 bytes")
        second.sendall(HALF)  # on a connection that has been answered once
        assert closed(silent) and closed(half) and closed(second)
        late.set()
        assert answer(asking).endswith(b"0 bytes")  # who waits for the server is not late


def test_of_too_many_connections_the_one_that_waits_longest_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    late.set()
    with (
        served(monkeypatch, max_wait_seconds=LONG, max_connections=4) as place,
        connected(place, WHOLE.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")) as uploading,
        ExitStack() as stack,
    ):
        assert uploading.recv(4096).startswith(b"HTTP/1.1 100 ")  # the server has begun to read
        waiting = [stack.enter_context(connected(place, HALF)) for _ in range(9)]
        assert all(closed(client) for client in waiting[:6])
        with connected(place, WHOLE + b"abcd") as asking:
            assert answer(asking).endswith(b"4 bytes")
        uploading.sendall(b"abcd")  # what is in the middle of something goes last
        assert answer(uploading).endswith(b"4 bytes")
