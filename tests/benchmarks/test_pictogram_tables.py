"""The tables in docs/results.md come from the committed records, and the arithmetic behind them is right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


LABELS = np.arange(100) % 20


def taken(right: int) -> np.ndarray:
    """Predictions of which the first ``right`` are right."""
    return np.where(np.arange(100) < right, LABELS, (LABELS + 1) % 20)


def write_test_sets(results: Path) -> None:
    from benchmarks.pictograms import cells, records

    found = {"n": 100, "n_classes": 20, "labels": records.pack(LABELS)}
    records.write(results / records.TEST_SETS, dict.fromkeys(cells.ZEROSHOT, found))


def cell_record(method: str, seed: int, right: int, setting: Any, epochs: int | None = None) -> dict[str, Any]:
    from benchmarks.pictograms import cells, records

    epochs = epochs or cells.CELL_EPOCHS

    cell = cells.Cell("cells", method, "tiny-resnet", seed, epochs, setting)
    scores = {"acc1": right / 100, "predictions": records.pack(taken(right))}
    val = {"mean_recall": 0.5, "image_to_text@1": 0.25, "text_to_image@1": 0.25, "effective_eigenvalues_image": 9}
    val |= {"effective_eigenvalues_text": 8, "ajne_image": 3.0, "ajne_text": 2.0, "saturation": 0.75}
    val |= {f"{way}@{k}": k / 20 for way in ("image_to_text", "text_to_image") for k in (5, 10)}
    zeroshot = dict.fromkeys(cells.ZEROSHOT, scores)
    curve = [
        {
            "epoch": e,
            "step": 338 * e,
            "cpu_seconds": 10.0 * e,
            "train_saturation": 0.5,
            "val": val,
            "zeroshot": dict.fromkeys(cells.ZEROSHOT, right / 200),
        }
        for e in (1, epochs)
    ]
    return {
        "id": cell.id,
        "config": cell.config(),
        "cpu_seconds": 1800.0,
        "val": val,
        "zeroshot": zeroshot,
        "probe": dict.fromkeys(cells.PROBED, scores),
        "retrieval": {"tuxpaint-captions": val},
        "curve": curve,
    }


def test_the_page_holds_what_the_records_give() -> None:
    from benchmarks.pictograms import tables

    page = (ROOT / tables.PAGE).read_text(encoding="utf-8")
    assert tables.filled(page) == page, "run: python -m benchmarks.pictograms tables"


def test_what_is_level_is_neither_won_nor_lost(tmp_path: Path) -> None:
    from benchmarks.pictograms import cells, comparison, records, tables

    for method, rights in (("clip", (40, 50, 61)), ("cloob", (43, 49, 59))):  # +3, −1, −2 points
        for seed, right in enumerate(rights):
            record = cell_record(method, seed, right, cells.DEFAULTS[method])
            records.write(tmp_path / "cells" / f"{record['id']}.json", record)
    write_test_sets(tmp_path)
    text = tables.render(tmp_path)
    assert "is ahead in 0 of 8 (0 %, 8 level, p = 1) (tower, set) cells" in text and "-0.0" not in text
    assert comparison.counted([0.1, -1e-17, -0.2, 0.3]) == "2 of 4 (50 %, 1 level, p = 1)"
    assert comparison.counted([]) == "0 of 0"


def test_picture_differences_average_over_seeds() -> None:
    from benchmarks.pictograms import comparison

    labels = np.array([0, 1, 2])
    ours, theirs = (
        [np.where(h, labels, 7) for h in np.array(of, bool)] for of in ([[1, 1, 0], [1, 0, 0]], [[0, 1, 0], [1, 0, 1]])
    )
    found, beside = comparison.picture_differences(ours, theirs, labels)
    assert found.tolist() == [0.5, 0.0, -0.5]
    assert beside is labels


def test_statistics_by_hand() -> None:
    from benchmarks.pictograms import stats
    from scipy.stats import t

    assert stats.sign_test(5, 0) == pytest.approx(2 / 32)
    assert stats.sign_test(3, 1) == pytest.approx(2 * (4 + 1) / 16)
    assert stats.sign_test(1, 1) == 1.0
    assert stats.sign_test(0, 0) == 1.0
    assert stats.mean_sd([1.0, 3.0]) == pytest.approx((2.0, math.sqrt(2)))
    # t(1) at 97.5 % is 12.7062, and sd/√2 of these is 1.
    assert stats.t_interval([1.0, 3.0]) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    assert all(map(math.isnan, stats.t_interval([1.0])))
    groups = [
        (np.array([0.0, 1.0]), np.array([4, 9])),
        (np.array([0.0, 2.0, 1.0, 1.0, 6.0]), np.array([0, 0, 1, 1, 2])),
    ]
    # Means 1/2 and 2. Sums of the deviations by class ∓1/2, and −2, −2, 4: 2 (1/2) / 2² = 1/4; 3/2 · 24 / 5² = 1.44.
    # Degrees of freedom 1 and 2: together 1.69² / (0.25² / 1 + 1.44² / 2) = 2.598. t(2) at 97.5 % is 4.30265.
    half = float(t.ppf(0.975, 1.69**2 / (0.25**2 + 1.44**2 / 2))) * math.sqrt((0.25 + 1.44) / 4)
    assert stats.picture_interval(groups) == pytest.approx((1.25 - half, 1.25 + half), abs=1e-5)
    half = 4.30265 * math.sqrt(1.44)
    assert stats.picture_interval(groups[1:]) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert stats.picture_interval([(np.ones(4), np.arange(4))]) == (1.0, 1.0)


def test_an_interval_counts_classes_and_not_their_pictures() -> None:
    """A hundred copies of each picture tell nothing new."""
    from benchmarks.pictograms import stats

    d, labels = np.array([1.0, 0.0, 0.0, -1.0, 1.0]), np.arange(5)
    once = stats.picture_interval([(d, labels)])
    assert stats.picture_interval([(np.repeat(d, 100), np.repeat(labels, 100))]) == pytest.approx(once)


def test_above_chance_wants_the_right_names() -> None:
    from benchmarks.pictograms import stats

    labels = np.repeat(np.arange(10), 20)
    skewed = np.repeat(np.arange(10), [110, *[10] * 9])
    guessed = np.random.default_rng(3).integers(10, size=200)
    half = np.where(np.arange(200) % 2 == 0, labels, guessed)
    assert stats.above_chance([half], labels, 10)
    assert stats.above_chance([guessed, half], labels, 10)
    assert not stats.above_chance([guessed], labels, 10)
    # More than half of the pictures right, and nothing known.
    assert not stats.above_chance([np.zeros(200, int)], skewed, 10)
    # Every class told apart, two called by their names: 20 % right, as in a quarter of all deals of ten names.
    swapped = np.array([0, 1, 3, 4, 5, 6, 7, 8, 9, 2])[labels]
    assert not stats.above_chance([swapped], labels, 10)
