"""The application (routes, errors as one line of JSON, the page, and the guard around it), and a process for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mimetypes
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from cloob.errors import InputError, one_line
from cloob.models.aligned.model import RowsError
from cloob.serve import routes
from cloob.serve.collection import Collection
from cloob.serve.guard import Guard, ServeConfig
from cloob.serve.schemas import Problem

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
_EVERYWHERE = {"0.0.0.0": "192.0.2.1", "::": "2001:db8::1"}  # and an address that nobody has
_REFUSALS = (400, 401, 403, 404, 413, 415, 421, 422, 503)
mimetypes.add_type("text/javascript", ".js")  # some Windows say text/plain, which no browser runs


def make_app(index: Index, config: ServeConfig) -> ASGIApp:
    """The server as an ASGI application; the caller closes the index when the server has ended."""
    collection = Collection(index, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # FastAPI puts routes together at their first use, with the warnings of the full process changed
        # meanwhile. That must be over when the model is loaded, in a thread, by libraries that do the same.
        app.openapi()
        warming = asyncio.create_task(collection.warm())
        yield
        warming.cancel()

    app = FastAPI(
        title="cloob serve",
        version="1",
        description="Finds pictures by words and by pictures, sorts them by labels, and shows what a query retrieves.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # Swagger's page comes from a CDN
        redoc_url=None,
        lifespan=lifespan,
        responses={code: {"model": Problem, "description": HTTPStatus(code).phrase} for code in _REFUSALS},
        max_body_size=config.max_body_bytes,
    )
    app.state.collection = collection
    app.include_router(routes.api)
    app.add_api_route("/api/uploads", routes.upload, methods=["POST"], max_body_size=config.max_upload_bytes)
    app.add_api_route("/", lambda: FileResponse(PAGE / "index.html"), include_in_schema=False)
    app.mount("/page", StaticFiles(packages=[("cloob.serve", "page")]))
    for kind in (RequestValidationError, InputError, RowsError, HTTPException, Exception):
        app.add_exception_handler(kind, _problem)
    return Guard(app, config, (PAGE / "login.html").read_text(encoding="utf-8"))


async def _problem(request: Request, error: Exception) -> Response:
    """An error as one line of JSON, without places on this machine; the log has them."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        why = first["ctx"]["error"] if first["type"] == "json_invalid" else first["msg"]
        place = ".".join(map(str, first["loc"]))
        return JSONResponse({"detail": one_line(ValueError(f"{place}: {why}"))}, 422)
    if isinstance(error, (InputError, RowsError)):
        logger.warning("refused: %s", one_line(error))
        text = await request.app.state.collection.without_places(one_line(error))
        return JSONResponse({"detail": text}, 400)
    if isinstance(error, HTTPException) and not isinstance(error.__cause__, OSError):
        return await http_exception_handler(request, error)
    # Also a body that could not be stored, of which FastAPI makes a 400: a full disk is the server's fault.
    cause = error.__cause__ if isinstance(error, HTTPException) and error.__cause__ else error
    logger.error("a request failed: %s: %s", type(cause).__name__, one_line(cause))
    return JSONResponse({"detail": "the server failed at this; its own window says more"}, 500)


def listen(host: str, port: int, token: str | None) -> tuple[socket.socket, str]:
    """A socket, and the address to open; if it listens everywhere, one that other machines of the network reach."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.create_server(place[:2], family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"--host {host} --port {port}: {why}; --port 0 takes any that is free") from None
    name, port = opened.getsockname()[:2]
    if elsewhere := _EVERYWHERE.get(name):
        name = "127.0.0.1"  # without a network
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))  # sends nothing
            name = probe.getsockname()[0]
    name = {"127.0.0.1": "localhost"}.get(name, f"[{name}]" if ":" in name else name)
    return opened, f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def serve(index: Index, opened: socket.socket, config: ServeConfig) -> None:
    """Answers until SIGTERM; after Ctrl-C raises KeyboardInterrupt. A thread may still run: end the process."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn hands the signal on to this at its end
    server = uvicorn.Config(
        make_app(index, config),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=512,
        timeout_keep_alive=75,  # longer than clients keep one open: else they write to one that is being closed
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=32_768,
        http="h11",
        ws="none",
    )
    uvicorn.Server(server).run(sockets=[opened])
