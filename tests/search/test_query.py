"""Queries: how they are written, and the row that they make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloob.errors import InputError
from cloob.search.index import Index
from cloob.search.query import Query, Term
from make import picture, web
from search_colours import ColourModel


@pytest.mark.parametrize(
    ("word", "term"),
    [
        ("beach", Term("beach", "words")),
        ("+0.5:beach", Term("beach", "words", 0.5)),
        ("16:9 film", Term("16:9 film", "words")),
        ("+2:HTTP://example.org/a.jpg", Term("HTTP://example.org/a.jpg", "address", 2.0)),
        ("words:photo.jpg", Term("photo.jpg", "words")),
        ("-words:-people", Term("-people", "words", -1.0)),
    ],
)
def test_terms(word: str, term: Term) -> None:
    assert Query.parse([word]).terms == (term,)


def test_pictures_are_files_and_a_string_is_words(tmp_path: Path) -> None:
    for name in ("a b.JPG", "bare"):
        path = tmp_path / name
        path.write_bytes(picture("red"))
        assert Query.parse([f"+0.5:{path}"]).terms == (Term(path, "picture", 0.5),)
        assert Query.of(path).terms == (Term(path, "picture"),)
    for text in ("photo.jpg", "/etc/passwd", "https://example.org", "-0.5:x"):
        assert Query.of(text).terms == (Term(text, "words"),)


def test_the_row_is_the_weighted_sum(index: Index, coloured: Path) -> None:
    model, path = ColourModel(), coloured.parent / "pictures" / "red-0.png"
    blue, cyan = model.encode_text(["blue", "cyan"]).double().numpy()
    red = model.encode_image(model.preprocess(Image.open(path))[None]).double().numpy()[0]
    (seven,) = index.store.vectors("colours", [7])
    query = Query((*Query.parse(["blue", f"+0.5:{path}", "-0.25:cyan"]).terms, Term(7, "item", 2.0)))
    expected = blue + 0.5 * red - 0.25 * cyan + 2 * seven
    expected /= np.linalg.norm(expected)
    for hit in index.search(query, cutoff=None).hits:
        assert hit.item.id != 7
        assert hit.score == pytest.approx(float(index.store.vectors("colours", [hit.item.id])[0] @ expected), abs=1e-5)
    for terms, said in ((["red", "-red"], "cancel each other"), ([], "empty")):
        with pytest.raises(InputError, match=said):
            index.search(Query.parse(terms))


def test_addresses(index: Index) -> None:
    with web() as server:
        server.pages |= {"/red": picture("red"), "/page": b"<html>"}
        server.redirect("/on", "/red")
        for path in ("/red", "/on"):
            best = index.search(Query.parse([server.url + path]), top=1, cutoff=None).hits[0]
            assert Path(best.item.path).stem.startswith("red")
        for path, said in (("/page", "corrupt image"), ("/none", "no such file")):
            with pytest.raises(InputError, match=said):
                index.search(Query.parse([server.url + path]))
