"""Clients that never finish a request, and too many of them, by real sockets."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from typing import Any

from cloob.search.index import Index
from cloob.serve import run
from cloob.serve.app import make_app
from cloob.serve.settings import ServeConfig


def answer(client: socket.socket) -> bytes:
    """Head and body of one answer, which may come in two parts."""
    found = b""
    while not found.endswith(b"}"):
        part = client.recv(4096)
        assert part, found
        found += part
    return found


HALF = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n"


def test_half_a_head_is_not_waited_for_and_too_many_clients_are_told(index: Index) -> None:
    config = ServeConfig(max_wait_seconds=1.0, max_connections=4)
    server = run._server(make_app(index, config), config)
    with run.bind("127.0.0.1", 0) as opened, ExitStack() as stack:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()

        def connected(sent: bytes) -> Any:
            client = stack.enter_context(socket.create_connection(opened.getsockname(), timeout=60))
            client.sendall(sent)
            return client

        try:
            first = connected(HALF + b"\r\n")
            assert answer(first).startswith(b"HTTP/1.1 200 ")
            waiting = [connected(sent) for sent in (b"", HALF, HALF)]
            assert connected(HALF + b"\r\n").recv(4096).startswith(b"HTTP/1.1 503 ")
            assert [client.recv(1) for client in waiting] == [b"", b"", b""]  # closed
            first.sendall(HALF + b"\r\n")  # who was answered may ask again
            assert answer(first).startswith(b"HTTP/1.1 200 ")
        finally:
            server.should_exit = True
            thread.join()
