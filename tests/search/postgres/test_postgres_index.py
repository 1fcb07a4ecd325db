"""An index in PostgreSQL as its users meet it: the same pictures, words and answers as in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloob.search.index import Index
from cloob.search.scan.open import ScanOptions
from cloob.search.update import UpdateOptions
from search_colours import ColourModel, write_pictures

pytestmark = pytest.mark.nightly


def test_it_answers_what_an_index_in_a_folder_answers(address: str, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    answers, scores = [], []
    for place in (address, tmp_path / "index"):
        model = ColourModel()
        with Index.create(place) as index:
            added = index.update([pictures], UpdateOptions(model=model)).added
        with Index.open(place) as index:
            index.use(index.models[0].name, model)
            results = [
                index.search("a red bird", top=5, cutoff=None),
                index.search("blue", top=9, where="caption like '%number 2%'", cutoff=None),
                index.search("blue", top=9),
            ]
            hits = [[Path(hit.item.path).name for hit in result.hits] for result in results]
            scores.append([hit.score for result in results for hit in result.hits])
            groups = [len(group) for group in index.duplicates(threshold=0.999)]
            searched = [result.searched for result in results]
            answers.append((added, len(index), searched, hits, groups, index.columns()))
    assert answers[0] == answers[1]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert answers[0][0] == 32 and answers[0][3][0][0].startswith("red")


def test_a_second_update_finds_what_changed(address: str, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 1)
    options = UpdateOptions(model=ColourModel())
    with Index.create(address) as index:
        index.update([pictures], options)
        (pictures / "red-0.png").rename(pictures / "crimson.png")
        (pictures / "blue-0.png").unlink()
        summary = index.update([pictures], options)
        assert (summary.moved, summary.removed, summary.embedded) == (1, 1, 0)
        assert {Path(item.path).name for item in index.items(index.store.ids().tolist())} >= {"crimson.png"}
        assert len(index) == 7
        before = {Path(item.path).name: item.id for item in index.items(index.store.ids().tolist())}
        assert index.update([pictures.rename(tmp_path / "renamed")], options).moved == 7
        assert {Path(item.path).name: item.id for item in index.items(index.store.ids().tolist())} == before
        assert index.store.sources() == (str(tmp_path / "renamed"),)
    with Index.create(address) as index:  # what is there is opened
        assert len(index) == 7


def test_it_remembers_what_is_excluded(address: str, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 1)
    options = UpdateOptions(model=ColourModel())
    with Index.create(address) as index:
        for globs, there in ((("red*", "blue*"), 6), ((), 6), (("red*",), 7), ((), 7), (("",), 8), ((), 8)):
            index.update([pictures], replace(options, scan=ScanOptions(exclude=globs)))
            assert len(index) == there


def test_files_that_exchange_their_names_keep_their_vectors(address: str, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 1)
    options = UpdateOptions(model=ColourModel())
    with Index.create(address) as index:
        index.update([pictures], options)

        def vectors() -> dict[str, list[float]]:
            items = index.items(index.store.ids().tolist())
            rows = index.store.vectors("colours", [item.id for item in items]).tolist()
            return {Path(item.path).stem: row for item, row in zip(items, rows, strict=True)}

        before = vectors()
        for name, to in (("red-0", "t"), ("blue-0", "red-0"), ("t", "blue-0")):
            (pictures / f"{name}.png").rename(pictures / f"{to}.png")
        assert index.update([pictures], options).changed == 2
        assert vectors() == before | {"red-0": before["blue-0"], "blue-0": before["red-0"]}
