"""Who may use the server: a guard around it, so that no route is forgotten.

A request is answered if it names a host of ours, comes from no other site, is not too
large, and shows the token: as ``Authorization: Bearer``, or as the cookie that the
printed address or the form sets.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloob.serve.config import ServeConfig
from cloob.serve.hosts import is_loopback

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
# What the form for the token is drawn with.
_PUBLIC = ("/page/base.css", "/page/icon.svg")
# Headers of those who have, or had, the token.
_BROWSERS = {"authorization", "cookie", "sec-fetch-site"}
_FORM_BYTES = 4096
_COOKIE_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class Guard:
    """Checks every request, and adds the headers that keep a browser careful."""

    app: ASGIApp
    config: ServeConfig
    login_page: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request itself or hands it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # As GET; uvicorn, which has the scope as it was, leaves the body out.
            scope = {**scope, "method": "GET"}
        is_page = scope["path"].startswith("/page/")
        caching = "no-cache" if is_page else "no-store"

        async def send_carefully(message: Message) -> None:
            """Sends a message, the headers of security added to the first one."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("cache-control", caching)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        answer = self._refuse(request) or self._answer(request)
        await answer(scope, receive, send_carefully)

    def _refuse(self, request: Request) -> Response | None:
        """Refuses what no token allows."""
        path, headers = request.scope["path"], request.headers
        host = headers.get("host", "")
        if self.config.local and not is_loopback(re.sub(r":\d*$", "", host)):
            why = "this server answers for localhost alone"
            return _refusal(421, f"{why}; cloob serve --host opens it to others")
        if path.startswith("/api/") and _is_foreign(headers, host):
            return _refusal(403, "this request comes from another site")
        limit = self.config.max_body_bytes
        if path == "/api/uploads":
            limit = self.config.max_upload_bytes
        if int(headers.get("content-length", 0)) > limit:  # FastAPI counts what comes
            return _refusal(413, f"a body of at most {limit:,} bytes is taken")
        return None

    def _answer(self, request: Request) -> ASGIApp:
        """What answers a request: the application, the form for the token, or 401."""
        path, method = request.scope["path"], request.method
        is_public = method == "GET" and path in _PUBLIC
        if self.config.token is None or is_public:
            return self.app
        if path == "/" and self._is_login(request):
            return RequestBodyLimitMiddleware(self._take_token, _FORM_BYTES)
        if self._has_token(request):
            return self.app
        if path == "/api/health" and not _BROWSERS.intersection(request.headers):
            return JSONResponse({"status": "ok"})  # for what watches over a container
        return _refusal(401, "a token is needed", {"www-authenticate": "Bearer"})

    def _is_login(self, request: Request) -> bool:
        """Whether a token comes, or is missing; one in the address has to go out of it
        also with the cookie.
        """
        brings_token = request.method == "POST" or "token" in request.query_params
        return brings_token or not self._has_token(request)

    def _has_token(self, request: Request) -> bool:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_right(bearer):
            return True
        return self._is_right(request.cookies.get(_cookie_name(request.scope), ""))

    def _is_right(self, offered: str) -> bool:
        """Compares a token with ours in a time that does not tell how much is right."""
        token = self.config.token or ""
        return hmac.compare_digest(offered.strip().encode(), token.encode())

    async def _take_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes a token from the address or the form into a cookie."""
        request = Request(scope, receive)
        offered = request.query_params.get("token")
        if request.method == "POST":
            form = parse_qs((await request.body()).decode("latin-1"))
            offered = form.get("token", [""])[0]
        answer: Response
        if offered is not None and self._is_right(offered):
            query = request.url.remove_query_params("token").query
            answer = RedirectResponse(f"/?{query}".rstrip("?"), 303)
            answer.set_cookie(
                _cookie_name(scope),
                offered.strip(),
                _COOKIE_SECONDS,
                httponly=True,
                samesite="strict",
            )
        else:
            wrong = "" if offered is None else "That token is not right."
            form_page = self.login_page.replace("<!--wrong-->", wrong)
            answer = HTMLResponse(form_page, 401)
        await answer(scope, receive, send)


def _cookie_name(scope: Scope) -> str:
    """Has the port: cookies know none, and two servers have two tokens."""
    return f"cloob-token-{scope['server'][1]}"


def _is_foreign(headers: Mapping[str, str], host: str) -> bool:
    """Whether a browser says that the request comes from a page of another site."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return True
    return "origin" in headers and headers["origin"].partition("://")[2] != host


def _refusal(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    return JSONResponse({"detail": message}, status, headers)
