"""The demo's settings are those that the search's records lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloob.recipes import get_recipe


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import demo_search

    return demo_search


def leaf(config: Any, name: str) -> Any:
    return next(getattr(part, name) for part in (config.optim, config.align, config.loss) if hasattr(part, name))


def test_the_recipes_have_the_settings_that_the_records_lead_to(search: Any) -> None:
    records = search.read()
    for method in search.METHODS:
        best, _, missing = search.walk(records, method)
        assert not missing
        config = get_recipe(f"demo-{method}")
        assert {name: leaf(config, name) for name in best} == best


def test_every_method_was_tuned_with_the_same_effort(search: Any) -> None:
    records = search.read()
    tried = {method: search.walk(records, method)[1] for method in search.METHODS}
    assert {len(settings) for settings in tried.values()} == {8}
    runs = [(r["method"], str(r["settings"]), r["seed"]) for r in records]
    assert len(runs) == len(set(runs)) == 24  # none left out, none twice


def test_the_walk_takes_the_best_of_each_stage(search: Any) -> None:
    """Against a plain loop: a made-up recall that grows towards a known optimum."""

    def recall(settings: dict[str, Any]) -> float:
        return 1 / (1 + abs(settings["inv_tau"] - 18) + abs(settings["head_dropout"] - 0.5) + 9e3 * settings["lr"])

    records: list[dict[str, Any]] = []
    order = []
    while missing := search.walk(records, "infoloob")[2]:
        order.append(len(missing))
        records += [
            {"method": "infoloob", "settings": s, "seed": seed, "val_recall": recall(s)}
            for s in missing
            for seed in search.SEEDS
        ]
    best, tried, _ = search.walk(records, "infoloob")
    assert order == [len(stage) for stage in search.stages("infoloob", best)]
    assert best == {"lr": 5e-4, "head_dropout": 0.5, "inv_tau": 18.6}
    assert recall(best) == max(recall(settings) for settings in tried)
