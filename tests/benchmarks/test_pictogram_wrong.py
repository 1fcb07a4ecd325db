"""The runs with wrong captions: equal searches, the best look, and captions that go round."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmarks.pictograms import cells, records, wrong
from benchmarks.pictograms.cache import Data, Pairs, with_wrong_captions


def record(recalls: list[float], tops: list[float] | None = None) -> dict[str, Any]:
    """A run whose looks have these recalls and, from the second on, these accuracies on one set."""
    curve: list[dict[str, Any]] = [{"epoch": i + 1, "val": {"mean_recall": r}} for i, r in enumerate(recalls)]
    for line, top in zip(curve[1:], tops or [], strict=False):
        line["zeroshot"] = {"digits": top}
    return {"curve": curve}


def test_each_member_is_searched_with_as_many_different_settings() -> None:
    scores = records.search_scores()
    for method in wrong.MEMBERS:
        tried = wrong.settings(method, scores)
        assert len(set(tried)) == len(tried) == 6
        assert tried[0] == cells.chosen_setting(method, scores)[0]
        assert all(setting.beta is not None for setting in tried) == ("hopfield" in method or method == "cloob")


def test_the_best_look_decides_and_cells_wait_for_the_whole_search() -> None:
    scores = records.search_scores()
    searched = {cell.id: record([0.1, 0.05]) for cell in wrong.search("cloob", scores)}
    best = wrong.search("cloob", scores)[3]
    searched[best.id] = record([0.05, 0.3, 0.0])
    assert wrong.chosen("cloob", scores, searched) == best.setting
    assert {cell.method for cell in wrong.cells(scores, searched)} == {"cloob"}
    assert len(list(wrong.cells(scores, searched))) == 6
    searched.pop(best.id)
    assert not list(wrong.cells(scores, searched))


def test_accuracy_is_taken_at_the_best_look_that_has_one() -> None:
    run = record([0.9, 0.2, 0.4, 0.3], [0.5, 0.6, 0.7])
    assert wrong.best_look(run)["epoch"] == 3 and wrong.zeroshot(run) == 0.6
    assert wrong.best_look(record([0.1, 0.9, 0.2]))["epoch"] == 2


def test_the_table_compares_with_clip_by_seed() -> None:
    scores = records.search_scores()
    searched = {c.id: record([0.1]) for method in wrong.MEMBERS for c in wrong.search(method, scores)}
    gains = {"clip": 0.0, "cloob": 0.02}
    runs = {
        cell.id: record([0.1, 0.2], [0.1 * (1 + cell.seed) + gains[cell.method]])
        for cell in wrong.cells(scores, searched)
        if cell.method in gains and cell.epochs == cells.CELL_EPOCHS
    }
    text = wrong.render(scores, searched, runs)
    assert "24 of 24 search runs, 6 of 24 cells" in text
    assert "| CLOOB | 3 | 2, 2, 2 | 20.0 | 22.0 ± 10.0 | +2.0 (+2.0 … +2.0) |" in text


def test_so_many_captions_go_round_with_all_that_belongs_to_them() -> None:
    n = 50
    right = Pairs(np.zeros((n, 1, 1, 3), np.uint8), np.arange(n)[:, None], np.arange(n), tuple(map(str, range(n))))
    data = with_wrong_captions(Data({"train": right, "val": right}, {}, {}), 0.4, seed=3)
    rows = {name: pairs.ids for name, pairs in data.pairs.items()}
    for name, ids in rows.items():
        assert (ids != np.arange(n)).sum() == 20 and sorted(ids) == list(range(n))
        assert data.pairs[name].captions == tuple(map(str, ids)) and (data.pairs[name].tokens[:, 0] == ids).all()
    assert (rows["train"] != rows["val"]).any()
    assert (
        with_wrong_captions(Data({"train": right, "val": right}, {}, {}), 0.4, 3).pairs["val"].ids == rows["val"]
    ).all()
