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
    model = ColourModel()
    (row,) = model.encode_text(["blue"]).numpy()
    lines = (
        Path(find.__file__)
        .with_name("background.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    texts = model.encode_text(lines).double().numpy()
    scores = {id_: float(r @ row) for id_, r in zip(ids, rows, strict=True)}
    found = index.search("blue", top=7, cutoff=None)
    expected = sorted(ids, key=lambda id_: -scores[id_])[:7]
    assert [hit.item.id for hit in found.hits] == expected
    for hit in found.hits:
        reached = [float(text @ rows[ids.index(hit.item.id)]) for text in texts]
        mean = sum(reached) / len(reached)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in reached) / len(reached))
        assert hit.margin == pytest.approx((hit.score - mean) / deviation, abs=1e-3)
    cutoff = found.hits[3].margin - 1e-4
    kept = index.search("blue", top=7, cutoff=cutoff)
    wanted = {hit.item.id for hit in found.hits if hit.margin >= cutoff}
    assert {hit.item.id for hit in kept.hits} == wanted
    tiny = index.search(Query((Term("red", 1e-320),)), top=1, cutoff=None).hits[0]
    whole = index.search("red", top=1, cutoff=None).hits[0]
    assert tiny.item == whole.item
    assert tiny.margin == pytest.approx(whole.margin, abs=1e-4)
    assert len(kept.hits) + kept.cut == 7


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
    found = index.search(ColourModel().encode_text(["cyan"]).numpy()[0] * 3, top=4)
    assert {stem[:4] for stem in stems(found.hits)} == {"cyan"}
    assert found.hits[0].margin is None
    with pytest.raises(InputError, match="picture 999 is not in this index"):
        index.similar(999)
    with pytest.raises(InputError, match="query of shape"):
        index.search(np.zeros(DIM, np.float32))
    with pytest.raises(InputError, match="at least one hit"):
        index.search("red", top=0)
    for query in (Query(()), Query((Term("red", 0),))):
        with pytest.raises(InputError, match="an empty query"):
            index.search(query)


def test_an_upload_is_embedded_once_and_not_kept(index, monkeypatch):
    embedded = []
    model = ColourModel()
    encode = model.encode_image
    monkeypatch.setattr(
        model, "encode_image", lambda x: embedded.append(x) or encode(x)
    )
    index.set_encoder(model)
    data = picture("red", (31, 17))
    holders = sys.getrefcount(data)
    for weight in (1.0, 2.0):
        assert index.search(Query((Term(data, weight),))).hits
    assert len(embedded) == 1
    assert sys.getrefcount(data) == holders


def test_a_query_is_compared_with_queries_of_its_shape(index, tmp_path):
    for query in (
        Query((Term(1),)),
        Query((Term("red"), Term(1, -0.5))),
    ):
        for hit in index.search(query).hits:
            assert hit.margin is not None
    few = make_index(
        tmp_path / "few", write_pictures(tmp_path / "pictures", n=2)
    )  # too few to draw from
    model = ColourModel()
    with open_index(few, model) as index:
        assert index.search(Query((Term(1),))).hits[0].margin is None
        assert index.search("red").hits[0].margin is not None
    assert model.texts == [
        "red"
    ]  # those of the background were embedded before, for another index


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
        with pytest.raises(InputError, match="no such picture"):
            Query.parse([address])
    for text in ("photo.jpg", "/etc/passwd", "https://example.org", "-0.5:x"):
        assert Query.of(text).terms == (Term(text),)


def test_the_row_is_the_weighted_sum(index, coloured):
    model = ColourModel()
    path = coloured.parent / "pictures" / "red-0.png"
    blue, cyan = model.encode_text(["blue", "cyan"]).double().numpy()
    red = (
        model.encode_image(model.preprocess(Image.open(path))[None]).double().numpy()[0]
    )
    (seven,) = index.store.vectors([7])
    query = Query(
        (
            *Query.parse(["blue", f"+0.5:{path}", "-0.25:cyan"]).terms,
            Term(7, 2.0),
        )
    )
    expected = blue + 0.5 * red - 0.25 * cyan + 2 * seven
    expected /= np.linalg.norm(expected)
    for hit in index.search(query, cutoff=None).hits:
        assert hit.item.id != 7
        wanted = float(index.store.vectors([hit.item.id])[0] @ expected)
        assert hit.score == pytest.approx(wanted, abs=1e-5)
    for terms, said in ((["red", "-red"], "cancel each other"), ([], "empty")):
        with pytest.raises(InputError, match=said):
            index.search(Query.parse(terms))


NAMES = ("red", "green", "blue")


def test_probabilities_are_the_softmax_at_the_models_temperature(coloured, tmp_path):
    model = ColourModel(inv_tau=12.0)
    pictures = coloured.parent / "pictures"
    index = open_index(make_index(tmp_path / "index", pictures, model), model)
    labels = index.classify(
        NAMES, LabelOptions(templates=("{c}", "a thing of colour {c}"))
    )
    assert labels.inv_tau == 12.0
    assert not labels.by_default
    prompts = {
        name: model.encode_text([name, f"a thing of colour {name}"]).double().mean(0)
        for name in NAMES
    }
    rows = index.store.vectors(labels.ids.tolist())
    for place in (0, 7, 31):
        powers = [
            math.exp(12 * float(rows[place] @ (prompts[n] / prompts[n].norm()).numpy()))
            for n in NAMES
        ]
        expected = [p / sum(powers) for p in powers]
        assert labels.probabilities[place].tolist() == pytest.approx(expected, abs=1e-5)
    for item, chosen in zip(
        index.items(labels.ids.tolist()), labels.chosen, strict=True
    ):
        name = Path(item.path).stem.split("-")[0]
        assert len(chosen) == 1
        assert name not in NAMES or NAMES[chosen[0]] == name
