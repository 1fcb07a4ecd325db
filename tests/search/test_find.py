"""What an index answers is what plain loops over its vectors say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from cloob.search.ask.by_torch import ByTorch
from PIL import Image

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.search import background
from cloob.search.index import Index
from cloob.search.query import Query, Term
from cloob.search.records import IndexedModel, Item
from search_colours import COLOURS, DIM, ColourModel, open_index


def all_rows(index: Index) -> tuple[list[int], np.ndarray]:
    ids = index.store.ids().tolist()
    return ids, index.store.vectors("colours", ids)


def names(index_results: object) -> list[str]:
    return [Path(hit.item.path).stem for hit in index_results.hits]  # type: ignore[attr-defined]


def test_words_find_their_pictures_and_nothing_else(index: Index) -> None:
    found = index.search("a red thing")
    assert sorted(names(found)) == [f"red-{i}" for i in range(4)]
    assert found.searched == 32 and found.cut == 16 and found.model == "colours"
    scores = [hit.score for hit in found.hits]
    assert scores == sorted(scores, reverse=True) and all(hit.margin >= background.CUTOFF for hit in found.hits)


def test_nothing_fits_is_an_answer(index: Index) -> None:
    found = index.search("the third declension")
    assert found.hits == () and found.cut == 20
    assert len(index.search("the third declension", cutoff=None).hits) == 20


def test_the_order_and_the_margins_are_those_of_a_loop(index: Index) -> None:
    ids, rows = all_rows(index)
    model = ColourModel()
    (row,) = model.encode_text(["blue"]).numpy()
    texts = model.encode_text(background.background_texts()).double().numpy()
    scores = {id_: float(r @ row) for id_, r in zip(ids, rows, strict=True)}
    best = sorted(ids, key=lambda id_: -scores[id_])[:7]
    found = index.search("blue", top=7, cutoff=None)
    assert [hit.item.id for hit in found.hits] == best
    for hit in found.hits:
        reached = [float(text @ rows[ids.index(hit.item.id)]) for text in texts]
        mean = sum(reached) / len(reached)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in reached) / len(reached))
        assert hit.margin == pytest.approx((hit.score - mean) / deviation, abs=1e-3)
    kept = index.search("blue", top=7, cutoff=found.hits[3].margin - 1e-4)  # type: ignore[operator]
    assert {hit.item.id for hit in kept.hits} == {
        h.item.id for h in found.hits if h.margin >= found.hits[3].margin - 1e-4
    }
    assert len(kept.hits) + kept.cut == 7


def test_what_fits_is_found_where_it_is_not_the_nearest(index: Index) -> None:
    nearest, *others = index.search("cyan", top=32, cutoff=None).hits
    best = max(others, key=lambda hit: hit.margin)  # type: ignore[arg-type,return-value]
    assert best.margin > nearest.margin + 0.01  # type: ignore[operator]
    found = index.search("cyan", top=1, cutoff=best.margin - 1e-4)  # type: ignore[operator]
    assert found.hits == (best,) and found.cut == 1


def test_filters_pictures_weights_and_rows(index: Index, coloured: Path) -> None:
    assert names(index.search("red", where="caption like '% 2' and width > 20")) == ["red-2"]
    picture = coloured.parent / "pictures" / "green-1.png"
    assert names(index.search(picture, top=1)) == ["green-1"]
    assert names(index.search(Image.open(picture), top=1)) == ["green-1"]
    both = index.search(Query.parse(["red", "blue"]), top=8, cutoff=None)
    assert {name[:3] for name in names(both)} == {"red", "blu"}
    less = index.search(Query.parse(["red", "blue", "-blue"]), top=4, cutoff=None)
    assert {name[:3] for name in names(less)} == {"red"}
    row = ColourModel().encode_text(["cyan"]).numpy()[0] * 3
    found = index.search(row, top=4)
    assert {name[:4] for name in names(found)} == {"cyan"} and found.hits[0].margin is None
    with pytest.raises(InputError, match="no column 'nothing'"):
        index.search("red", where="nothing = 1")
    for bad, said in (({"top": 0}, "1 to 100,000"), ({"cutoff": math.nan}, "cutoff"), ({"model": "x"}, "no vectors")):
        with pytest.raises(InputError, match=said):
            index.search("red", **bad)
    with pytest.raises(InputError, match="query of shape"):
        index.search(np.zeros(DIM, np.float32))


def test_similar_loads_no_model_and_leaves_itself_out(coloured: Path) -> None:
    with Index.open(coloured) as index:  # whose model no one could load
        id_ = index.store.ids(limit=1)[0]
        found = index.similar(int(id_), top=3)
        own = Path(index.items([int(id_)])[0].path).stem
        assert own not in names(found) and {name.split("-")[0] for name in names(found)} == {own.split("-")[0]}
        with pytest.raises(InputError, match="picture 999 is not in this index"):
            index.similar(999)


def test_each_two_of_a_group_look_alike(index: Index) -> None:
    ids, rows = all_rows(index)
    for threshold in (0.99, 0.95, 0.9):
        groups = index.duplicates(threshold)
        grouped = [hit.item.id for group in groups for hit in group]
        assert len(set(grouped)) == len(grouped) and all(len(group) > 1 for group in groups)
        for group in groups:
            for hit in group:
                row = rows[ids.index(hit.item.id)]
                assert hit.score == pytest.approx(float(row @ rows[ids.index(group[0].item.id)]), abs=1e-5)
                assert all(float(row @ rows[ids.index(other.item.id)]) >= threshold - 1e-4 for other in group)
        for i, x in enumerate(rows):  # two that are alike are not both left over
            for j, y in enumerate(rows[:i]):
                assert x @ y < threshold or {ids[i], ids[j]} & set(grouped)
    assert len(index.duplicates(0.9)) == len(COLOURS)
    assert {"red"} == {
        Path(hit.item.path).stem.split("-")[0]
        for group in index.duplicates(0.9, where="name like 'red%'")
        for hit in group
    }
    with pytest.raises(InputError, match="threshold"):
        index.duplicates(0.0)


def test_look_alikes_are_not_chained_and_the_best_comes_first(tmp_path: Path) -> None:
    """Rows on a circle, degrees apart: cosine 0.97 is 14 degrees."""
    facts = {  # degrees, content, width, bytes, date
        "small": (0, "a", 10, 5, None),
        "left": (10, "b", 20, 5, "2020"),
        "right": (-10, "c", 20, 5, "2019"),
        "far": (40, "d", 99, 5, None),
        "far copy": (40, "d", 99, 5, None),
        "heavy": (81, "e", 20, 9, None),
        "light": (80, "f", 20, 7, None),
    }
    items = [
        Item(0, "s", name, content, size, 0, width, 10, date) for name, (_, content, width, size, date) in facts.items()
    ]
    angles = np.radians([degrees for degrees, *_ in facts.values()])
    with Index.create(tmp_path / "index") as index:
        index.store.add_model(IndexedModel("m", "m", "f" * 32, 2))
        index.store.write(items, "m", np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32))

        def paths(**how: object) -> list[list[str]]:
            return [[hit.item.path for hit in group] for group in index.duplicates(**how)]  # type: ignore[arg-type]

        # `left` is 20 degrees from `right`: the older of two that are as large takes the one between them.
        assert paths() == [["far", "far copy"], ["heavy", "light"], ["right", "small"]]
        assert paths(threshold=0.93) == [["right", "left", "small"], ["far", "far copy"], ["heavy", "light"]]
        assert paths(exact=True) == [["far", "far copy"]]
        many = [Item(0, "s", f"copy {i}", "a", 5, 0, 10, 10) for i in range(50)]
        index.store.write(many, "m", np.tile(np.float32([[1, 0]]), (50, 1)))
        assert paths()[0] == ["right", "small", *(item.path for item in many)]


def test_explain_is_the_softmax_over_the_pictures(index: Index) -> None:
    ids, rows = all_rows(index)
    (row,) = ColourModel().encode_text(["red"]).double().numpy()
    for beta in (0.5, 8.0, 60.0):
        found = index.explain("red", beta=beta, top=len(ids))
        powers = [math.exp(beta * float(r @ row)) for r in rows]
        weights = {id_: power / sum(powers) for id_, power in zip(ids, powers, strict=True)}
        assert {p.item.id: p.weight for p in found.pictures} == pytest.approx(weights, rel=1e-4)
        entropy = -sum(w * math.log(w) for w in weights.values())
        assert found.effective == pytest.approx(math.exp(entropy), rel=1e-4)
        average = sum(w * rows[ids.index(id_)] for id_, w in weights.items())
        assert found.agreement == pytest.approx(float(average @ row / np.linalg.norm(average)), abs=1e-5)
        assert found.memory == found.collection == 32
    assert names_of(found)[0].startswith("red")
    with pytest.raises(InputError, match="β is"):
        index.explain("red", beta=0.0)
    with pytest.raises(InputError, match="no picture to retrieve from"):
        index.explain("red", where="width > 1000")


def names_of(retrieved: object) -> list[str]:
    return [Path(hit.item.path).stem for hit in retrieved.nearest]  # type: ignore[attr-defined]


def test_beta_is_the_models_own(coloured: Path) -> None:
    with open_index(coloured, ColourModel(hopfield=True, beta=14.0, inv_tau=30.0)) as index:
        assert index.explain("red").beta == 14.0
    with open_index(coloured) as index:
        assert index.explain("red").beta == 8.0


def test_the_background_is_embedded_once(tmp_path: Path) -> None:
    model, cache = ColourModel(), Cache(tmp_path)
    first = background.background_rows(lambda: ByTorch(model), "f" * 32, cache)
    assert len(model.texts) == len(first) == len(background.background_texts())
    np.testing.assert_array_equal(background.background_rows(_unavailable, "f" * 32, cache), first)


def _unavailable() -> ByTorch:
    raise AssertionError("the model is not needed")


def test_unrelated_queries_have_the_querys_shape() -> None:
    generator = np.random.default_rng(0)
    texts, pictures = (generator.standard_normal((n, 5)).astype(np.float32) for n in (30, 25))
    texts, pictures = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (texts, pictures))
    np.testing.assert_allclose(background.unrelated(Query.of("x"), texts, pictures[:0]), texts, atol=1e-6)
    shown = background.unrelated(Query((Term(1, "item"),)), texts, pictures)
    assert shown is not None and {tuple(row) for row in shown.round(4)} <= {tuple(row) for row in pictures.round(4)}
    assert background.unrelated(Query((Term(1, "item"),)), texts, pictures[:5]) is None
    mixed = Query((Term("x", "words"), Term(1, "item", -0.5)))
    rows = background.unrelated(mixed, texts, pictures)
    sums = [t - 0.5 * p for t in texts for p in pictures]
    possible = np.array([s / np.linalg.norm(s) for s in sums])
    assert rows is not None and (np.abs(rows @ possible.T).max(1) > 1 - 1e-5).all()
