"""Searches against a plain loop over all pictures, by a model that knows colours."""

from __future__ import annotations

import pytest
import torch

from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.examples import searches
from evaluate_fakes import COLOURS, ColourModel, Labels

SET = Labels(["red", "blue", "green", "red", "cyan", "yellow", "magenta", "blue"], broken=[3])


def test_a_search_finds_what_a_loop_over_the_pictures_finds() -> None:
    model = ColourModel()
    texts = ["something blue", "red heart", "a field of green"]
    found = searches(Embeddings({"m": model}), SET, texts, k=3)
    assert [search.query for search in found] == texts
    with torch.no_grad():
        rows = model.encode_text(texts)
        pictures = [model._embed(torch.tensor([COLOURS[name]], dtype=torch.float32))[0] for name in SET.colours]
    for search, row in zip(found, rows, strict=True):
        scores = {place: float(row @ p) for place, p in enumerate(pictures) if place not in SET.broken}
        answers = search.answers["m"]
        assert [a.score for a in answers] == pytest.approx(sorted(scores.values(), reverse=True)[:3], abs=1e-5)
        for answer in answers:  # colours may tie: each is a picture of this score
            places = [place for place in scores if SET.colours[place] == answer.label]
            assert answer.score == pytest.approx(scores[places[0]], abs=1e-5)
            assert answer.image in [SET.read(place)[1] for place in places]
    assert found[0].answers["m"][0].label == "blue"
