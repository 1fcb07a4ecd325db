"""The tables in docs/results-frozen.md come from the committed records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LABELS = np.arange(100) % 20


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def searched(results: Path, world: Any, method: str) -> Any:
    """A whole search of which the third run is best. Returns the chosen run."""
    from benchmarks.frozen import cells
    from benchmarks.pictograms import records

    scores: dict[str, float] = {}
    while (best := cells.chosen(method, world, scores)) is None:
        cell = next(cell for _, cell in cells.search(method, world, scores) if cell.id not in scores)
        scores[cell.id] = 0.5 if len(scores) == 2 else 0.2
        record = {"id": cell.id, "config": cell.config(), "score": scores[cell.id], "best_epoch": 7}
        records.write(results / "search" / f"{cell.id}.json", record)
    return best


def a_record(cell: Any, right: int) -> dict[str, Any]:
    """A cell that takes the first ``right`` of a hundred pictures for what they are."""
    from benchmarks.pictograms import records
    from benchmarks.pictograms.cells import ZEROSHOT

    predictions = np.where(np.arange(100) < right, LABELS, (LABELS + 1) % 20)
    scores = {"acc1": right / 100, "predictions": records.pack(predictions)}
    val = {"mean_recall": 0.3, "effective_eigenvalues_image": 90, "effective_eigenvalues_text": 80}
    return {
        "id": cell.id,
        "config": cell.config(),
        "score": 0.25,
        "best_epoch": 6,
        "train_recall": 0.75,
        "val": val,
        "tuxpaint-captions": val,
        "zeroshot": dict.fromkeys(ZEROSHOT, scores),
    }


def test_the_page_holds_what_the_records_give() -> None:
    from benchmarks.frozen import tables
    from benchmarks.frozen.study import RESULTS
    from benchmarks.pictograms.tables import replaced

    page = (ROOT / tables.PAGE).read_text(encoding="utf-8")
    rendered = tables.render(RESULTS)
    assert replaced(page, rendered, tables.BEGIN, tables.END) == page, "run: python -m benchmarks.frozen tables"


def test_tables_by_hand(tmp_path: Path) -> None:
    from benchmarks.frozen import cells, tables, worlds
    from benchmarks.pictograms import records
    from benchmarks.pictograms.cells import ZEROSHOT

    found = {"n": 100, "n_classes": 20, "labels": records.pack(LABELS)}
    records.write(tmp_path / records.TEST_SETS, dict.fromkeys(ZEROSHOT, found))
    linear = [world for world in worlds.CORE if world.head == "linear"]
    for world in linear:
        ahead = 6 if world.share else -6
        for method, rights in (("clip", (40, 50, 60)), ("cloob", (40 + ahead, 50 + ahead - 2, 60 + ahead + 2))):
            searched(tmp_path, world, method)
            for seed, right in enumerate(rights):
                cell = cells.cells_of(method, world, scores_of(tmp_path))[seed]
                records.write(tmp_path / "cells" / f"{cell.id}.json", a_record(cell, right))
    # Two pictures more, with each seed, where equal captions are no negatives.
    for seed, cell in enumerate(cells.cells_of("clip", linear[0], scores_of(tmp_path), masked=True)[:3]):
        records.write(tmp_path / "cells" / f"{cell.id}.json", a_record(cell, (42, 52, 62)[seed]))
    # Another setting than the chosen one counts for nothing.
    other = cells.Cell("cells", "cloob", linear[0], 0, 10, cells.DEFAULTS["cloob"])
    records.write(tmp_path / "cells" / f"{other.id}.json", a_record(other, 99))
    text = tables.render(tmp_path)
    assert "State: 90 of 345 runs of the search and 18 of 115 cells of the claim's worlds" in text
    assert "| linear, 40 % swapped | 50.0 ± 10.0 | – | – | 56.0 ± 11.1 | – | – |" in text
    # Differences 6, 4, 8: mean 6, sd 2, t(2) = 4.303: 6 ± 4.303 · 2 / √3 = 6 ± 4.97.
    assert "| linear, 40 % swapped | +6.0 | +1.0 … +11.0 |" in text and "| 8 of 8 | 3 |" in text
    assert "| linear, clean | flags | 50.0 ± 10.0 | 44.0 ± 11.1 | -6.0 | -11.0 … -1.0 |" in text
    claimed, clean = (line for line in text.splitlines() if line.startswith("- "))
    assert (
        "**open, 0 of 4 worlds have all seeds**" in claimed and "in 16 of 16 (100 %" in claimed
    )  # MLP heads are missing
    assert claimed.endswith("above zero for linear, 40 % swapped; linear, 60 % swapped.")
    assert "**open, 0 of 2 worlds have all seeds**" in clean and clean.endswith("above zero for no heads.")
    assert "| linear, clean | CLIP | 75.0 ± 0.0 | 25.0 ± 0.0 | 30.0 ± 0.0 | 30.0 ± 0.0 | 90 | 80 |" in text
    assert "| linear, clean | CLIP | `lr0.001_wd0.1_n256_t15` | 10 |" in text
    assert "| `lr0.001_wd0.1_n256_t15` | 10 | 7 | 50.00 **chosen** |" in text
    assert "| linear, 40 % swapped | CLIP | +2.0 | +2.0 … +2.0 |" in text and "| 30.0 ± 0.0 | 30.0 ± 0.0 | 3 |" in text
    assert "Weight decay" not in text and "CLOOB − InfoLOOB" not in text and "99.0" not in text


def test_the_claim_is_met_when_all_of_it_is(tmp_path: Path) -> None:
    from benchmarks.frozen import cells, tables, worlds
    from benchmarks.pictograms import records
    from benchmarks.pictograms.cells import ZEROSHOT

    found = {"n": 100, "n_classes": 20, "labels": records.pack(LABELS)}
    records.write(tmp_path / records.TEST_SETS, dict.fromkeys(ZEROSHOT, found))
    for world in worlds.CORE:
        for method, right in (("clip", 30), ("cloob", 60)):
            searched(tmp_path, world, method)
            for seed, cell in enumerate(cells.cells_of(method, world, scores_of(tmp_path))):
                records.write(tmp_path / "cells" / f"{cell.id}.json", a_record(cell, right + seed))
    text = tables.render(tmp_path)
    claimed, clean = (line for line in text.splitlines() if line.startswith("- "))
    assert "**met**. CLOOB is ahead of CLIP in 32 of 32" in claimed and "**met**. CLOOB is ahead" in clean
    assert clean.endswith("above zero for linear, clean; mlp, clean.")


def test_the_weight_decay_that_is_best_for_each_method_is_compared_as_well(tmp_path: Path) -> None:
    from benchmarks.frozen import cells, tables, worlds
    from benchmarks.pictograms import records
    from benchmarks.pictograms.cells import ZEROSHOT

    found = {"n": 100, "n_classes": 20, "labels": records.pack(LABELS)}
    records.write(tmp_path / records.TEST_SETS, dict.fromkeys(ZEROSHOT, found))
    world = worlds.CORE[0]
    for method, best, right in (("clip", 3.0, 50), ("cloob", 0.1, 53)):
        searched(tmp_path, world, method)
        for cell in cells.decays(method, world, scores_of(tmp_path)):
            score = 0.6 if cell.setting.weight_decay == best else 0.4
            records.write(
                tmp_path / "search" / f"{cell.id}.json",
                {"id": cell.id, "config": cell.config(), "score": score, "best_epoch": 7},
            )
        for with_decay, more in ((False, 0), (True, 4 * (best > 0.1))):
            for seed, cell in enumerate(cells.cells_of(method, world, scores_of(tmp_path), with_decay=with_decay)):
                records.write(tmp_path / "cells" / f"{cell.id}.json", a_record(cell, right + more + seed))
    text = tables.render(tmp_path)
    assert "| linear, 40 % swapped | +3.0 | +3.0 … +3.0 |" in text  # 53 − 50, the weight decay as it was
    row = "| linear, 40 % swapped | 3 | 0.1 | – | 56.0 ± 1.6 | 55.0 ± 1.6 | – | -1.0 | -1.0 … -1.0 |"
    assert row in text  # 53 − 54
    assert "| CLIP | weight decay, afterwards | `lr0.001_wd3_n256_t15` | 10 | 7 | 60.00 |" in text


def scores_of(results: Path) -> dict[str, float]:
    from benchmarks.frozen.study import scores

    return scores(results)
