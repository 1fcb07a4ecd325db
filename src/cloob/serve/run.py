"""The process: a socket and a server on it."""

from __future__ import annotations

import errno
import secrets
import signal
import socket
from typing import TYPE_CHECKING

import uvicorn

from cloob.errors import InputError
from cloob.serve.app import make_app
from cloob.serve.guard import ServeConfig, is_loopback

if TYPE_CHECKING:
    from cloob.search.index import Index

_IDLE_SECONDS = 75  # longer than clients keep a connection open: else they write to one that is being closed
_GRACE_SECONDS = 3  # for answers that are under way when the server is told to end
_UNBOUND = {
    errno.EADDRINUSE: "port {port} of {host} is taken; --port gives another, --port 0 any that is free",
    errno.EACCES: "port {port} needs an administrator; --port gives another",
    errno.EADDRNOTAVAIL: "--host {host}: no address of this machine",
}


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host {host}: no such host or address") from None
    try:
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        said = _UNBOUND.get(error.errno or 0, "{host}:{port} cannot be listened on")
        raise InputError(said.format(host=host, port=port)) from None


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


def serve(index: Index, opened: socket.socket, config: ServeConfig) -> None:
    """Answers until SIGTERM, then returns; by Ctrl-C it raises KeyboardInterrupt.

    Answers under way have some seconds. A thread may still be at work afterwards: it is for the caller to end the
    process.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn hands the signal on to this at its end
    server = uvicorn.Config(
        make_app(index, config),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=512,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        h11_max_incomplete_event_size=32_768,
        http="h11",
        ws="none",
    )
    uvicorn.Server(server).run(sockets=[opened])
