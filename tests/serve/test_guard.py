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


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.9.1", "[::1]", "a.localhost"],
)
def test_loopback(host):
    assert is_loopback(host)
    assert client().get("/x", headers={"host": f"{host}:99"}).status_code == 200


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
            assert (
                answer.status_code == 421 and "localhost" in answer.json()["detail"]
            ), header


def test_every_answer_has_the_careful_headers():
    for path, headers in (
        ("/x", {}),
        ("/api/x", {"origin": "http://evil.example"}),
        ("/x", {"host": "evil.example"}),
    ):
        answer = client().get(path, headers=headers)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        assert "server" not in answer.headers
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_other_sites_get_nothing_from_the_api():
    sites = [{"sec-fetch-site": site} for site in ("cross-site", "same-site")]
    sites += [
        {"origin": origin}
        for origin in ("null", "http://localhost:1", "http://evil.example")
    ]
    for headers in sites:
        assert client().post("/api/x", headers=headers).status_code == 403
    own = {"sec-fetch-site": "same-origin", "origin": "http://localhost:8017"}
    for headers in ({}, own, {"sec-fetch-site": "none"}):
        assert client().post("/api/x", headers=headers).status_code == 200


def test_without_the_token_nothing_but_the_form():
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
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert web.get("/page/main.js", headers=headers).status_code == 401
        assert (
            web.get("/api/health", headers=headers).json() == {"status": "ok"}
            or headers
        )
    assert web.get("/page/base.css").status_code == 200
    assert web.post("/page/base.css").status_code == 401
    form = web.get("/")
    assert form.status_code == 401
    assert form.headers["content-type"].startswith("text/html")
    assert TOKEN not in form.text
    assert (
        web.get(f"/api/x?token={TOKEN}").status_code == 401
    )  # an address is written down in too many places


def test_the_token_opens_by_bearer_address_and_form():
    web = client("http://10.0.0.5:8017", local=False, token=TOKEN)
    assert (
        web.get("/api/x", headers={"authorization": f"Bearer {TOKEN}"}).status_code
        == 200
    )
    given = web.post("/?token=nearly&q=red", content=f"token={TOKEN}")
    for answer in (
        web.get(f"/?token={TOKEN}&q=red"),
        web.post("/?q=red", content=f"token={TOKEN}"),
        given,
    ):
        assert answer.status_code == 303
        assert answer.headers["location"] == "/?q=red"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        web.cookies.clear()
        for others in ("", "cloob-token-8018=of-another; "):
            assert (
                web.get(
                    "/api/x", headers={"cookie": others + cookie.partition(";")[0]}
                ).status_code
                == 200
            )
    web.cookies.clear()
    wrong = web.post("/", content="token=nearly")
    assert wrong.status_code == 401
    assert "not right" in wrong.text
    assert "set-cookie" not in wrong.headers
    for others in (
        'a={"b":1}',
        "a b",
        "über=1",
        "a=x=y",
        "",
    ):  # odd cookies of other programs
        for cookie in (
            f"{others}; cloob-token-8017={TOKEN}",
            f"cloob-token-8017={TOKEN};{others}",
        ):
            assert (
                web.get("/api/x", headers={"cookie": cookie.encode()}).status_code
                == 200
            )


def test_a_loopback_server_with_a_token_keeps_to_both():
    """The token does not open it to other names, nor a loopback name without it."""
    web = client(token=TOKEN)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert web.get("/api/x").status_code == 401
    assert web.get("/api/x", headers=bearer).status_code == 200
    other = {**bearer, "host": "evil.example"}
    assert web.get("/api/x", headers=other).status_code == 421
    assert web.get("/", headers={"host": "evil.example"}).status_code == 421
    foreign = {**bearer, "origin": "http://evil.example"}
    assert web.get("/api/x", headers=foreign).status_code == 403


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
        answer = web.get(
            "/api/x", headers={"authorization": f"Bearer {offered}".encode()}
        )
        assert answer.status_code == (200 if offered == TOKEN else 401)
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
    answer = client.post("/api/uploads", files={"file": ("a.png", data)})
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
    answer = client.post(
        "/api/uploads", files={"file": ("a.jpg", stream.getvalue())}
    ).json()
    assert answer["width"] == 300
    assert answer["height"] == 500  # turned by a quarter
    small = client.get(f"/api/uploads/{answer['upload']}/thumbnail")
    assert small.headers["content-type"] == "image/jpeg"
    assert b"secret" not in small.content
    image = Image.open(io.BytesIO(small.content))
    assert image.size == (154, 256)
    assert not image.getexif()
    assert image.getpixel((80, 20))[0] > 200
    assert image.getpixel((80, 230))[2] > 200


def test_a_form_without_a_file_and_several_files(client):
    assert client.post("/api/uploads").status_code == 422
    assert client.post("/api/uploads", data={"file": "text"}).status_code == 422
    many = [("file", (f"{i}.png", picture("red"))) for i in range(1200)]
    assert client.post("/api/uploads", files=many).status_code in (400, 413)


