"""The world of factors is what its page says; the study can be stopped anywhere; its tables come from its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def tiny(**changes: Any) -> Any:
    from benchmarks.factors.world import World

    return World(**{"pool": 300, "batch": 32, "seen": 640, "held_out": 200, "pictures": 400, **changes})


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan with two small worlds, two methods, a search of three settings and one seed."""
    from benchmarks.factors import plan

    monkeypatch.setattr(plan, "worlds", lambda: [tiny(wrong=0.4, seen=320), tiny(wrong=0.0, seen=320)])
    monkeypatch.setattr(plan, "is_side", lambda world: False)
    monkeypatch.setattr(plan, "METHODS", ("clip",))
    monkeypatch.setattr(plan, "ADDED", ("sum",))
    monkeypatch.setattr(plan, "_MAIN", (lambda *_: [{"lr": 3e-3}, {"lr": 3e-4}],))
    monkeypatch.setattr(plan, "SEARCH_SEEDS", (100,))
    monkeypatch.setattr(plan, "SEEDS", (0,))
    return plan


@pytest.mark.parametrize(("wrong", "n", "expected"), [(0.0, 300, 0), (0.4, 300, 120), (0.6, 50, 30), (0.8, 25, 20)])
def test_exactly_the_share_of_captions_is_another_pairs(wrong: float, n: int, expected: int) -> None:
    from benchmarks.factors.world import draw

    clean, noisy = (draw(tiny(wrong=w, pool=n), seed=3).train for w in (0.0, wrong))
    assert torch.equal(clean.pictures, noisy.pictures)
    changed = (clean.captions != noisy.captions).any(1)
    assert int(noisy.wrong.sum()) == expected and torch.equal(changed, noisy.wrong)
    # No caption is lost: they have changed places.
    assert torch.equal(clean.captions.sum(1).sort().values, noisy.captions.sum(1).sort().values)


def test_what_retrieval_averages_by_hand() -> None:
    from benchmarks.factors.measures import retrieved

    # Two pairs of equal pictures; those of a pair share all values, those of different pairs none.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    values = torch.tensor([0, 0, 1, 1])[:, None].expand(4, 8)
    sharp, flat = retrieved(rows, values, 50.0, 4), retrieved(rows, values, 1e-6, 4)
    assert sharp["own"] == pytest.approx(0.5) and sharp["patterns"] == pytest.approx(2.0)
    assert sharp["alike"] == pytest.approx([1 - 1 / 3] * 8)
    assert flat["patterns"] == pytest.approx(4.0, abs=1e-3) and flat["alike"] == pytest.approx([0.0] * 8, abs=1e-3)


def test_a_stopped_study_goes_on_and_comes_to_the_same_records(tiny_plan: Any, tmp_path: Path) -> None:
    from benchmarks.factors import searched
    from benchmarks.factors.__main__ import go, status

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(whole)
    for limit in (1, 4, 100):
        go(parts, limit)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.json"))
    assert files == sorted(path.relative_to(parts) for path in parts.rglob("*.json"))
    assert len(files) == 2 * 2 * (3 + 1)
    for file in files:
        one, other = (json.loads((root / file).read_text(encoding="utf-8")) for root in (whole, parts))
        assert {k: v for k, v in one.items() if k != "cpu_seconds"} == {
            k: v for k, v in other.items() if k != "cpu_seconds"
        }
        assert tiny_plan.Run.from_config(one["config"]).id == file.stem == one["id"]
        assert ("zero_shot" in one) == (file.parts[0] == "cells"), "no choice may see zero-shot accuracy"
    assert status(whole).count("open 0") == 4
    assert tiny_plan.search("clip", tiny_plan.worlds()[0], *searched.scores(whole)).complete


def cell(world: Any, method: str, seed: int, accuracy: float, setting: Any) -> dict[str, Any]:
    from benchmarks.factors.plan import Run

    run = Run("cells", method, world, seed, setting)
    averaged = {"own": 0.5, "patterns": 9.0, "alike": [0.1 + seed / 1000] * 8}
    wrong = {"train_first_wrong": 0.1 if method == "clip" else 0.02 + seed / 1000, "unfit_wrong": 0.9}
    return {
        "id": run.id,
        "config": run.config(),
        "zero_shot": [accuracy] * 8,
        "probe": [0.75] * 8,
        "held_out_recall": 0.25,
        "train_recall": 0.5,
        "train_first_right": 0.25,
        "unfit_right": 0.5,
        **(wrong if world.wrong else {}),
        "eigenvalues": {"pictures": 50, "captions": 40, "pictures_retrieved": 30},
        "retrieved": averaged,
        "retrieved_common": averaged,
        "cpu_seconds": 36.0,
    }


def test_a_claim_holds_by_its_intervals_and_fails_by_them() -> None:
    from benchmarks.factors import plan, tables
    from benchmarks.factors.world import World

    def verdict(lead: float) -> str:
        cells = {}
        for wrong in (0.4, 0.6, 0.8):
            for method in plan.METHODS:
                gain = lead if method == "cloob" else 0.0
                accuracies = [0.5 + seed / 1000 + gain * (1 + seed / 10) for seed in plan.SEEDS]
                world = World(wrong=wrong)
                own = {s: cell(world, method, s, a, plan.PUBLISHED[method]) for s, a in enumerate(accuracies)}
                cells[world, method] = own
        return next(line for line in tables.claims_table(cells).splitlines() if line.startswith("| 1 |"))

    assert verdict(0.05).endswith(
        "ahead in 24 of 24 (100 %, p = 1.19e-07) (share, factor) cells above chance | **holds** |"
    )
    assert verdict(-0.05).endswith("cells above chance | **fails** |")


def test_the_page_holds_what_the_records_give() -> None:
    from benchmarks.factors import tables
    from benchmarks.factors.__main__ import RESULTS

    page = tables.PAGE.read_text(encoding="utf-8")
    rendered = tables.replaced(page, tables.render(RESULTS), tables.BEGIN, tables.END)
    assert rendered == page, "run: python -m benchmarks.factors tables"
