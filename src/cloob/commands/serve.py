"""``cloob serve``: an index in the browser: search, sort, wander; and its API."""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import cloob
from cloob.commands.console import Positional, arg, check, refuse, say, say_next
from cloob.commands.index import check_index
from cloob.errors import printable, require
from cloob.machine import processors


@dataclass(frozen=True)
class Options:
    """Serve an index: a page to search, sort and look at it, and an API below /api
    (described at /api/openapi.json).

    The index may be updated meanwhile.
    """

    index: Annotated[Positional[str], arg(metavar="IDX")]
    """An index, or a folder that `cloob find` has indexed."""
    host: str = "127.0.0.1"
    """Where to listen; beyond this machine (0.0.0.0: everywhere) requests need a token.
    """
    port: int = 8017
    """0 takes any that is free."""
    token: str | None = None
    """Bearer or cookie of requests; else $CLOOB_TOKEN, or made where the host is not
    loopback.
    """
    token_file: Path | None = None
    """The file with the token: it is in no list of processes."""
    model: str | None = None
    """The default model of the index; its first when left out."""
    update: float | None = None
    """Seconds between updates of the index, which searches do not wait for."""
    open: bool = False
    """Open the page in the browser."""


def run(options: Options) -> int:
    """Serves until SIGTERM (exit code 0) or Ctrl-C, which is an interruption as
    anywhere else: exit code 130.
    """
    # Threads of numpy and of torch are not to wait for each other; what is set already
    # stays. numpy comes with the index, and reads it once. Two searches run at a time,
    # so one has half of the cores. Idle threads of OpenMP sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, processors() // 2)))
    place, below = check_index(options.index)
    check(options, "token excludes token_file", port=(0, 65535), update=(1, 10**7))
    token = options.token or os.environ.get("CLOOB_TOKEN")
    if options.token_file is not None:
        token = options.token_file.read_text(encoding="utf-8").strip()
    message = (
        "the token (--token, --token-file, CLOOB_TOKEN): it needs 16 letters, digits, ."
        " _ ~ or - at least"
    )
    refuse(
        {
            message: (
                token is not None
                and not re.fullmatch(r"[A-Za-z0-9._~-]{16,256}", token)
            )
        }
    )
    for module in ("fastapi", "uvicorn", "python_multipart"):
        require(module, "serve")
    from cloob.serve.app import (
        is_loopback,
        listen,
        serve,
    )  # FastAPI, after a word on how to install it
    from cloob.serve.collection import ServeConfig

    local = is_loopback(options.host)
    token = token or (None if local else secrets.token_urlsafe(32))
    opened, shown = listen(options.host, options.port, token)
    with opened, cloob.Index.open(place, model=options.model) as index:
        if below and local:  # others may not filter by path
            shown += f"{'&' if '?' in shown else '?'}{urlencode({'where': below})}"
        elif below:
            say(
                f"all pictures of {place} are served, and not those of {options.index}"
                " alone"
            )
        models = ", ".join(printable(item.name) for item in index.models)
        print(
            f"{index.store.address}: {len(index):,} pictures, {models or 'no model'}",
            file=sys.stderr,
        )
        print(f"{shown}    (Ctrl-C ends)", file=sys.stderr, flush=True)
        if options.open:
            webbrowser.open(shown)
        if options.update:
            threading.Thread(
                target=_update, args=(place, options.update), daemon=True
            ).start()
        code = 0
        try:
            serve(index, opened, ServeConfig(token, local))
        except KeyboardInterrupt:
            code = 130
        say("the server has ended")
        if code and index.models:
            say_next(["index", "--out", index.store.address])  # brings it up to date
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(
            code
        )  # a thread may be at work that takes minutes; nothing is lost with it


def _update(place: str, seconds: float) -> None:
    """Brings the index up to date again and again, for all of its models; reports what
    goes wrong, and tries again.
    """
    from cloob.errors import one_line
    from cloob.search.update import UpdateOptions

    while True:
        try:
            with cloob.Index.open(place, writable=True) as index:
                for model in index.models:
                    done = index.update([], UpdateOptions(name=model.name))
                    if done.added or done.changed or done.removed:
                        counts = (
                            f"{done.added:,} added, {done.changed:,} changed,"
                            f" {done.removed:,} gone"
                        )
                        say(f"{printable(model.name)}: {counts}")
                    for source, why in done.refused.items():
                        say(f"{printable(source)}: {printable(why)}")
        except Exception as error:  # the server goes on
            say(f"not updated: {one_line(error)}")
        time.sleep(seconds)
