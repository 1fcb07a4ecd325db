"""Opens an index and serves it as ``cloob serve`` was asked to."""

from __future__ import annotations

import sys
import webbrowser

from cloob.commands.steps import say_next
from cloob.errors import printable, require
from cloob.search.index import Index


def run(place: str, *, host: str, port: int, token: str | None, model: str | None, browser: bool) -> int:
    """Serves until SIGTERM (exit code 0) or Ctrl-C, which is an interruption as anywhere else: exit code 130."""
    for module in ("fastapi", "uvicorn", "python_multipart"):
        require(module, "serve")
    from cloob.serve.run import address, bind, serve, settings  # FastAPI, after a word on how to install it

    opened = bind(host, port)
    with opened, Index.open(place, model=model) as index:
        config = settings(host, token)
        shown = address(opened, config)
        models = ", ".join(printable(each.name) for each in index.models)
        print(f"{index.store.address}: {len(index):,} pictures, {models or 'no model'}", file=sys.stderr)
        print(f"{shown}    (Ctrl-C ends)", file=sys.stderr, flush=True)
        if browser:
            webbrowser.open(shown)
        try:
            serve(index, opened, config)
        except KeyboardInterrupt:
            print("cloob: the server has ended", file=sys.stderr)
            if index.models:
                say_next(["index", "--out", index.store.address])  # brings it up to date
            return 130
    print("cloob: the server has ended", file=sys.stderr)
    return 0
