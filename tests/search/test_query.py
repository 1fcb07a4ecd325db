"""Queries: how they are written, and the row that they make."""

from __future__ import annotations

import http.server
from pathlib import Path

import numpy as np
import pytest
from cloob.search.ask.by_torch import ByTorch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cloob.errors import InputError
from cloob.search import query as queries
from cloob.search.query import Query, Term, embed_query
from search_colours import ColourModel
from support import picture, served, serving


@pytest.mark.parametrize(
    ("word", "term"),
    [
        ("beach", Term("beach", "words")),
        ("a red bird", Term("a red bird", "words")),
        ("+beach", Term("beach", "words")),
        ("-people", Term("people", "words", -1.0)),
        ("+0.5:beach", Term("beach", "words", 0.5)),
        ("-.25:beach", Term("beach", "words", -0.25)),
        ("16:9 film", Term("16:9 film", "words")),
        ("https://example.org/a", Term("https://example.org/a", "address")),
        ("+2:HTTP://example.org/a.jpg", Term("HTTP://example.org/a.jpg", "address", 2.0)),
        ("words:photo.jpg", Term("photo.jpg", "words")),
        ("-words:-people", Term("-people", "words", -1.0)),
        ("note: this", Term("note: this", "words")),
    ],
)
def test_terms(word: str, term: Term) -> None:
    assert Query.parse([word]).terms == (term,)


def test_pictures_are_files(tmp_path: Path) -> None:
    path = tmp_path / "a b.JPG"
    path.write_bytes(picture("red"))
    assert Query.parse([f"+0.5:{path}"]).terms == (Term(path, "picture", 0.5),)
    bare = tmp_path / "bare"
    bare.write_bytes(picture("red"))
    assert Query.parse([str(bare)]).terms[0].kind == "picture"


@given(st.text())
def test_a_string_is_words_and_never_a_file_or_an_address(text: str) -> None:
    try:
        (term,) = Query.of(text).terms
    except InputError:
        assert not text.strip()
        return
    assert term.kind == "words" and term.weight == 1


def test_the_row_is_the_weighted_sum(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(picture("red"))
    model = ColourModel()
    item = np.eye(24, dtype=np.float32)[3]
    query = Query((*Query.parse(["blue", f"+0.5:{path}", "-0.25:cyan"]).terms, Term(7, "item", 2.0)))
    asked = []
    row = embed_query(query, ByTorch(model), lambda id_: asked.append(id_) or item)
    blue, cyan = model.encode_text(["blue", "cyan"]).double().numpy()
    red = model.encode_image(model.preprocess(Image.open(path))[None]).double().numpy()[0]
    expected = blue + 0.5 * red - 0.25 * cyan + 2 * item
    np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-6)
    assert row.dtype == np.float32 and asked == [7]


def test_an_opened_picture_and_pictures_alone_need_no_words() -> None:
    model = ColourModel()
    row = embed_query(Query.of(Image.new("RGB", (9, 9), "red")), ByTorch(model))
    assert float(row @ model.encode_text(["red"]).numpy()[0]) > 0.9
    assert not Query((Term(7, "item"),)).needs_model


def test_terms_that_cancel_are_refused() -> None:
    with pytest.raises(InputError, match="cancel each other"):
        embed_query(Query.parse(["red", "-red"]), ByTorch(ColourModel()))
    with pytest.raises(InputError, match="an empty query"):
        embed_query(Query(()), ByTorch(ColourModel()))


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = {"/away": "file:///etc/passwd", "/on": "/red", "/ftp": "ftp://127.0.0.1/a"}.get(self.path)
        if where:
            self.send_response(302)
            self.send_header("Location", where)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = {"/red": picture("red"), "/large": b"x" * 5000, "/page": b"<html>"}.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        pass


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "MAX_ADDRESS_BYTES", 4000)
    monkeypatch.setattr("cloob.data.shards.fetch._PAUSES", (0.0, 0.0))
    model = ColourModel()
    with served(serving(Server)) as address:
        for path in ("/red", "/on"):
            row = embed_query(Query.parse([address + path]), ByTorch(model))
            assert float(row @ model.encode_text(["red"]).numpy()[0]) > 0.9
        for path, said in (
            ("/away", "/away: "),
            ("/ftp", "/ftp: "),
            ("/large", "at most 4,000 are read"),
            ("/page", "corrupt image"),
            ("/none", "no such file"),
        ):
            with pytest.raises(InputError, match=said):
                embed_query(Query.parse([address + path]), ByTorch(model))
