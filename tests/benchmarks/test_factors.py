"""The world of factors is what its page says; the study can be stopped anywhere; its tables come from its records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paper_loops import objective_loop

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


def test_a_seed_is_a_world() -> None:
    from benchmarks.factors.world import FACTORS, LETTERS, PIXELS, VALUES, draw

    one, again, other = draw(tiny(), 5), draw(tiny(), 5), draw(tiny(), 6)
    assert torch.equal(one.train.captions, again.train.captions) and torch.equal(one.prompts, again.prompts)
    assert not torch.equal(one.prompts, other.prompts)
    assert one.train.pictures.shape == (300, PIXELS) and one.train.captions.shape == (300, LETTERS)
    assert len(one.held_out) == 200 and one.test[1].shape == (400, FACTORS)
    assert one.prompts.shape == (FACTORS, VALUES, LETTERS)
    assert sorted(one.test[1].unique().tolist()) == list(range(VALUES))


def test_captions_name_at_least_one_factor_and_as_many_as_asked() -> None:
    from benchmarks.factors.world import Nature

    nature = Nature(torch.Generator().manual_seed(0))
    assert nature.names(500, 0.0).sum(1).tolist() == [1.0] * 500
    assert nature.names(500, 1.0).min() == 1.0
    assert nature.names(20_000, 0.5).mean().item() == pytest.approx(0.5, abs=0.01)


def test_correlated_factors_agree_and_test_pictures_do_not() -> None:
    from benchmarks.factors.world import draw

    sample = draw(tiny(correlation=0.8, pool=4000, pictures=4000), 0)
    agree = [
        (values[:, 1::2] == values[:, ::2]).double().mean().item() for values in (sample.train.values, sample.test[1])
    ]
    assert agree == [pytest.approx(0.8 + 0.2 / 10, abs=0.02), pytest.approx(0.1, abs=0.02)]


def test_untrained_encoders_are_at_chance_and_the_codes_themselves_are_not() -> None:
    from benchmarks.factors import measures
    from benchmarks.factors.encoders import Encoders
    from benchmarks.factors.world import draw

    sample = draw(tiny(pictures=2000), 0)
    torch.manual_seed(0)
    encoders = Encoders()
    pictures, values = sample.test
    with torch.no_grad():
        untrained = measures.zero_shot(encoders.pictures(pictures), values, encoders.captions(sample.prompts))
    assert sum(untrained) / len(untrained) == pytest.approx(0.1, abs=0.02)
    perfect = torch.nn.functional.one_hot(values, 10).flatten(1).float()  # (n, 80)
    assert measures.zero_shot(perfect, values, torch.eye(80).view(8, 10, 80)) == [1.0] * 8
    assert measures.probe(perfect[:1000], values[:1000], perfect[1000:], values[1000:]) == [1.0] * 8


def test_what_retrieval_averages_by_hand() -> None:
    from benchmarks.factors.measures import retrieved

    # Two pairs of equal pictures; those of a pair share all values, those of different pairs none.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    values = torch.tensor([0, 0, 1, 1])[:, None].expand(4, 8)
    sharp, flat = retrieved(rows, values, 50.0, 4), retrieved(rows, values, 1e-6, 4)
    assert sharp["own"] == pytest.approx(0.5) and sharp["patterns"] == pytest.approx(2.0)
    assert sharp["alike"] == pytest.approx([1 - 1 / 3] * 8)
    assert flat["patterns"] == pytest.approx(4.0, abs=1e-3) and flat["alike"] == pytest.approx([0.0] * 8, abs=1e-3)


def test_unfit_is_the_librarys_saturation_without_retrieval() -> None:
    from benchmarks.factors.measures import unfit

    from cloob.functional.geometry import saturation
    from cloob.objective import make_objective

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(16, 8, generator=generator), dim=1) for _ in range(2))
    wrong = torch.arange(20) < 8
    # The last four rows are an incomplete batch.
    x, y = torch.cat([x, x[:4]]), torch.cat([y, y[:4]])
    clip = unfit(x, y, wrong, make_objective("clip"), 16)
    expected = (saturation(x[:16], y[:16], 1 / 0.07) + saturation(y[:16], x[:16], 1 / 0.07)) / 2
    assert (clip["unfit_right"] + clip["unfit_wrong"]) / 2 == pytest.approx(float(expected), abs=1e-5)
    assert unfit(x, y, wrong, make_objective("cloob"), 16)["unfit_right"] != pytest.approx(
        clip["unfit_right"], abs=1e-3
    )


def test_the_sum_is_the_mean_of_its_two_objectives_by_the_formula() -> None:
    from benchmarks.factors.objectives import objective_of
    from benchmarks.factors.plan import Setting

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    summed = objective_of("sum", Setting(7.0, beta=3.0))
    assert summed.hopfield and float(summed.inv_tau) == 7.0 and float(summed.beta) == 3.0
    rows = x.tolist(), y.tolist()
    parts = [objective_loop(*rows, 7.0, 3.0, hopfield=hopfield, scale="unit") for hopfield in (False, True)]
    assert float(summed(x, y)) == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_every_method_gets_the_same_number_of_runs_in_each_world() -> None:
    from benchmarks.factors import plan
    from benchmarks.factors.world import World

    scores: dict[str, float] = {}
    for world in (World(wrong=0.4), World(wrong=0.4, batch=32)):
        for method in plan.methods(world):
            while not (search := plan.search(method, world, scores)).complete:
                for setting in search.tried:
                    for run in plan.search_runs(method, world, setting):
                        scores.setdefault(run.id, (sum(map(ord, run.id)) * 37 % 101) / 101)
            # Of the three settings that all methods are given at once, some may have been tried before.
            # Of what lies around the best, some may too, and a length cannot be doubled beyond the whole.
            most, met = (26, 6) if plan.is_side(world) else (30, 3)
            assert most - met <= len(search.tried) <= most
            assert plan.PUBLISHED[method] in search.tried or plan.is_side(world)
            assert search.scores[search.best] == max(search.scores.values())
    listed = list(plan.runs(scores))
    assert len({run.id for run in listed}) == len(listed)
    cells = [run for run in listed if run.stage == "cells" and run.world == World(wrong=0.4)]
    assert len(cells) == 5 * len(plan.SEEDS) and not {run.seed for run in cells} & set(plan.SEARCH_SEEDS)


def test_what_an_earlier_search_tried_is_chosen_where_it_is_best() -> None:
    from benchmarks.factors import plan
    from benchmarks.factors.world import World

    base, side = World(wrong=0.4), World(wrong=0.4, batch=32)
    better = dataclasses.replace(plan.PUBLISHED["cloob"], lr=7e-4)
    half_judged = dataclasses.replace(better, weight_decay=0.7)
    for world in (base, side):
        before = plan.search_runs("cloob", world, better) + plan.search_runs("cloob", base, half_judged)[1:]
        scores = {run.id: 0.75 for run in before}
        superseded = plan.superseded_settings([run.config() for run in before], scores)
        assert superseded == {(world, "cloob"): (better,)}
        for place in (base, world):
            while not (search := plan.search("cloob", place, scores, superseded)).complete:
                for run in (run for setting in search.tried for run in plan.search_runs("cloob", place, setting)):
                    scores.setdefault(run.id, 0.5)
        assert search.best == better
        # In the side worlds rounds follow, which look around it.
        assert (dataclasses.replace(better, lr=7e-4 * 3**0.5) in search.tried) == (world == side)


def test_the_encoders_of_a_cell_are_drawn_apart_from_its_world(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.factors import plan, training

    seeds: list[int] = []
    drawn = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or drawn(seed))
    for stage in ("cells", "search"):
        run = plan.Run(stage, "clip", tiny(seen=64), 3, plan.PUBLISHED["clip"])
        training.train(run)
    assert seeds[0] not in range(1000) and seeds[1] == 3


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


def test_training_teaches_and_keeps_the_best_look() -> None:
    from benchmarks.factors import plan
    from benchmarks.factors.training import train

    setting = dataclasses.replace(plan.PUBLISHED["infoloob"], lr=3e-3)
    record = train(plan.Run("cells", "infoloob", tiny(pool=2000, seen=6400, wrong=0.4), 0, setting))
    assert record["recall"] == max(line["held_out_recall"] for line in record["curve"]) == record["held_out_recall"]
    kept = next(line for line in record["curve"] if line["step"] == record["best_step"])
    assert kept["zero_shot"] == pytest.approx(sum(record["zero_shot"]) / 8, abs=1e-4) and kept["zero_shot"] > 0.15
    assert record["train_first_right"] > record["train_first_wrong"]
    assert record["inv_tau"] == 30.0 and record["steps"] == 200 and len(record["curve"]) == 10


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


def test_tables_of_known_records(tmp_path: Path) -> None:
    from benchmarks.factors import plan, tables
    from benchmarks.factors.world import World
    from benchmarks.pictograms import records

    world, scores = World(wrong=0.4), {}
    while not all(plan.search(m, world, scores).complete for m in plan.methods(world)):
        for run in list(plan.runs(scores)):
            if run.stage == "search" and run.world == world and run.id not in scores:
                scores[run.id] = 0.5 if run.setting == plan.PUBLISHED[run.method] else 0.25
                record = {"config": run.config(), "recall": scores[run.id], "cpu_seconds": 0.0}
                records.write(tmp_path / "search" / f"{run.id}.json", record)
    for method, accuracies in (("clip", (0.40, 0.50, 0.60)), ("cloob", (0.46, 0.54, 0.68))):
        for seed, accuracy in enumerate(accuracies):
            record = cell(world, method, seed, accuracy, plan.PUBLISHED[method])
            records.write(tmp_path / "cells" / f"{record['id']}.json", record)
    other = cell(world, "cloob", 0, 0.99, dataclasses.replace(plan.PUBLISHED["cloob"], beta=3.0))
    records.write(tmp_path / "cells" / f"{other['id']}.json", other)
    text = tables.render(tmp_path)
    assert (
        "State: 5 of 97 searches complete (300 runs and 0 of their earlier forms), 6 of 610 cells; 0.1 CPU-core hours."
        in text
    )
    # Differences 6, 4, 8 points: mean 6, sd 2, t(2) = 4.303: 6 ± 4.303 · 2 / √3 = 6 ± 4.97.
    assert (
        "| 40 % wrong | 3 / 0 / 0 / 3 | 50.0 ± 10.0 | – | – | 56.0 ± 11.1 | +6.0 (+1.0 … +11.0) | – | – | – |" in text
    )
    assert "ahead in 8 of 8 (100 %, p = 0.00781) (share, factor) cells above chance | open |" in text
    # Ratios 0.4 − (0.08, 0.084, 0.088): 31.6 points, sd 0.4, ± 4.303 · 0.4 / √3 = ± 1.
    assert "| 5 | CLIP − CLOOB, 40 % wrong: +31.6 (+30.6 … +32.6) | open |" in text
    assert "| 40 % wrong | CLOOB | 75.0 | 50.0 | 25.0 | 25.0 | 25.0 | 2.1 | 0.50 | 0.90 | 50.0 | 40.0 |" in text
    assert "| 40 % wrong | CLIP | `t14.3learned_lr0.001_wd0.1_l1` | 50.00 | 50.00 | 50.00 |" in text
    assert "99.0" not in text


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
