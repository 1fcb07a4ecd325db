"""An index in PostgreSQL as its users meet it: the same pictures, words and answers as in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloob.search.index import Index
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
