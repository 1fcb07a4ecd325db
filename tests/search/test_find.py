"""Queries, and that an index answers what plain loops over its vectors give."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloob.errors import InputError
from cloob.search import find
from cloob.search.classify import LabelOptions
from cloob.search.query import Query, Term
from make import picture
from search_colours import DIM, ColourModel, make_index, open_index, write_pictures
from support import raises


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """An index of four shades of eight colours; the pictures lie in ``pictures`` beside
    it.
    """
    folder = tmp_path_factory.mktemp("coloured")
    return make_index(folder / "index", write_pictures(folder / "pictures"))


@pytest.fixture
def index(coloured):
    with open_index(coloured) as opened:
        yield opened


def all_rows(index):
    ids = index.store.ids().tolist()
    return ids, index.store.vectors(ids)


def stems(hits):
    return [Path(hit.item.path).stem for hit in hits]


def test_the_order_and_the_margins_are_those_of_a_loop(index):
    ids, rows = all_rows(index)
    row_of = dict(zip(ids, rows, strict=True))
    model = ColourModel()
    (blue,) = model.encode_text(["blue"]).numpy()
    background = Path(find.__file__).with_name("background.txt")
    lines = background.read_text(encoding="utf-8").splitlines()
    texts = model.encode_text(lines).double().numpy()
    found = index.search("blue", top=7, cutoff=None)
    nearest = sorted(ids, key=lambda id_: -float(row_of[id_] @ blue))
    assert [hit.item.id for hit in found.hits] == nearest[:7]
    for hit in found.hits:
        reached = texts @ row_of[hit.item.id]
        margin = (hit.score - reached.mean()) / reached.std()
        assert hit.margin == pytest.approx(margin, abs=1e-3)
    cutoff = found.hits[3].margin - 1e-4
    kept = index.search("blue", top=7, cutoff=cutoff)
    wanted = {hit.item.id for hit in found.hits if hit.margin >= cutoff}
    assert {hit.item.id for hit in kept.hits} == wanted
    assert len(kept.hits) + kept.cut == 7


def test_a_term_of_a_tiny_weight_alone_is_the_term(index):
    (tiny,) = index.search(Query((Term("red", 1e-320),)), top=1, cutoff=None).hits
    (whole,) = index.search("red", top=1, cutoff=None).hits
    assert tiny.item == whole.item
    assert tiny.margin == pytest.approx(whole.margin, abs=1e-4)


def test_what_fits_is_found_where_it_is_not_the_nearest(index):
    nearest, *others = index.search("cyan", top=32, cutoff=None).hits
    best = max(others, key=lambda hit: hit.margin)
    assert best.margin > nearest.margin + 0.01
    found = index.search("cyan", top=1, cutoff=best.margin - 1e-4)
    assert found.hits == (best,)
    assert found.cut == 1


def test_pictures_rows_and_mistakes(index, coloured):
    green = Image.open(coloured.parent / "pictures" / "green-1.png")
    assert stems(index.search(green, top=1).hits) == ["green-1"]
    (cyan,) = ColourModel().encode_text(["cyan"]).numpy()
    found = index.search(3 * cyan, top=4)
    assert {stem[:4] for stem in stems(found.hits)} == {"cyan"}
    assert found.hits[0].margin is None
    raises(InputError, "picture 999 is not in this index", index.similar, 999)
    nothing = np.zeros(DIM, np.float32)
    raises(InputError, "query of shape", index.search, nothing)
    raises(InputError, "at least one hit", index.search, "red", top=0)
    for query in (Query(()), Query((Term("red", 0),))):
        raises(InputError, "an empty query", index.search, query)


def test_an_upload_is_embedded_once_and_not_kept(index, monkeypatch):
    embedded = []
    model = ColourModel()
    encode = model.encode_image

    def watched(pictures):
        embedded.append(pictures)
        return encode(pictures)

    monkeypatch.setattr(model, "encode_image", watched)
    index.set_encoder(model)
    data = picture("red", (31, 17))
    holders = sys.getrefcount(data)
    for weight in (1.0, 2.0):
        assert index.search(Query((Term(data, weight),))).hits
    assert len(embedded) == 1
    assert sys.getrefcount(data) == holders


def test_a_query_is_compared_with_queries_of_its_shape(index, tmp_path):
    of_a_picture = Query((Term(1),))
    of_both = Query((Term("red"), Term(1, -0.5)))
    for query in (of_a_picture, of_both):
        for hit in index.search(query).hits:
            assert hit.margin is not None
    two = write_pictures(tmp_path / "pictures", n=2)  # too few to draw from
    few = make_index(tmp_path / "few", two)
    model = ColourModel()
    with open_index(few, model) as index:
        assert index.search(of_a_picture).hits[0].margin is None
        assert index.search("red").hits[0].margin is not None
    # those of the background were embedded before, for another index
    assert model.texts == ["red"]


TERMS = {
    "beach": Term("beach"),
    "+0.5:beach": Term("beach", 0.5),
    "16:9 film": Term("16:9 film"),
    "words:photo.jpg": Term("photo.jpg"),
    "-words:-people": Term("-people", -1.0),
}


def test_pictures_are_files_and_a_string_is_words(tmp_path):
    expected = {word: (term,) for word, term in TERMS.items()}
    assert {word: Query.parse([word]).terms for word in TERMS} == expected
    for name in ("a b.JPG", "bare"):
        path = tmp_path / name
        path.write_bytes(picture("red"))
        assert Query.parse([f"+0.5:{path}"]).terms == (Term(path, 0.5),)
        assert Query.of(path).terms == (Term(path),)
    for address in ("https://example.org/a", "https://example.org/a.jpg"):
        raises(InputError, "no such picture", Query.parse, [address])
    for text in ("photo.jpg", "/etc/passwd", "https://example.org", "-0.5:x"):
        assert Query.of(text).terms == (Term(text),)


def test_the_row_is_the_weighted_sum(index, coloured):
    model = ColourModel()
    path = coloured.parent / "pictures" / "red-0.png"
    blue, cyan = model.encode_text(["blue", "cyan"]).double().numpy()
    pixels = model.preprocess(Image.open(path))
    (red,) = model.encode_image(pixels[None]).double().numpy()
    (seven,) = index.store.vectors([7])
    typed = Query.parse(["blue", f"+0.5:{path}", "-0.25:cyan"])
    query = Query((*typed.terms, Term(7, 2.0)))
    expected = blue + 0.5 * red - 0.25 * cyan + 2 * seven
    expected /= np.linalg.norm(expected)
    for hit in index.search(query, cutoff=None).hits:
        assert hit.item.id != 7
        (row,) = index.store.vectors([hit.item.id])
        assert hit.score == pytest.approx(float(row @ expected), abs=1e-5)
    nothing = Query.parse(["red", "-red"])
    raises(InputError, "cancel each other", index.search, nothing)
    raises(InputError, "empty", index.search, Query.parse([]))


NAMES = ("red", "green", "blue")


def test_probabilities_are_the_softmax_at_the_models_temperature(coloured, tmp_path):
    model = ColourModel(inv_tau=12.0)
    pictures = coloured.parent / "pictures"
    index = open_index(make_index(tmp_path / "index", pictures, model), model)
    options = LabelOptions(templates=("{c}", "a thing of colour {c}"))
    labels = index.classify(NAMES, options)
    assert labels.inv_tau == 12.0
    assert not labels.by_default
    prompts = []
    for name in NAMES:
        texts = model.encode_text([name, f"a thing of colour {name}"])
        mean = texts.double().mean(0)
        prompts.append((mean / mean.norm()).numpy())
    ids = labels.ids.tolist()
    rows = index.store.vectors(ids)
    for place in (0, 7, 31):
        powers = [math.exp(12 * float(rows[place] @ prompt)) for prompt in prompts]
        expected = [power / sum(powers) for power in powers]
        found = labels.probabilities[place].tolist()
        assert found == pytest.approx(expected, abs=1e-5)
    for item, chosen in zip(index.items(ids), labels.chosen, strict=True):
        (place,) = chosen
        name, _, _ = Path(item.path).stem.partition("-")
        assert name not in NAMES or NAMES[place] == name
