"""``cloob serve``: search and browse an index in the browser; its API."""

from __future__ import annotations

import contextlib
import html
import os
import re
import secrets
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import cloob
from cloob.commands.console import say, say_next
from cloob.commands.index import check_index, describe
from cloob.commands.options import Range
from cloob.errors import InputError, require
from cloob.machine import processors
from cloob.serve.hosts import is_loopback

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")


@dataclass(frozen=True)
class Options:
    """Serve an index: a page to search, sort and look at it, and an API below /api
    (described at /api/openapi.json).

    The printed address has the token that opens it; $CLOOB_TOKEN chooses it. The index
    may be updated meanwhile.
    """

    index: Annotated[str, "IDX"]
    """An index, or a folder that `cloob find` has indexed."""
    host: str = "127.0.0.1"
    """Where to listen: this machine alone, or 0.0.0.0 for every network of it."""
    port: Annotated[int, Range(0, 65535)] = 8017
    """0 takes any that is free."""
    no_token: bool = False
    """Every user and program of this machine may look; not with another --host."""
    open: bool = False
    """Open the page in the browser."""


def run(options: Options) -> int:
    """Serves until SIGTERM (exit code 0) or Ctrl-C, which is an interruption as
    anywhere else: exit code 130.
    """
    limit_threads()
    place = check_index(options.index)
    check(options)
    token = choose_token(options)
    for module in ("fastapi", "uvicorn", "python_multipart"):
        require(module, "serve")
    # FastAPI, after a word on how to install it.
    from cloob.serve.app import listen

    opened, address = listen(options.host, options.port)
    with opened, cloob.Index.open(place) as index:
        if token is not None:
            address += f"?{urlencode({'token': token})}"
        print(describe(index), file=sys.stderr)
        print(f"{address}    (Ctrl-C ends)", file=sys.stderr, flush=True)
        with in_browser(address) if options.open else contextlib.nullcontext():
            code = serve_until_stopped(index, opened, token, options)
        say("the server has ended")
        if code and len(index):  # an update that was interrupted goes on
            say_next(["index", "--out", index.store.address])
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread may be at work that takes minutes; nothing is lost with it.
        os._exit(code)


def serve_until_stopped(
    index: cloob.Index, opened: socket.socket, token: str | None, options: Options
) -> int:
    """Serves an index until Ctrl-C; the exit code."""
    from cloob.serve.app import serve
    from cloob.serve.config import ServeConfig

    try:
        serve(index, opened, ServeConfig(token, is_loopback(options.host)))
    except KeyboardInterrupt:
        return 130
    return 0


def limit_threads() -> None:
    """Keeps threads of numpy and of torch from waiting for each other.

    numpy comes with the index, and reads this once. Two searches run at a time, so one
    has half of the cores. Idle threads of OpenMP sleep. What is set already stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, processors() // 2)))


def check(options: Options) -> None:
    """Refuses options that are out of range or exclude each other."""
    if options.no_token and not is_loopback(options.host):
        raise InputError(f"--no-token: --host {options.host} needs a token")


def choose_token(options: Options) -> str | None:
    """The token of the environment, or a new one; None for none."""
    if options.no_token:
        return None
    token = os.environ.get("CLOOB_TOKEN") or secrets.token_urlsafe(32)
    if not _TOKEN.fullmatch(token):
        raise InputError(
            "CLOOB_TOKEN: it needs 16 letters, digits, . _ ~ or - at least"
        )
    return token


@contextlib.contextmanager
def in_browser(address: str) -> Iterator[None]:
    """Opens the address in the browser.

    The list of processes shows every user what a browser is started with. So this is
    a file that only its owner reads, and that leads to the address with the token.
    """
    with tempfile.TemporaryDirectory(prefix="cloob-serve-") as folder:
        page = Path(folder) / "open.html"
        target = html.escape(f"0; url={address}")
        page.write_text(
            f'<!doctype html><meta http-equiv="refresh" content="{target}">',
            encoding="utf-8",
        )
        webbrowser.open(page.as_uri())
        yield
