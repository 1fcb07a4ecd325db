"""Access, limits and headers: around the application, so that no route is forgotten."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "cloob-token"  # and the port: cookies know none, and two servers on one machine have two tokens
HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_PUBLIC = ("/page/base.css", "/page/icon.svg")  # what the form for the token is drawn with
_BROWSERS = {"authorization", "cookie", "sec-fetch-site"}  # headers of who has, or had, the token
_FORM_BYTES = 4096
_COOKIE_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class ServeConfig:
    """Access and limits."""

    token: str | None = None  # what a request must show as bearer or cookie; None where whoever reaches us may ask
    local: bool = True  # only requests for a loopback name are answered, against DNS rebinding; full paths are shown
    max_upload_bytes: int = 20_000_000  # of the form with a file
    max_upload_pixels: int = 64_000_000  # by its header, before anything is decoded
    max_body_bytes: int = 1_000_000  # of a request that uploads nothing


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches this machine alone."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guard:
    """Checks host, origin and token of every request, and adds the headers that keep a browser careful."""

    def __init__(self, app: ASGIApp, config: ServeConfig, login_page: str) -> None:
        self._app, self._config, self._login_page = app, config, login_page
        self._login = RequestBodyLimitMiddleware(self._take_token, _FORM_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request itself or hands it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; uvicorn, which has the scope as it was, leaves the body out
            scope = {**scope, "method": "GET"}

        async def careful(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                page = scope["path"].startswith("/page/")
                for name, value in {**HEADERS, "cache-control": "no-cache" if page else "no-store"}.items():
                    headers.setdefault(name, value)  # a route may set another
            await send(message)

        await self._who_answers(Request(scope))(scope, receive, careful)

    def _who_answers(self, request: Request) -> ASGIApp:
        path, method, headers = request.scope["path"], request.method, request.headers
        host = headers.get("host", "")
        if self._config.local and not is_loopback(re.sub(r":\d*$", "", host)):
            return _refusal(421, "this server answers for localhost alone; cloob serve --host opens it to others")
        if path.startswith("/api/"):
            foreign = "origin" in headers and headers["origin"].partition("://")[2] != host
            if foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                return _refusal(403, "this request comes from another site")
        most = self._config.max_upload_bytes if path == "/api/uploads" else self._config.max_body_bytes
        if int(headers.get("content-length", 0)) > most:  # FastAPI counts what comes
            return _refusal(413, f"a body of at most {most:,} bytes is taken")
        if self._config.token is None or (method == "GET" and path in _PUBLIC):
            return self._app
        if path == "/" and (method == "POST" or "token" in request.query_params):
            return self._login  # also with the cookie: the token goes out of the address
        if path == "/api/health" and method == "GET" and not _BROWSERS.intersection(headers):
            return JSONResponse({"status": "ok"})  # for what watches over a container
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if self._is_right(request.cookies.get(_cookie(request), "")) or (
            scheme.lower() == "bearer" and self._is_right(bearer)
        ):
            return self._app
        return self._login if path == "/" else _refusal(401, "a token is needed", {"www-authenticate": "Bearer"})

    def _is_right(self, offered: str) -> bool:
        token = self._config.token
        return token is not None and hmac.compare_digest(offered.strip().encode(), token.encode())

    async def _take_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes a token from the address or the form into a cookie."""
        request = Request(scope, receive)
        offered = request.query_params.get("token")
        if request.method == "POST":
            offered = parse_qs((await request.body()).decode("latin-1")).get("token", [""])[0]
        wrong = "" if offered is None else "That token is not right."
        answer: Response = HTMLResponse(self._login_page.replace("<!--wrong-->", wrong), 401)
        if offered is not None and self._is_right(offered):
            query = request.url.remove_query_params("token").query
            answer = RedirectResponse(f"/?{query}".rstrip("?"), 303)
            answer.set_cookie(_cookie(request), offered.strip(), _COOKIE_SECONDS, httponly=True, samesite="strict")
        await answer(scope, receive, send)


def _cookie(request: Request) -> str:
    return f"{COOKIE}-{(request.scope.get('server') or ('', 0))[1]}"


def _refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"detail": message}, status, headers)
