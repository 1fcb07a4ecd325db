"""The process: a socket, a server on it, and an end without a trace."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import socket
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloob.errors import InputError
from cloob.serve.app import make_app
from cloob.serve.guard import is_loopback
from cloob.serve.settings import ServeConfig

if TYPE_CHECKING:
    from cloob.search.index import Index

_IDLE_SECONDS = 75  # longer than clients keep a connection open: else they write to one that is being closed
_GRACE_SECONDS = 3  # for answers that are under way when the server is told to end
_WORD_SECONDS = 1  # without an end, after which it says what it waits for
_END_SECONDS = 10  # then it ends, whatever its threads are at


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: The port is taken or not allowed, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host {host}: no such host or address") from None
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
        opened.listen(256)
    except OSError as error:
        opened.close()
        raise InputError(_unbound(host, port, error)) from None
    return opened


def _unbound(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; --port gives another, --port 0 any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} needs an administrator; --port gives another"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: no address of this machine"
    return f"{host}:{port} cannot be listened on ({error.strerror})"


def settings(host: str, token: str | None) -> ServeConfig:
    """The limits for a host: beyond loopback a token is wanted, and made where none is given."""
    local = is_loopback(host)
    return ServeConfig(local=local, token=token or (None if local else secrets.token_urlsafe(32)))


def address(opened: socket.socket, config: ServeConfig) -> str:
    """What a browser on this machine opens."""
    host, port = opened.getsockname()[:2]
    name = {"0.0.0.0": "localhost", "::": "localhost", "127.0.0.1": "localhost"}.get(host, host)
    shown = f"[{name}]" if ":" in name else name
    return f"http://{shown}:{port}/" + (f"?token={config.token}" if config.token else "")


class _Connection(H11Protocol):
    """A connection that is closed where no whole head of a request comes in time; uvicorn waits for it for ever."""

    wait: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self.wait, lambda: None if self.cycle else transport.abort())


class _Server(uvicorn.Server):
    """Ends when it is told to, also where a thread is at a map or a model that takes minutes.

    Nothing is lost with the process: the server holds nothing that is not in the index.
    """

    _told_by: int = signal.SIGINT

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        later = [threading.Timer(_WORD_SECONDS, _say_that_it_ends), threading.Timer(_END_SECONDS, self._end)]
        for timer in later:
            timer.daemon = True
            timer.start()
        await super().shutdown(sockets)
        for timer in later:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # told twice; uvicorn would leave the threads to themselves, and Python wait for them
            self._end()
        self._told_by = sig
        if sig == signal.SIGTERM:  # a wish and no interruption; uvicorn would raise it once more at the end
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)

    def _end(self) -> None:
        print("cloob: the server has ended", file=sys.stderr, flush=True)
        os._exit(0 if self._told_by == signal.SIGTERM else 130)


def _say_that_it_ends() -> None:
    print("cloob: ends when what is under way is done; a second Ctrl-C ends it at once", file=sys.stderr, flush=True)


def serve(index: Index, opened: socket.socket, config: ServeConfig) -> None:
    """Answers until the process is told to end: returns after SIGTERM, once what was under way is answered.

    Where that takes longer than ten seconds, or when it is told so again, the process ends at once, with exit code 0
    after SIGTERM and that of an interruption after Ctrl-C.

    Raises:
        KeyboardInterrupt: By Ctrl-C.
    """
    _server(make_app(index, config), config).run(sockets=[opened])


def _server(app: ASGIApp, config: ServeConfig) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=type("Connection", (_Connection,), {"wait": config.max_wait_seconds}),
            limit_concurrency=config.max_connections,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            h11_max_incomplete_event_size=32_768,
            ws="none",
        )
    )
