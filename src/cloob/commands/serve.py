"""``cloob serve``: an index in the browser."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cloob.commands.arguments import parse, tyro
from cloob.commands.search import check_index
from cloob.errors import InputError

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")


@dataclass(frozen=True)
class ServeArguments:
    """Serve an index: a page to search, sort and look at it, and an API below /api (described at /api/openapi.json).

    The index may be updated meanwhile.
    """

    index: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IDX")]
    """What `cloob index` made: a folder, or postgresql://…."""
    host: str = "127.0.0.1"
    """Where to listen. Beyond this machine (0.0.0.0: everywhere) every request must show a token."""
    port: int = 8017
    """0 takes any that is free."""
    token: str | None = None
    """What requests must show as `Authorization: Bearer` or cookie: 16 letters, digits, `.`, `_`, `~` or `-` at least.
    Left out, one is made where the host is not loopback."""
    model: str | None = None
    """The model of the index that is asked first; the index's first when left out."""
    open: bool = False
    """Open the page in the browser."""


def main(words: Sequence[str]) -> int:
    """Checks the words, and serves until Ctrl-C."""
    arguments = parse(ServeArguments, words, "cloob serve")
    check_index(arguments.index)
    if not 0 <= arguments.port < 65536:
        raise InputError(f"--port is {arguments.port}; 0 to 65535 is wanted")
    if arguments.token is not None and not _TOKEN.fullmatch(arguments.token):
        raise InputError("--token is too short or holds other characters; 16 letters, digits, . _ ~ or - are wanted")
    _share_cores()
    from cloob.commands.work.serve import run  # FastAPI and torch: only for words that are right

    return run(
        arguments.index,
        host=arguments.host,
        port=arguments.port,
        token=arguments.token,
        model=arguments.model,
        browser=arguments.open,
    )


def _share_cores() -> None:
    """Keeps the threads of numpy and of torch from waiting for each other; before either is imported.

    Two searches run at a time, so each has half of the cores. Threads of OpenMP that have nothing to do sleep and do
    not spin. What is set already stays. docs/serve.md has the figures.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // 2)))
