"""The studies' machinery: a stopped run ends as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.nightly


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


def test_a_stopped_study_goes_on_and_comes_to_the_same_records(tiny_plan: Any, tmp_path: Path) -> None:
    from benchmarks.factors.run import train
    from benchmarks.studies.__main__ import go

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for study, limits in ((whole, (None,)), (parts, (1, 4, 100))):
        for limit in limits:
            go(study, lambda study=study: tiny_plan.runs(*tiny_plan.scores(study)), train, limit)  # type: ignore[misc]
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.json"))
    assert files == sorted(path.relative_to(parts) for path in parts.rglob("*.json"))
    assert len(files) == 2 * 2 * (3 + 1)
    for file in files:
        one, other = (json.loads((root / file).read_text(encoding="utf-8")) for root in (whole, parts))
        assert {k: v for k, v in one.items() if k != "cpu_seconds"} == {
            k: v for k, v in other.items() if k != "cpu_seconds"
        }
        assert tiny_plan.Run.from_config(one["config"]).id == file.stem == one["id"]
        assert ("zero_shot" in one) == (file.parts[1] == "cells"), "no choice may see zero-shot accuracy"
    assert tiny_plan.search("clip", tiny_plan.worlds()[0], *tiny_plan.scores(whole)).complete
