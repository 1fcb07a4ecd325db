"""The runs with wrong captions: equal searches, the best look, and captions that go round."""

from __future__ import annotations

from collections.abc import Callable
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


def whole_search(method: str, recall: Callable[[cells.Setting], float]) -> dict[str, dict[str, Any]]:
    """The records of a member's search whose runs reach ``recall`` at their second look and less at the others."""
    scores, searched = records.search_scores(), dict[str, dict[str, Any]]()
    for _ in range(2):
        for cell in wrong.search(method, scores, searched):
            found = recall(cell.setting)
            searched[cell.id] = record([found / 2, found, found / 3])
    return searched


def test_each_member_is_searched_with_as_many_different_settings() -> None:
    scores = records.search_scores()
    for method in wrong.MEMBERS:
        tried = [cell.setting for cell in wrong.search(method, scores, whole_search(method, lambda s: s.inv_tau))]
        assert len(set(tried)) == len(tried) == 4
        assert tried[0] == cells.chosen_setting(method, scores)[0]
        assert len(wrong.search(method, scores, {})) == 3
        assert all(setting.beta is not None for setting in tried) == ("hopfield" in method or method == "cloob")


def test_the_best_temperature_gets_more_weight_decay() -> None:
    scores = records.search_scores()
    searched = whole_search("cloob", lambda setting: -abs(setting.inv_tau - 15))
    last = wrong.search("cloob", scores, searched)[-1].setting
    assert (last.inv_tau, last.beta, last.weight_decay) == (15, 8, 2)


def test_the_best_look_decides_and_cells_wait_for_the_whole_search() -> None:
    scores = records.search_scores()
    searched = whole_search("cloob", lambda setting: 0.1 + 0.001 * setting.inv_tau)
    best = wrong.search("cloob", scores, searched)[1]
    searched[best.id] = record([0.05, 0.3, 0.0])
    assert wrong.chosen("cloob", scores, searched) == best.setting
    assert {cell.method for cell in wrong.cells(scores, searched)} == {"cloob"}
    assert len(list(wrong.cells(scores, searched))) == 6
    for name in list(searched):
        assert not list(wrong.cells(scores, {key: value for key, value in searched.items() if key != name}))


def test_accuracy_is_taken_at_the_best_look_that_has_one() -> None:
    run = record([0.9, 0.2, 0.4, 0.3], [0.5, 0.6, 0.7])
    assert wrong.best_look(run)["epoch"] == 3 and wrong.zeroshot(run) == 0.6
    assert wrong.best_look(record([0.1, 0.9, 0.2]))["epoch"] == 2


def test_the_table_compares_with_clip_and_infoloob_by_seed() -> None:
    scores = records.search_scores()
    searched: dict[str, dict[str, Any]] = {}
    for method in wrong.MEMBERS:
        searched |= whole_search(method, lambda setting: setting.inv_tau)
    gains = {"clip": 0.0, "infoloob": 0.03, "cloob": 0.02}
    runs = {
        cell.id: record([0.1, 0.2], [0.1 * (1 + cell.seed) + gains[cell.method]])
        for cell in wrong.cells(scores, searched)
        if cell.method in gains and cell.epochs == cells.CELL_EPOCHS
    }
    text = wrong.render(scores, searched, runs)
    assert "16 of 16 search runs, 9 of 24 cells" in text
    assert "| CLIP | `lr0.001_wd0.5_n128_t20` | 2 | 2000.00 |" in text
    assert "| CLOOB | 3 | 2, 2, 2 | 20.0 | 22.0 ± 10.0 | +2.0 (+2.0 … +2.0) | -1.0 (-1.0 … -1.0) |" in text


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
