"""Uploads of strangers: bombs, lies and noise are refused in a line, and nothing of them is kept."""

from __future__ import annotations

import asyncio
import io
import json
import os
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.records import Item
from cloob.serve import collection
from cloob.serve.api import schemas
from cloob.serve.app import make_app
from cloob.serve.settings import ServeConfig
from cloob.serve.uploads import Upload, Uploads, decode_upload, thumbnail
from support import picture


def png_header(width: int, height: int, between: bytes = b"") -> bytes:
    """A PNG that says it has so many pixels, and has none."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + between
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


def noise(n: int) -> bytes:
    return np.random.default_rng(0).bytes(n)


def send(client: TestClient, data: bytes, name: str = "a.png") -> tuple[int, str]:
    answer = client.post("/api/uploads", files={"file": (name, data, "image/png")})
    return answer.status_code, answer.json().get("detail", "")


@pytest.mark.parametrize("data", [noise(201_000), png_header(5000, 5000)])
def test_what_is_too_large_is_refused(client: TestClient, data: bytes) -> None:
    code, said = send(client, data)
    assert code == 413 and said and "\n" not in said


def test_a_large_jpeg_is_decoded_smaller(index: Index) -> None:
    stream = io.BytesIO()
    Image.new("L", (9000, 8000), 90).save(stream, "JPEG")
    with TestClient(make_app(index, ServeConfig()), base_url="http://localhost") as client:
        assert send(client, stream.getvalue(), "a.jpg")[0] == 200
        stream = io.BytesIO()
        Image.new("1", (9000, 8000)).save(stream, "PNG")
        assert send(client, stream.getvalue())[0] == 413


def test_only_a_clean_thumbnail_is_given_back(client: TestClient) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    Image.new("RGB", (500, 300), "red").save(stream, "JPEG", exif=exif, comment=b"a secret word")
    answer = client.post("/api/uploads", files={"file": ("a.jpg", stream.getvalue())}).json()
    assert (answer["width"], answer["height"]) == (500, 300)
    small = client.get(f"/api/uploads/{answer['upload']}/thumbnail")
    assert small.headers["content-type"] == "image/jpeg" and b"secret" not in small.content
    assert max(Image.open(io.BytesIO(small.content)).size) == 256


def test_a_form_without_a_file_and_several_files(client: TestClient) -> None:
    assert client.post("/api/uploads").status_code == 422
    assert client.post("/api/uploads", data={"file": "text"}).status_code == 422
    many = [("file", (f"{i}.png", picture("red"))) for i in range(1200)]
    assert client.post("/api/uploads", files=many).status_code in (400, 413)


def test_two_uploads_are_decoded_at_a_time_and_too_many_are_refused(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, held, most = threading.Lock(), 0, 0

    def decode(data: bytes, config: ServeConfig) -> Image.Image:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return decode_upload(data, config)

    def small(image: Image.Image) -> bytes:  # the last that a picture is needed for
        nonlocal held
        made = thumbnail(image)
        with lock:
            held -= 1
        return made

    async def together() -> list[int]:
        transport = httpx.ASGITransport(app=make_app(index, ServeConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
            files = [{"file": ("a.png", picture((number, 0, 0)))} for number in range(12)]
            answers = await asyncio.gather(*(web.post("/api/uploads", files=file) for file in files))
            return [answer.status_code for answer in answers]

    monkeypatch.setattr(collection, "decode_upload", decode)
    monkeypatch.setattr(collection, "thumbnail", small)
    assert asyncio.run(together()) == [200] * 12 and most <= 2
    monkeypatch.setattr(collection, "_UPLOADS_WAITING", 0)
    assert asyncio.run(together()) == [503] * 12


def test_those_used_longest_ago_are_forgotten() -> None:
    uploads = Uploads(2)
    for name in "abc":
        uploads.add(Upload(name, 1, 1, b"", {}))
        uploads.get("a")
    assert len(uploads) == 2 and uploads.get("a") and uploads.get("c") and uploads.get("b") is None


@pytest.mark.parametrize(
    "path",
    [
        "page/../app.py", "page/%2e%2e/app.py", "page/..%2fapp.py", "page/%2fetc%2fpasswd", "page/__init__.py", "page/",
        "api/items/../../etc/passwd", "api/items/1%2f..%2f2/picture", "api/items/-1/picture", "api/items/1e3/picture",
        "api/items/99999999999999999999999/picture", "etc/passwd", "page/..%5capp.py",
        "api/uploads/..%2f..%2fx/thumbnail",
    ],
)  # fmt: skip
def test_no_path_leaves_the_index(client: TestClient, path: str) -> None:
    answer = client.get(f"/{path}")
    assert answer.status_code in (404, 422), path
    assert "root:" not in answer.text and "import" not in answer.text


class Faulty:
    """An index of which some work fails."""

    def __init__(self, index: Index, error: Exception, *names: str, **facts: object) -> None:
        self.index, self.error, self.names = index, error, names
        self.__dict__ |= facts

    def __getattr__(self, name: str) -> object:
        return self.fail if name in self.names else getattr(self.index, name)

    def __len__(self) -> int:
        return len(self.index)

    def fail(self, *_: object, **__: object) -> None:
        raise self.error


def web_of(index: Index | Faulty, **config: bool) -> TestClient:
    app = make_app(index, ServeConfig(**config))  # type: ignore[arg-type]
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def test_a_file_that_is_gone_is_said_without_its_path(index: Index) -> None:
    gone = FileNotFoundError(2, "No such file", "/secret/a.png")
    with web_of(Faulty(index, gone, "picture", "thumbnail")) as web:
        for kind in ("picture", "thumbnail"):
            answer = web.get(f"/api/items/1/{kind}")
            assert answer.status_code == 404 and "secret" not in answer.text and "cloob index" in answer.text


def test_our_own_faults_are_told_to_nobody(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    with web_of(Faulty(index, RuntimeError("/secret/place"), "search")) as web:
        answer = web.post("/api/search", json={"parts": [{"words": "red"}]})
    assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret" in caplog.text


@pytest.mark.parametrize("form", ["{}", "{}:best", "local-dir:{}"])
def test_a_model_that_is_gone_is_said_without_its_path(index: Index, form: str) -> None:
    gone = replace(index.models[0], spec=form.format("/secret/m"))
    error = InputError(f"/secret/m: no such folder; {gone.spec} names none in /secret/m/checkpoints")
    with web_of(Faulty(index, error, "search", models=(gone,))) as web:
        answer = web.post("/api/search", json={"parts": [{"words": "red"}]})
    said = f"{gone.name}: no such folder; {gone.name} names none in {gone.name}/checkpoints"
    assert answer.status_code == 400 and said in answer.text


def test_beyond_this_machine_no_whole_path_is_told(index: Index, pictures: Path) -> None:
    for local in (True, False):
        with web_of(index, local=local) as web:
            answer = web.get("/api/items/1")
            assert (str(pictures) in answer.text) is local
            assert answer.json()["path"].endswith(answer.json()["name"])


@pytest.mark.parametrize(
    ("source", "path", "told"),
    [
        ("/data/photos", "/data/photos/sub/a.png", "sub/a.png"),
        ("/data/list.csv", "/home/me/photos/a.png", "a.png"),
        ("/data/{0..1}.tar", "/data/0.tar::sub/a.png", "a.png"),
        ("s3://bucket/{0..1}.tar", "0.tar::a.png", "a.png"),
        ("/data/p", os.fsdecode(b"/data/p/caf\xe9.png"), "caf\N{REPLACEMENT CHARACTER}.png"),
    ],
)
def test_what_is_told_of_a_path(source: str, path: str, told: str) -> None:
    item = Item(1, source, path, "0" * 64, 1, None, 1, 1, None, "cut \ud83d", {"x\ud83d": "\udce9"})
    said = schemas.picture(item, whole_path=False)
    assert said["path"] == told
    json.dumps([said, schemas.picture(item, whole_path=True)], ensure_ascii=False).encode()


def test_whole_numbers_that_javascript_would_round_are_text() -> None:
    columns = {"ean": 12345678901234567, "least": -(2**53) - 1, "exact": 2**53, "yes": True, "x": 1e300, "none": None}
    said = schemas.picture(Item(1, "s", "a.png", "0" * 64, 1, None, 1, 1, columns=columns), whole_path=False)["columns"]
    assert said == columns | {"ean": "12345678901234567", "least": "-9007199254740993"}
