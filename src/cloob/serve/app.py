"""The application: routes, errors as one line of JSON, the page, and the guard around it."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from cloob.errors import one_line
from cloob.serve import routes
from cloob.serve.batcher import Busy
from cloob.serve.collection import Collection, Gone, Refused
from cloob.serve.guard import MULTIPART_ROOM, UPLOADS, Guard, ServeConfig
from cloob.serve.schemas import Problem
from cloob.serve.uploads import TooLarge, Unsupported

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
_STATUS = {Gone: 404, TooLarge: 413, Unsupported: 415, Refused: 400, Busy: 503}  # what the asker is told
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
mimetypes.add_type("text/javascript", ".js")  # some Windows say text/plain, which no browser runs


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

    app = FastAPI(
        title="cloob serve",
        version="1",
        description="Finds pictures by words and by pictures, sorts them by labels, and shows what a query retrieves.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # Swagger's page comes from a CDN
        redoc_url=None,
        lifespan=lifespan,
        responses=_PROBLEMS,
        max_body_size=config.max_body_bytes,
    )
    app.state.collection = collection
    for router in (routes.about, routes.find, routes.pictures):
        app.include_router(router, prefix="/api")
    app.add_api_route(
        UPLOADS,
        routes.upload,
        methods=["POST"],
        tags=["pictures"],
        max_body_size=config.max_upload_bytes + MULTIPART_ROOM,
    )
    app.add_api_route("/", lambda: FileResponse(PAGE / "index.html"), include_in_schema=False)
    app.mount("/page", StaticFiles(packages=[("cloob.serve", "page")]))
    for kind in (*_STATUS, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _problem)
    return Guard(app, config, (PAGE / "login.html").read_text(encoding="utf-8"))


async def _problem(_: Request, error: Exception) -> Response:
    """One line of JSON: what the asker did wrong, and of all else nothing but that there was something."""
    if isinstance(error, RequestValidationError):
        return _line(*_undescribed(error))
    if isinstance(error, HTTPException):
        return _line(error.status_code, str(error.detail), error.headers)
    if (status := _STATUS.get(type(error))) is not None:
        return _line(status, one_line(error), {"retry-after": "1"} if status == 503 else None)
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
    return JSONResponse({"detail": said.encode("utf-8", "replace").decode()}, status, headers)
