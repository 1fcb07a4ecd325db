"""The guard by itself, and uploads of strangers: refused in a line, and nothing of them
is kept.
"""

import hmac
import io
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image
from served_colours import web_of
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.serve.config import ServeConfig
from cloob.serve.guard import HEADERS, Guard
from cloob.serve.hosts import is_loopback
from make import picture
from support import read_json

TOKEN = "a-token-of-twenty-letters"


def client(base="http://localhost:8017", **options):
    async def app(scope, receive, send):
        body = await Request(scope, receive).body()
        await PlainTextResponse(f"{scope['path']} {len(body)}")(scope, receive, send)

    guard = Guard(app, ServeConfig(**options), "<form><!--wrong--></form>")
    return TestClient(guard, base_url=base, follow_redirects=False)


def code_of(web, headers, path="/api/x"):
    return web.get(path, headers=headers).status_code


def code_of_cookie(web, cookie):
    return code_of(web, {"cookie": cookie.encode()})


def upload(web, data, name="a.png"):
    return web.post("/api/uploads", files={"file": (name, data)})


def thumbnail(web, number):
    return web.get(f"/api/uploads/{number}/thumbnail")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.9.1", "[::1]", "a.localhost"],
)
def test_loopback(host):
    assert is_loopback(host)
    assert code_of(client(), {"host": f"{host}:99"}, "/x") == 200


def test_another_name_is_not_answered_on_loopback():
    """What DNS rebinding comes with."""
    names = (
        "evil.example localhost.evil.example 127.0.0.1.nip.io 0.0.0.0 10.0.0.1 [::2]"
        " [::1]evil 21307"
    )
    for host in ("", *names.split()):
        assert not is_loopback(host)
        for header in (host, f"{host}:8017"):
            answer = client().get("/x", headers={"host": header})
            assert answer.status_code == 421, header
            assert "localhost" in answer.json()["detail"], header


def test_every_answer_has_the_careful_headers():
    web = client()
    usual = web.get("/x")
    refused = web.get("/api/x", headers={"origin": "http://evil.example"})
    misdirected = web.get("/x", headers={"host": "evil.example"})
    for answer in (usual, refused, misdirected):
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        assert "server" not in answer.headers
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_other_sites_get_nothing_from_the_api():
    sites = [{"sec-fetch-site": site} for site in ("cross-site", "same-site")]
    origins = ("null", "http://localhost:1", "http://evil.example")
    sites += [{"origin": origin} for origin in origins]
    for headers in sites:
        assert client().post("/api/x", headers=headers).status_code == 403
    own = {"sec-fetch-site": "same-origin", "origin": "http://localhost:8017"}
    for headers in ({}, own, {"sec-fetch-site": "none"}):
        assert client().post("/api/x", headers=headers).status_code == 200


