"""The application: routes, errors as one line of JSON, the page; around it a guard, so
that no route is forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import mimetypes
import re
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
)
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloob.errors import InputError, one_line
from cloob.models.aligned.model import RowsError
from cloob.serve import routes
from cloob.serve.collection import ServeConfig, ServedIndex

if TYPE_CHECKING:
    from cloob.search.index import Index

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
# and the port: cookies know none, and two servers on one machine have two tokens
COOKIE = "cloob-token"
HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
        " connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self';"
        " frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_PUBLIC = (
    "/page/base.css",
    "/page/icon.svg",
)  # what the form for the token is drawn with
_BROWSERS = {
    "authorization",
    "cookie",
    "sec-fetch-site",
}  # headers of who has, or had, the token
_FORM_BYTES, _COOKIE_SECONDS = 4096, 30 * 24 * 3600
_EVERYWHERE = {
    "0.0.0.0": "192.0.2.1",
    "::": "2001:db8::1",
}  # and an address that nobody has
_PLACE = re.compile(
    r"(?<![\w.~])(?:~?/|[A-Za-z]:\\|\w+://)[^\s;,)]+"
)  # on this machine, in a message
mimetypes.add_type(
    "text/javascript", ".js"
)  # some Windows say text/plain, which no browser runs


def make_app(index: Index, config: ServeConfig) -> ASGIApp:
    """The server as an ASGI application; the caller closes the index when the server
    has ended.
    """
    collection, refusals = (
        ServedIndex(index, config),
        (400, 401, 403, 404, 413, 415, 421, 422, 503),
    )

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
        description=(
            "Finds pictures by words and by pictures, and sorts them by labels."
        ),
        openapi_url="/api/openapi.json",
        docs_url=None,  # Swagger's page comes from a CDN
        redoc_url=None,
        lifespan=lifespan,
        responses={
            code: {"model": dict[str, str], "description": HTTPStatus(code).phrase}
            for code in refusals
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
    for kind in (
        RequestValidationError,
        InputError,
        RowsError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, _problem)
    return Guard(app, config, (PAGE / "login.html").read_text(encoding="utf-8"))


async def _problem(request: Request, error: Exception) -> Response:
    """An error as one line of JSON, without places on this machine; the log has
    them.
    """
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        why = first["ctx"]["error"] if first["type"] == "json_invalid" else first["msg"]
        place = ".".join(map(str, first["loc"]))
        return JSONResponse({"detail": one_line(ValueError(f"{place}: {why}"))}, 422)
    if isinstance(error, (InputError, RowsError)):
        text, collection = one_line(error), request.app.state.collection
        logger.warning("refused: %s", text)
        store = collection.index.store
        sources, models = await collection.run(
            lambda: (store.sources(), store.models())
        )
        places = {
            store.address,
            *sources,
            *(model.spec for model in models if "/" in model.spec),
        }
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, "…")
        return JSONResponse({"detail": _PLACE.sub("…", text)}, 400)
    if isinstance(error, HTTPException) and not isinstance(error.__cause__, OSError):
        return await http_exception_handler(request, error)
    # Also a body that could not be stored, of which FastAPI makes a 400: a full disk is
    # the server's fault.
    cause = (
        error.__cause__
        if isinstance(error, HTTPException) and error.__cause__
        else error
    )
    logger.error("a request failed: %s: %s", type(cause).__name__, one_line(cause))
    return JSONResponse({"detail": "the server failed at this; its log has more"}, 500)


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches this machine alone."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """Checks host, origin and token of every request, and adds the headers that keep a
    browser careful.
    """

    app: ASGIApp
    config: ServeConfig
    login_page: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request itself or hands it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if (
            scope["method"] == "HEAD"
        ):  # as GET; uvicorn, which has the scope as it was, leaves the body out
            scope = {**scope, "method": "GET"}

        async def careful(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                page = scope["path"].startswith("/page/")
                for name, value in {
                    **HEADERS,
                    "cache-control": "no-cache" if page else "no-store",
                }.items():
                    headers.setdefault(name, value)  # a route may set another
            await send(message)

        await self._who_answers(Request(scope))(scope, receive, careful)

    def _who_answers(self, request: Request) -> ASGIApp:
        path, method, headers = request.scope["path"], request.method, request.headers
        host = headers.get("host", "")
        if self.config.local and not is_loopback(re.sub(r":\d*$", "", host)):
            return _refusal(
                421,
                "this server answers for localhost alone; cloob serve --host opens it"
                " to others",
            )
        if path.startswith("/api/"):
            foreign = (
                "origin" in headers and headers["origin"].partition("://")[2] != host
            )
            if foreign or headers.get("sec-fetch-site", "none") not in (
                "same-origin",
                "none",
            ):
                return _refusal(403, "this request comes from another site")
        most = (
            self.config.max_upload_bytes
            if path == "/api/uploads"
            else self.config.max_body_bytes
        )
        if int(headers.get("content-length", 0)) > most:  # FastAPI counts what comes
            return _refusal(413, f"a body of at most {most:,} bytes is taken")
        if self.config.token is None or (method == "GET" and path in _PUBLIC):
            return self.app
        login = RequestBodyLimitMiddleware(self._take_token, _FORM_BYTES)
        if path == "/" and (method == "POST" or "token" in request.query_params):
            return login  # also with the cookie: the token goes out of the address
        if (
            path == "/api/health"
            and method == "GET"
            and not _BROWSERS.intersection(headers)
        ):
            return JSONResponse({"status": "ok"})  # for what watches over a container
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        cookie = request.cookies.get(f"{COOKIE}-{request.scope['server'][1]}", "")
        if self._is_right(cookie) or (
            scheme.lower() == "bearer" and self._is_right(bearer)
        ):
            return self.app
        return (
            login
            if path == "/"
            else _refusal(401, "a token is needed", {"www-authenticate": "Bearer"})
        )

    def _is_right(self, offered: str) -> bool:
        token = self.config.token
        return token is not None and hmac.compare_digest(
            offered.strip().encode(), token.encode()
        )

    async def _take_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes a token from the address or the form into a cookie."""
        request = Request(scope, receive)
        offered = request.query_params.get("token")
        if request.method == "POST":
            offered = parse_qs((await request.body()).decode("latin-1")).get(
                "token", [""]
            )[0]
        wrong = "" if offered is None else "That token is not right."
        answer: Response = HTMLResponse(
            self.login_page.replace("<!--wrong-->", wrong), 401
        )
        if offered is not None and self._is_right(offered):
            query = request.url.remove_query_params("token").query
            answer = RedirectResponse(f"/?{query}".rstrip("?"), 303)
            name = f"{COOKIE}-{scope['server'][1]}"
            answer.set_cookie(
                name, offered.strip(), _COOKIE_SECONDS, httponly=True, samesite="strict"
            )
        await answer(scope, receive, send)


def _refusal(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    return JSONResponse({"detail": message}, status, headers)


def listen(host: str, port: int, token: str | None) -> tuple[socket.socket, str]:
    """A socket, and the address to open; if it listens everywhere, one that other
    machines of the network reach.
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
    if elsewhere := _EVERYWHERE.get(name):
        name = "127.0.0.1"  # without a network
        with (
            contextlib.suppress(OSError),
            socket.socket(family, socket.SOCK_DGRAM) as probe,
        ):
            probe.connect((elsewhere, 9))  # sends nothing
            name = probe.getsockname()[0]
    name = {"127.0.0.1": "localhost"}.get(name, f"[{name}]" if ":" in name else name)
    return opened, f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def serve(index: Index, opened: socket.socket, config: ServeConfig) -> None:
    """Answers until SIGTERM; after Ctrl-C raises KeyboardInterrupt.

    A thread may still run: end the process.
    """
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # uvicorn hands the signal on to this at its end
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