@pytest.mark.parametrize("bound", ["MAX_UPLOADS", "MAX_UPLOADS_BYTES"])
def test_those_used_longest_ago_are_forgotten(index, monkeypatch, bound):
    files = [picture(colour) for colour in ("red", "green", "blue")]
    monkeypatch.setattr(
        f"cloob.serve.uploads.{bound}",
        2 if bound == "MAX_UPLOADS" else len(files[0]) * 2 + 9,
    )
    with web_of(index) as client:
        held = []
        for data in files:
            held.append(
                client.post("/api/uploads", files={"file": ("a.png", data)}).json()[
                    "upload"
                ]
            )
            client.get(f"/api/uploads/{held[0]}/thumbnail")
        found = [
            client.get(f"/api/uploads/{upload}/thumbnail").status_code
            for upload in held
        ]
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

    for content in (
        start + b" " * 1_100_000,
        long(),
    ):  # of the latter no length is said
        answer = client.post(
            f"/api/{path}", content=content, headers={"content-type": kind}
        )
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


FAILURES = [
    (
        "picture",
        FileNotFoundError(2, "No such file", "/secret/m"),
        "items/1/picture",
        None,
        404,
        "cloob index",
    ),
    (
        "thumbnail",
        FileNotFoundError(2, "No such file", "/secret/m"),
        "items/1/thumbnail",
        None,
        404,
        "cloob index",
    ),
    (
        "search",
        RuntimeError("/secret/m"),
        "search",
        {"parts": [{"words": "red"}]},
        500,
        "the server failed",
    ),
    (
        "search",
        FileNotFoundError("/secret/m"),
        "search",
        {"parts": [{"words": "red"}]},
        500,
        "the server failed",
    ),
    (
        "search",
        InputError("/secret/m is bad"),
        "search",
        {"parts": [{"words": "red"}]},
        400,
        "… is bad",
    ),
    (
        "classify",
        InputError("/secret/m is bad; IDX"),
        "classify",
        {"labels": ["red", "blue"]},
        400,
        "… is bad; …",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "path", "body", "status", "detail"),
    FAILURES,
)
def test_an_error_names_no_place_on_this_machine(
    client, index, caplog, monkeypatch, call, error, path, body, status, detail
):
    error = type(error)(
        *(str(arg).replace("IDX", index.store.address) for arg in error.args)
    )
    monkeypatch.setattr(Index, call, Mock(side_effect=error))
    answer = (
        client.post(f"/api/{path}", json=body) if body else client.get(f"/api/{path}")
    )
    assert answer.status_code == status
    assert detail in answer.json()["detail"]
    assert "secret" not in answer.text
    assert index.store.address not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert status == 404 or "secret" in caplog.text


def test_a_full_disk_is_the_servers_fault(index, caplog, monkeypatch):
    monkeypatch.setattr(
        "tempfile.tempdir", "/nonexistent"
    )  # where a form above a megabyte is kept
    with web_of(index) as web:
        assert (
            web.post(
                "/api/uploads", files={"file": ("a.png", bytes(1_500_000))}
            ).status_code
            == 500
        )
        assert "a request failed" in caplog.text
        assert (
            web.post(
                "/api/uploads", files={"file": ("a.png", picture("red"))}
            ).status_code
            == 200
        )


HOSTILE = read_json(Path(__file__).parents[1] / "search" / "hostile.json")


@pytest.mark.parametrize("where", [text for text in HOSTILE if 0 < len(text) < 9_000])
def test_a_filter_is_one_expression_over_http_too(client, where):
    search = {"parts": [{"words": "red"}], "cutoff": False, "where": where}
    for answer in (
        client.get("/api/ids", params={"where": where}),
        client.get("/api/months", params={"where": where}),
        client.post("/api/search", json=search),
        client.post("/api/classify", json={"labels": ["red", "b"], "where": where}),
    ):
        assert answer.status_code in (400, 422), answer.text[:200]
        assert answer.json().keys() == {"detail"}
        assert answer.json()["detail"]
        assert "\n" not in answer.json()["detail"]
    assert len(client.get("/api/ids").json()["ids"]) == 60, "nothing has changed"


MISTAKES = [
    ("search", {"parts": [{"words": "red"}], "where": "width >"}, "filter"),
    (
        "search",
        {"parts": [{"words": "red"}, {"words": "red", "weight": -1}]},
        "cancel",
    ),
    ("search", {"parts": [{"words": " "}]}, "empty query"),
    ("classify", {"labels": ["red", "blue"], "where": "width > 99"}, "no picture"),
    ("classify", {"labels": ["red", "red"]}, "the label 'red' is there twice"),
]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    MISTAKES,
)
def test_what_the_asker_did_wrong_is_told(client, index, path, body, said):
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["detail"]
    assert str(index.store.address) not in answer.text
