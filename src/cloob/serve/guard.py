"""Who may ask, and what every answer says: around the whole application, so that no route can be forgotten."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Mapping
from urllib.parse import parse_qs, urlencode

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloob.serve.settings import ServeConfig

COOKIE = "cloob-token"
UPLOADS = "/api/uploads"
_PUBLIC = ("/page/base.css", "/page/icon.svg")  # what the form for the token is drawn with
_MULTIPART_ROOM = 4096  # what multipart/form-data writes around one file

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
    """Checks host, origin, token and size of each request, and adds the headers that keep a browser careful."""

    def __init__(self, app: ASGIApp, config: ServeConfig, login_page: bytes) -> None:
        self._app = app
        self._config = config
        self._login_page = login_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request itself or hands it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; uvicorn, which has the scope as it was, leaves the body out
            scope = {**scope, "method": "GET"}
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        careful = _with_headers(send, scope["path"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(careful, *refusal)
            return
        public = scope["method"] == "GET" and scope["path"] in _PUBLIC
        if self._config.token is not None and not public and (_offers_token(scope) or not self._known(headers)):
            await self._ask(scope, receive, careful)
            return
        await self._within_limit(scope, headers, receive, careful)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        if self._config.local and not is_loopback(_host(headers.get("host", ""))):
            return 421, "this server answers for localhost alone; cloob serve --host opens it to others"
        if scope["path"].startswith("/api/"):
            site = headers.get("sec-fetch-site", "none")
            origin = headers.get("origin")
            foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
            if site not in ("same-origin", "none") or foreign:
                return 403, "asked for by another site"
        return None

    def _known(self, headers: Mapping[str, str]) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        offered = [value.strip()] if scheme.lower() == "bearer" else []
        for cookie in headers.get("cookie", "").split(";"):  # SimpleCookie stops at the first one that is odd
            name, _, value = cookie.partition("=")
            if name.strip() == COOKIE:
                offered.append(value.strip())
        return any(self._right(token) for token in offered)

    def _right(self, offered: str) -> bool:
        assert self._config.token is not None
        return hmac.compare_digest(offered.encode(), self._config.token.encode())

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes a token from the address or the form into a cookie; answers everything else 401."""
        path, method = scope["path"], scope["method"]
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        offered = query.pop("token", [None])[0] if path == "/" else None
        if path == "/" and method == "POST":
            form = await _whole(receive, 4096)
            offered = parse_qs((form or b"").decode("latin-1")).get("token", [""])[0].strip()
        if offered is not None and self._right(offered):
            rest = urlencode(query, doseq=True)
            cookie = f"{COOKIE}={offered}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
            more = [(b"location", f"/?{rest}".rstrip("?").encode()), (b"set-cookie", cookie.encode())]
            await _answer(send, 303, "", more)
        elif path == "/":
            page = self._login_page.replace(
                b"<!--wrong-->", b"That token is not right." if offered is not None else b""
            )
            await _answer(send, 401, page, [(b"content-type", b"text/html; charset=utf-8")])
        else:
            await _answer(send, 401, "a token is wanted", [(b"www-authenticate", b"Bearer")])

    async def _within_limit(self, scope: Scope, headers: Mapping[str, str], receive: Receive, send: Send) -> None:
        uploads = scope["path"] == UPLOADS
        limit = self._config.max_upload_bytes + _MULTIPART_ROOM if uploads else self._config.max_body_bytes
        said = headers.get("content-length", "0")
        body = await _whole(receive, limit) if said.isdecimal() and int(said) <= limit else None
        if body is None:
            await _answer(send, 413, f"a body of at most {limit:,} bytes is taken")
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body}

        await self._app(scope, again, send)


def _offers_token(scope: Scope) -> bool:
    """Whether the address or the form brings a token, which then goes into a cookie and out of the address."""
    return scope["path"] == "/" and (scope["method"] == "POST" or b"token=" in scope["query_string"])


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    return header.rpartition(":")[0] if ":" in header.rpartition("]")[2] else header


async def _whole(receive: Receive, limit: int) -> bytes | None:
    """A request's body; None where it is longer or the client leaves."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or len(body) > limit:
            return None
        more = message.get("more_body", False)
    return bytes(body)


def _with_headers(send: Send, path: str) -> Send:
    async def careful(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            every = dict(HEADERS)
            if path.startswith("/api/") or path == "/":
                every["cache-control"] = "no-store"  # a route may say otherwise
            headers += [
                (name.encode(), value.encode()) for name, value in every.items() if name.encode() not in present
            ]
            message = {**message, "headers": headers}
        await send(message)

    return careful


async def _answer(send: Send, status: int, said: str | bytes, more: list[tuple[bytes, bytes]] | None = None) -> None:
    """A whole answer: of a text the JSON that all our errors are."""
    body = said if isinstance(said, bytes) else json.dumps({"detail": said}).encode()
    headers = list(more or [])
    if not any(name == b"content-type" for name, _ in headers):
        headers.append((b"content-type", b"application/json"))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
