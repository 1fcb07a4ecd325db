"""Pages hold what the committed records give, the statistics behind them are right, and the scripts still import."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))
LABELS = np.arange(100) % 20
needs_records = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "frozen" / "records.jsonl.gz").is_file(), reason="an sdist has no records of benchmarks"
)


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_of_the_library_is_there(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "cloob":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(inside), inside


def figures(page: str) -> str:
    from benchmarks.figures import filled

    return filled(page)


def pictograms(page: str) -> str:
    from benchmarks.pictograms.tables import filled

    return filled(page)


def frozen(page: str) -> str:
    from benchmarks.frozen import tables
    from benchmarks.frozen.study import STUDY
    from benchmarks.pictograms.tables import replaced

    return replaced(page, tables.render(STUDY), tables.BEGIN, tables.END)


def factors(page: str) -> str:
    from benchmarks.factors import tables
    from benchmarks.factors.searched import STUDY

    return tables.replaced(page, tables.render(STUDY), tables.BEGIN, tables.END)


def mutual_information(page: str) -> str:
    from benchmarks.pictograms.tables import replaced

    from benchmarks import mutual_information

    file = ROOT / "benchmarks" / "results" / "mutual_information" / "results.json"
    tables = mutual_information.markdown(json.loads(file.read_text())).rstrip("\n")
    return replaced(page, tables, "<!-- tables:begin -->", "<!-- tables:end -->")


@needs_records
@pytest.mark.parametrize(
    ("page", "write"),
    [
        ("docs/speed.md", figures),
        ("benchmarks/pictograms/tables.md", pictograms),
        ("benchmarks/frozen/tables.md", frozen),
        ("benchmarks/factors/tables.md", factors),
        ("docs/mutual-information.md", mutual_information),
    ],
)
def test_a_page_holds_what_the_records_give(page: str, write: Any) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert write(text) == text, f"{page} is not what its records give; see benchmarks/README.md"


def taken(right: int) -> np.ndarray:
    """Predictions of which the first ``right`` are right."""
    return np.where(np.arange(100) < right, LABELS, (LABELS + 1) % 20)


def cell_record(method: str, seed: int, right: int, setting: Any, epochs: int | None = None) -> dict[str, Any]:
    from benchmarks.pictograms import cells, records

    epochs = epochs or cells.CELL_EPOCHS

    cell = cells.Cell("cells", method, "tiny-resnet", seed, epochs, setting)
    scores = {"acc1": right / 100, "predictions": records.pack_numbers(taken(right))}
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


def test_tables_of_known_records(tmp_path: Path) -> None:
    from benchmarks.pictograms import cells, records, tables

    for method, rights in (("clip", (40, 50, 60)), ("cloob", (46, 54, 68)), ("infoloob", (50, 60, 70))):
        for seed, right in enumerate(rights):
            record = cell_record(method, seed, right, cells.DEFAULTS[method])
            records.write("cells", record, tmp_path)
    other = cell_record("cloob", 0, 99, dataclasses.replace(cells.DEFAULTS["cloob"], beta=3.0))
    records.write("cells", other, tmp_path)

    longer = cell_record("cloob", 1, 63, cells.DEFAULTS["cloob"], cells.LONG_EPOCHS)
    records.write("cells", longer, tmp_path)

    for name in cells.ZEROSHOT:
        records.write_set(name, LABELS, 20, tmp_path)
    text = tables.render(tmp_path)
    assert "| flags | 50.0 ± 10.0 | 60.0 ± 10.0 | 56.0 ± 11.1 |" in text
    # Differences 6, 4, 8 points: mean 6, sd 2, t(2) = 4.303: 6 ± 4.303 · 2 / √3 = 6 ± 4.97.
    assert "| tiny-resnet | flags | +6.0 | +1.0 … +11.0 |" in text
    assert "| **tiny-resnet** | **mean of the 8 sets above chance** | +6.0 | +1.0 … +11.0 |" in text
    assert "| **tiny-resnet** | **mean of all sets** | +6.0 | +1.0 … +11.0 |" in text
    assert "ahead in 8 of 8 (100 %, p = 0.00781) (tower, set) cells above chance, and in 8 of 8" in text  # 2 / 2⁸
    assert "it is ahead in 8 of 8 (100 %, p = 0.00781) sets" in text
    assert (
        "**not met by the cells so far**. It is ahead in 100 %, and both intervals are above zero for tiny-re" in text
    )
    assert "| CLOOB − InfoLOOB | tiny-resnet | -4.0 |" in text
    assert "| tiny-resnet | InfoLOOB | 60.0 ± 10.0 | 56.0 ± 11.1 |" in text
    assert "### InfoLOOB against CLIP, paired by seed" in text
    assert "| tiny-resnet | flags | +10.0 | +10.0 … +10.0 |" in text
    assert "against InfoLOOB" not in text  # no cell of the other
    assert f"9 of {len(cells.METHODS) * 9} cells" in text
    assert "| tiny-resnet | CLOOB | 28.0 | 28.0 |" in text
    assert "99.0" not in text
    assert (
        "| tiny-resnet | CLOOB | 36 | 1 | 54.0 | 63.0 | 50.0 | 50.0 | 9 | 9 |" in text
    )  # seed 1 alone has both lengths
    assert "| tiny-resnet | CLOOB | 25.0 ± 0.0 | 25.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 |" in text
    assert all(f"| tiny-resnet | CLOOB | {v} | – | – | – | {v} |" in text for v in ("0.75", "0.50"))
    small = tables.summary(tmp_path)
    assert "| CLOOB | 56.0 ± 11.1 | – | – |" in small
    assert "| CLOOB − CLIP, points | +6.0 (" in small
    assert "| CLOOB, InfoLOOB first − CLIP, points | – | – | – |" in small
    assert "tiny-resnet 0 of 3" in small
    records.write(records.TIMING, {"id": records.TIMING, "seconds": {"tiny-resnet": {"cloob": [0.5, 1.0]}}}, tmp_path)
    text = tables.render(tmp_path)
    # 338 steps an epoch; half a second each in the first six of twelve epochs, a second from there on.
    assert "| tiny-resnet | CLOOB | 28.0 (169 s) | 28.0 (3042 s) |" in text

    records.pack(tmp_path)
    packed = (tmp_path / records.PACKED).read_bytes()
    records.pack(tmp_path)
    assert (tmp_path / records.PACKED).read_bytes() == packed
    shutil.rmtree(tmp_path / "runs")
    assert tables.render(tmp_path) == text
    records.pack(tmp_path)
    assert (tmp_path / records.PACKED).read_bytes() == packed
    # Above chance is asked over all seeds of a setting, and what is packed has no predictions.
    records.write("cells", cell_record("cloob", 3, 50, cells.DEFAULTS["cloob"]), tmp_path)
    with pytest.raises(ValueError, match="a lower seed is packed already; put its file back"):
        records.read("cells", tmp_path)


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


def test_chance_wants_the_right_names() -> None:
    from benchmarks.pictograms import stats

    labels = np.repeat(np.arange(10), 20)
    skewed = np.repeat(np.arange(10), [110, *[10] * 9])
    guessed = np.random.default_rng(3).integers(10, size=200)
    half = np.where(np.arange(200) % 2 == 0, labels, guessed)
    assert stats.chance([half], labels, 10) <= 0.01
    assert stats.chance([guessed, half], labels, 10) <= 0.01
    assert stats.chance([guessed], labels, 10) > 0.01
    # More than half of the pictures right, and nothing known.
    assert stats.chance([np.zeros(200, int)], skewed, 10) > 0.01
    # Every class told apart, two called by their names: 20 % right, as in a quarter of all deals of ten names.
    swapped = np.array([0, 1, 3, 4, 5, 6, 7, 8, 9, 2])[labels]
    assert stats.chance([swapped], labels, 10) > 0.01