def test_without_the_token_nothing_but_the_form():
    web = client("http://10.0.0.5:8017", local=False, token=TOKEN)
    assert web.get("/api/health").json() == {"status": "ok"}
    bearers = ("Bearer wrong", f"Basic {TOKEN}", "Bearer ")
    wrong = [{"authorization": words} for words in bearers]
    cookies = ("cloob-token-8017=", "a=b; cloob-token-8017=wrong", "\x01;;==")
    wrong += [{"cookie": cookie} for cookie in cookies]
    for headers in ({}, *wrong):
        answer = web.get("/api/x", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert code_of(web, headers, "/page/main.js") == 401
    assert web.get("/page/base.css").status_code == 200
    assert web.post("/page/base.css").status_code == 401
    form = web.get("/")
    assert form.status_code == 401
    assert form.headers["content-type"].startswith("text/html")
    assert TOKEN not in form.text
    # an address is written down in too many places
    assert web.get(f"/api/x?token={TOKEN}").status_code == 401


def test_the_token_opens_by_bearer_address_and_form():
    web = client("http://10.0.0.5:8017", local=False, token=TOKEN)
    assert code_of(web, {"authorization": f"Bearer {TOKEN}"}) == 200
    form = f"token={TOKEN}"
    by_address = web.get(f"/?{form}&q=red")
    by_form = web.post("/?q=red", content=form)
    by_form_after_an_address = web.post("/?token=nearly&q=red", content=form)
    for answer in (by_address, by_form, by_form_after_an_address):
        assert answer.status_code == 303
        assert answer.headers["location"] == "/?q=red"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        web.cookies.clear()
        own, _, _ = cookie.partition(";")
        assert code_of_cookie(web, own) == 200
        assert code_of_cookie(web, f"cloob-token-8018=of-another; {own}") == 200
    web.cookies.clear()
    wrong = web.post("/", content="token=nearly")
    assert wrong.status_code == 401
    assert "not right" in wrong.text
    assert "set-cookie" not in wrong.headers
    # odd cookies of other programs
    own = f"cloob-token-8017={TOKEN}"
    for others in ('a={"b":1}', "a b", "über=1", "a=x=y", ""):
        assert code_of_cookie(web, f"{others}; {own}") == 200
        assert code_of_cookie(web, f"{own};{others}") == 200


def test_a_loopback_server_with_a_token_keeps_to_both():
    """The token does not open it to other names, nor a loopback name without it."""
    web = client(token=TOKEN)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert code_of(web, {}) == 401
    assert code_of(web, bearer) == 200
    assert code_of(web, bearer | {"host": "evil.example"}) == 421
    assert code_of(web, {"host": "evil.example"}, "/") == 421
    assert code_of(web, bearer | {"origin": "http://evil.example"}) == 403


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def watched(one, other):
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr("hmac.compare_digest", watched)
    web = client(token=TOKEN)
    for offered in (TOKEN, TOKEN[:-1], "é" * 9, ""):
        compared.clear()
        bearer = f"Bearer {offered}".encode()
        expected = 200 if offered == TOKEN else 401
        assert code_of(web, {"authorization": bearer}) == expected
        assert compared
        for pair in compared:
            assert len(pair) == 2


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (bytes(201_000), 413, "200,000 bytes"),
        (picture("red", (1200, 1000)), 413, "image too large"),
        (b"\xff\x0a" + bytes(90), 415, "JPEG XL: convert it"),
    ],
)
def test_an_upload_that_is_too_large_or_has_no_bound_is_refused(
    client, data, code, message
):
    answer = upload(client, data)
    assert answer.status_code == code
    assert message in answer.json()["detail"]


def test_only_a_clean_thumbnail_is_given_back(client):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    exif[0x0112] = 6
    drawn = Image.new("RGB", (500, 300), "blue")
    drawn.paste("red", (0, 0, 250, 300))
    drawn.save(stream, "JPEG", exif=exif, comment=b"a secret word")
    answer = upload(client, stream.getvalue(), "a.jpg").json()
    assert answer["width"] == 300
    assert answer["height"] == 500  # turned by a quarter
    small = thumbnail(client, answer["upload"])
    assert small.headers["content-type"] == "image/jpeg"
    assert b"secret" not in small.content
    image = Image.open(io.BytesIO(small.content))
    assert image.size == (154, 256)
    assert not image.getexif()
    red, _, _ = image.getpixel((80, 20))
    assert red > 200
    _, _, blue = image.getpixel((80, 230))
    assert blue > 200


def test_a_form_without_a_file_and_several_files(client):
    assert client.post("/api/uploads").status_code == 422
    assert client.post("/api/uploads", data={"file": "text"}).status_code == 422
    data = picture("red")
    many = [("file", (f"{i}.png", data)) for i in range(1200)]
    assert client.post("/api/uploads", files=many).status_code in (400, 413)


@pytest.mark.parametrize("bound", ["MAX_UPLOADS", "MAX_UPLOADS_BYTES"])
def test_those_used_longest_ago_are_forgotten(index, monkeypatch, bound):
    files = [picture(colour) for colour in ("red", "green", "blue")]
    of_two = {"MAX_UPLOADS": 2, "MAX_UPLOADS_BYTES": len(files[0]) * 2 + 9}
    monkeypatch.setattr(f"cloob.serve.uploads.{bound}", of_two[bound])
    with web_of(index) as client:
        held = []
        for data in files:
            answer = upload(client, data).json()
            held.append(answer["upload"])
            thumbnail(client, held[0])
        found = [thumbnail(client, number).status_code for number in held]
        assert found == [200, 404, 200]


