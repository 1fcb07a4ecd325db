"""Opens an index and serves it as ``cloob serve`` was asked to."""

from __future__ import annotations

import sys
import webbrowser

from cloob.commands.serve import ServeArguments
from cloob.errors import require
from cloob.search.index import Index


def run(arguments: ServeArguments) -> int:
    """Serves until Ctrl-C, which is an interruption as anywhere else: exit code 130."""
    for module in ("fastapi", "uvicorn", "python_multipart"):
        require(module, "serve")
    from cloob.serve.run import address, bind, serve, settings  # FastAPI, after a word on how to install it

    opened = bind(arguments.host, arguments.port)
    with opened, Index.open(arguments.index, model=arguments.model) as index:
        config = settings(arguments.host, arguments.token)
        shown = address(opened, config)
        models = ", ".join(model.name for model in index.models)
        print(f"{arguments.index}: {len(index):,} pictures, {models or 'no model'}", file=sys.stderr)
        print(f"{shown}    (Ctrl-C ends)", file=sys.stderr, flush=True)
        if arguments.open:
            webbrowser.open(shown)
        serve(index, opened, config)
    return 0
