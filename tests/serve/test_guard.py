"""The guard by itself: host, origin, token, sizes and headers, around an application that answers everything."""

from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from cloob.serve.guard import HEADERS, Guard, ServeConfig, is_loopback

TOKEN = "a-token-of-twenty-letters"


def client(base: str = "http://localhost:8017", **options: Any) -> TestClient:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        await PlainTextResponse(f"{scope['path']} {len(body)}")(scope, receive, send)

    guard = Guard(app, ServeConfig(**options), "<form><!--wrong--></form>")
    return TestClient(guard, base_url=base, follow_redirects=False)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.9.1", "[::1]", "a.localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert client().get("/x", headers={"host": f"{host}:99"}).status_code == 200


OTHERS = ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0", "10.0.0.1", "[::2]", "[::1]evil"]


@pytest.mark.parametrize("host", [*OTHERS, "", "21307"])
def test_another_name_is_not_answered_on_loopback(host: str) -> None:
    """What DNS rebinding comes with."""
    assert not is_loopback(host)
    for header in (host, f"{host}:8017"):
        answer = client().get("/x", headers={"host": header})
        assert answer.status_code == 421 and "localhost" in answer.json()["detail"]


def test_every_answer_has_the_careful_headers() -> None:
    for path, headers in (("/x", {}), ("/api/x", {"origin": "http://evil.example"}), ("/x", {"host": "evil.example"})):
        answer = client().get(path, headers=headers)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        assert "server" not in answer.headers
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_other_sites_get_nothing_from_the_api() -> None:
    sites = [{"sec-fetch-site": site} for site in ("cross-site", "same-site")]
    sites += [{"origin": origin} for origin in ("null", "http://localhost:1", "http://evil.example")]
    for headers in sites:
        assert client().post("/api/x", headers=headers).status_code == 403
    own = {"sec-fetch-site": "same-origin", "origin": "http://localhost:8017"}
    for headers in ({}, own, {"sec-fetch-site": "none"}):
        assert client().post("/api/x", headers=headers).status_code == 200


def test_without_the_token_nothing_but_the_form() -> None:
    web = client("http://10.0.0.5:8017", local=False, token=TOKEN)
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer "},
        {"cookie": "cloob-token-8017="},
        {"cookie": "a=b; cloob-token-8017=wrong"},
        {"cookie": "\x01;;=="},
    ):
        answer = web.get("/api/x", headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert web.get("/page/main.js", headers=headers).status_code == 401
        assert web.get("/api/health", headers=headers).json() == {"status": "ok"} or headers
    assert web.get("/page/base.css").status_code == 200 and web.post("/page/base.css").status_code == 401
    form = web.get("/")
    assert form.status_code == 401 and form.headers["content-type"].startswith("text/html") and TOKEN not in form.text
    assert web.get(f"/api/x?token={TOKEN}").status_code == 401  # an address is written down in too many places


def test_the_token_opens_by_bearer_address_and_form() -> None:
    web = client("http://10.0.0.5:8017", local=False, token=TOKEN)
    assert web.get("/api/x", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    given = web.post("/?token=nearly&q=red", content=f"token={TOKEN}")
    for answer in (web.get(f"/?token={TOKEN}&q=red"), web.post("/?q=red", content=f"token={TOKEN}"), given):
        assert answer.status_code == 303 and answer.headers["location"] == "/?q=red"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        web.cookies.clear()
        assert web.get("/api/x", headers={"cookie": cookie.partition(";")[0]}).status_code == 200
        assert web.get(
            "/api/x", headers={"cookie": f"cloob-token-8018=of-another; {cookie.partition(';')[0]}"}
        ).is_success
    web.cookies.clear()
    wrong = web.post("/", content="token=nearly")
    assert wrong.status_code == 401 and "not right" in wrong.text and "set-cookie" not in wrong.headers
    for others in ('a={"b":1}', "a b", "über=1", "a=x=y", ""):  # odd cookies of other programs
        for cookie in (f"{others}; cloob-token-8017={TOKEN}", f"cloob-token-8017={TOKEN};{others}"):
            assert web.get("/api/x", headers={"cookie": cookie.encode()}).status_code == 200
