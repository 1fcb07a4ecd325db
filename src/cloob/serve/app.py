"""The application: routes, errors as one line of JSON, the page, and the guard around it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from cloob.errors import InputError, one_line
from cloob.search.records import valid
from cloob.serve.api import about, find, items
from cloob.serve.api.schemas import Problem
from cloob.serve.batcher import Busy
from cloob.serve.collection import Collection, Gone
from cloob.serve.guard import Guard
from cloob.serve.settings import ServeConfig
from cloob.serve.uploads import TooLarge, Unsupported

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (Gone, 404),
    (TooLarge, 413),
    (Unsupported, 415),
    (InputError, 400),
    (Busy, 503),
)
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": said}
    for status, said in {
        400: "The query cannot be answered as it stands",
        401: "A token is wanted",
        403: "Asked for by another site",
        404: "Not there",
        413: "Too large",
        415: "No picture, or no JSON",
        421: "Asked under another name than localhost",
        422: "Not what this document describes",
        503: "Too many queries or uploads wait",
    }.items()
}


def make_app(index: Index, config: ServeConfig) -> ASGIApp:
    """The whole server as an ASGI application.

    Args:
        index: Open; the caller closes it when the server has ended.
        config: Who may ask, and how much.
    """
    collection = Collection(index, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # FastAPI puts routes together when they are first asked for, with the warnings of the whole process changed
        # meanwhile. That must be over when the model is loaded, in a thread, by libraries that do the same.
        app.openapi()
        warming = asyncio.create_task(collection.warm())
        yield
        warming.cancel()
        collection.close()

    app = FastAPI(
        title="cloob serve",
        version="1",
        description="Finds pictures by words and by pictures, sorts them by labels, and shows what a query retrieves.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # Swagger's page comes from a CDN
        redoc_url=None,
        lifespan=lifespan,
        responses=_PROBLEMS,
    )
    app.state.collection = collection
    for router in (about.router, find.router, items.router):
        app.include_router(router, prefix="/api")
    app.add_api_route("/", page_file, include_in_schema=False)
    app.add_api_route("/page/{name}", page_file, include_in_schema=False)
    for kind in (*(kind for kind, _ in _STATUS), HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _problem)
    return Guard(app, config, _page()["login.html"])


async def page_file(request: Request) -> Response:
    """A file of the page; there are no others than those that came with the package."""
    name = request.path_params.get("name", "index.html")
    content = _page().get(name)
    if content is None:
        raise Gone(f"no file {name[:80]!r}")
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers={"cache-control": "no-cache"})


@cache
def _page() -> dict[str, bytes]:
    folder = resources.files("cloob.serve") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}


async def _problem(request: Request, error: Exception) -> Response:
    """One line of JSON; of our own faults nothing but that there was one."""
    if isinstance(error, RequestValidationError):
        return _line(*_undescribed(error))
    if isinstance(error, HTTPException):
        return _line(error.status_code, str(error.detail), error.headers)
    for kind, status in _STATUS:
        if isinstance(error, kind):
            collection = request.app.state.collection
            said = one_line(error)
            names = {str(collection.index.store.address): "the index"} | collection.places
            for place, name in names.items():  # of a relative one, such as ".", no part of a word and no full stop
                whole = re.escape(place)
                pattern = whole if place.startswith("/") or "://" in place else rf"(?<![\w./]){whole}(?![\w.])"
                said = re.sub(pattern, name.replace("\\", r"\\"), said)
            return _line(status, said, {"retry-after": "1"} if status == 503 else None)
    logger.error("a request failed: %s: %s", type(error).__name__, one_line(error))
    return _line(500, "the server failed at this; its own window says more")


def _undescribed(error: RequestValidationError) -> tuple[int, str]:
    """Status and line of a request that is not what the API describes."""
    first = error.errors()[0]
    place = ".".join(str(step) for step in first["loc"][1:])
    if first["loc"][0] == "body":
        if first["type"] == "json_invalid":
            return 422, f"the body is no JSON: {first['ctx']['error']}, at character {place}"
        if not place and isinstance(error.body, bytes):
            return 415, "the body is taken as JSON when its Content-Type is application/json"
        place = place or "body"
    return 422, f"{place}: {first['msg']}" if place else str(first["msg"])


def _line(status: int, said: str, headers: Any = None) -> Response:
    return JSONResponse({"detail": valid(said)}, status_code=status, headers=headers)
