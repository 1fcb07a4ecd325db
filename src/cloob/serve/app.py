"""The application: routes, errors as one line of JSON, and the page; and the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mimetypes
import re
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
from cloob.serve import routes
from cloob.serve.collection import ServedIndex
from cloob.serve.config import ServeConfig
from cloob.serve.guard import Guard

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
_REFUSALS = (400, 401, 403, 404, 413, 415, 421, 422, 503)
_ERRORS = (RequestValidationError, InputError, HTTPException, Exception)
# Where a socket that listens everywhere is reached from: nobody has these addresses.
_EVERYWHERE = {"0.0.0.0": "192.0.2.1", "::": "2001:db8::1"}
# A place on this machine, in a message.
_PLACE = re.compile(r"(?<![\w.~])(?:~?/|[A-Za-z]:\\|\w+://)[^\s;,)]+")
# Some Windows say text/plain, which no browser runs.
mimetypes.add_type("text/javascript", ".js")


def make_app(index: Index, config: ServeConfig) -> ASGIApp:
    """The server as an ASGI application.

    The caller closes the index when the server has ended.
    """
    collection = ServedIndex(index, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # FastAPI puts routes together at their first use, with the warnings of the full
        # process changed meanwhile. That must be over when the model is loaded, in a
        # thread, by libraries that do the same.
        app.openapi()
        warming = asyncio.create_task(collection.warm())
        yield
        warming.cancel()

    app = FastAPI(
        title="cloob serve",
        version="1",
        description="Finds pictures by words and by pictures, and sorts them.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # Swagger's page comes from a CDN
        redoc_url=None,
        lifespan=lifespan,
        responses={
            code: {"model": dict[str, str], "description": HTTPStatus(code).phrase}
            for code in _REFUSALS
        },
        max_body_size=config.max_body_bytes,
    )
    app.state.collection = collection
    app.include_router(routes.api)
    app.add_api_route(
        "/api/uploads",
        routes.upload,
        methods=["POST"],
        max_body_size=config.max_upload_bytes,
    )
    app.add_api_route(
        "/", lambda: FileResponse(PAGE / "index.html"), include_in_schema=False
    )
    app.mount("/page", StaticFiles(packages=[("cloob.serve", "page")]))
    for kind in _ERRORS:
        app.add_exception_handler(kind, _problem)
    return Guard(app, config, (PAGE / "login.html").read_text(encoding="utf-8"))


async def _problem(request: Request, error: Exception) -> Response:
    """An error as one line of JSON; the log alone has places of this machine."""
    if isinstance(error, RequestValidationError):
        return _malformed(error)
    if isinstance(error, InputError):
        text = one_line(error)
        logger.warning("refused: %s", text)
        detail = await _without_places(text, request.app.state.collection)
        return JSONResponse({"detail": detail}, 400)
    # FastAPI makes a 400 of a body that could not be stored: a full disk is our fault.
    cause = error.__cause__
    if isinstance(error, HTTPException) and not isinstance(cause, OSError):
        return await http_exception_handler(request, error)
    failure = cause if isinstance(error, HTTPException) and cause else error
    logger.error("a request failed: %s: %s", type(failure).__name__, one_line(failure))
    return JSONResponse({"detail": "the server failed at this; its log has more"}, 500)


def _malformed(error: RequestValidationError) -> Response:
    """Says what is wrong first in a request that the API's description rules out."""
    first = error.errors()[0]
    why = first["msg"]
    if first["type"] == "json_invalid":
        why = first["ctx"]["error"]
    place = ".".join(map(str, first["loc"]))
    return JSONResponse({"detail": one_line(ValueError(f"{place}: {why}"))}, 422)


async def _without_places(text: str, collection: ServedIndex) -> str:
    """A message without the index's places, and without what looks like one."""
    store = collection.index.store
    sources, model = await collection.run(
        lambda: (store.sources(), store.stored_model())
    )
    places = {store.address, *sources}
    if model and "/" in model.spec:
        places.add(model.spec)
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, "…")
    return _PLACE.sub("…", text)


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket, and the address to open.

    If the socket listens everywhere, others in the network reach it there.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.create_server(place[:2], family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise InputError(
            f"--host {host} --port {port}: {why}; --port 0 takes any that is free"
        ) from None
    name, port = opened.getsockname()[:2]
    if name in _EVERYWHERE:
        name = _own_address(family, _EVERYWHERE[name])
    if name == "127.0.0.1":
        name = "localhost"
    if ":" in name:
        name = f"[{name}]"
    return opened, f"http://{name}:{port}/"


def _own_address(family: int, elsewhere: str) -> str:
    """This machine's address in its network; without one, that of itself."""
    with (
        contextlib.suppress(OSError),
        socket.socket(family, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((elsewhere, 9))  # sends nothing
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def serve(index: Index, opened: socket.socket, config: ServeConfig) -> None:
    """Answers until SIGTERM; after Ctrl-C raises KeyboardInterrupt.

    A thread may still run: end the process.
    """
    # uvicorn hands the signal on to this at its end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = uvicorn.Config(
        make_app(index, config),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=512,
        # longer than clients keep one open: else they write to one that is being closed
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=32_768,
        http="h11",
        ws="none",
    )
    uvicorn.Server(server).run(sockets=[opened])