FORM = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("path", "start", "kind"),
    [
        ("search", b"{", "application/json"),
        ("uploads", FORM, "multipart/form-data; boundary=x"),
    ],
)
def test_a_body_is_refused_by_what_it_says_and_by_what_it_is(client, path, start, kind):
    def long():
        yield start
        for _ in range(30):
            yield b" " * 60_000

    of_said_length = start + b" " * 1_100_000
    headers = {"content-type": kind}
    for content in (of_said_length, long()):
        answer = client.post(f"/api/{path}", content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["detail"]


@pytest.mark.parametrize(
    "path",
    [
        "page/../app.py", "page/%2e%2e/app.py", "page/..%2fapp.py", "page/%2fetc%2fpasswd", "page/__init__.py", "page/",
        "api/items/../../etc/passwd", "api/items/1%2f..%2f2/picture", "api/items/-1/picture", "api/items/1e3/picture",
        "api/items/99999999999999999999999/picture", "etc/passwd", "page/..%5capp.py",
        "api/uploads/..%2f..%2fx/thumbnail",
    ],
)  # fmt: skip
def test_no_path_leaves_the_index(client, path):
    answer = client.get(f"/{path}")
    assert answer.status_code in (404, 422), path
    assert "root:" not in answer.text
    assert "import" not in answer.text


RED = {"parts": [{"words": "red"}]}


def assert_names_no_place(index, answer, status, detail):
    assert answer.status_code == status
    assert detail in answer.json()["detail"]
    assert "secret" not in answer.text
    assert index.store.address not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("call", ["picture", "thumbnail"])
def test_a_picture_that_is_gone_names_no_place_on_this_machine(
    client, index, monkeypatch, call
):
    gone = FileNotFoundError(2, "No such file", "/secret/m")
    monkeypatch.setattr(Index, call, Mock(side_effect=gone))
    answer = client.get(f"/api/items/1/{call}")
    assert_names_no_place(index, answer, 404, "cloob index")


@pytest.mark.parametrize(
    ("kind", "status", "detail"),
    [
        (RuntimeError, 500, "the server failed"),
        (FileNotFoundError, 500, "the server failed"),
        (InputError, 400, "… is bad; …"),
    ],
)
def test_an_error_names_no_place_on_this_machine(
    client, index, caplog, monkeypatch, kind, status, detail
):
    error = kind(f"/secret/m is bad; {index.store.address}")
    for call, body in (("search", RED), ("classify", {"labels": ["red", "blue"]})):
        caplog.clear()
        monkeypatch.setattr(Index, call, Mock(side_effect=error))
        answer = client.post(f"/api/{call}", json=body)
        assert_names_no_place(index, answer, status, detail)
        assert "secret" in caplog.text


def test_a_full_disk_is_the_servers_fault(index, caplog, monkeypatch):
    # where a form above a megabyte is kept
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with web_of(index) as web:
        assert upload(web, bytes(1_500_000)).status_code == 500
        assert "a request failed" in caplog.text
        assert upload(web, picture("red")).status_code == 200


HOSTILE = read_json(Path(__file__).parents[1] / "search" / "hostile.json")


@pytest.mark.parametrize("where", [text for text in HOSTILE if 0 < len(text) < 9_000])
def test_a_filter_is_one_expression_over_http_too(client, where):
    filtered = {"where": where}
    classes = {"labels": ["red", "b"], **filtered}
    answers = [
        client.get(f"/api/{path}", params=filtered) for path in ("ids", "months")
    ]
    answers.append(client.post("/api/search", json=RED | {"cutoff": False} | filtered))
    answers.append(client.post("/api/classify", json=classes))
    for answer in answers:
        assert answer.status_code in (400, 422), answer.text[:200]
        assert answer.json().keys() == {"detail"}
        detail = answer.json()["detail"]
        assert detail
        assert "\n" not in detail
    left = client.get("/api/ids").json()["ids"]
    assert len(left) == 60, "nothing has changed"


LESS_RED = {"words": "red", "weight": -1}
MISTAKES = [
    ("search", RED | {"where": "width >"}, "filter"),
    ("search", {"parts": [{"words": "red"}, LESS_RED]}, "cancel"),
    ("search", {"parts": [{"words": " "}]}, "empty query"),
    ("classify", {"labels": ["red", "blue"], "where": "width > 99"}, "no picture"),
    ("classify", {"labels": ["red", "red"]}, "the label 'red' is there twice"),
]


@pytest.mark.parametrize(("path", "body", "said"), MISTAKES)
def test_what_the_asker_did_wrong_is_told(client, index, path, body, said):
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["detail"]
    assert str(index.store.address) not in answer.text
