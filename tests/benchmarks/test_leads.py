"""The figures of leads: every name, row and interval is in them, where it belongs, and twice the same file."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks.leads import Lead, Row

from benchmarks import leads

NAMES = {"cloob": "CLOOB", "infoloob": "InfoLOOB"}
SVG = "{http://www.w3.org/2000/svg}"


def rows() -> list[Row]:
    first = {"cloob": Lead(2.0, 1.0, 3.0), "infoloob": Lead(1.0, 0.5, 1.5)}
    return [Row("right", [first, {}]), Row("wrong", [{"cloob": Lead(-1.0, -2.0, 0.0)}, {"cloob": Lead(4.0, 3.0, 5.0)}])]


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter(f"{SVG}text")]


def dots(path: Path, method: str) -> list[tuple[float, float]]:
    """Where the markers of a method's colour are, those of the legend left out."""
    plot, _ = path.read_text(encoding="utf-8").split('<g id="legend_1">')
    found = re.finditer(rf'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: {leads.COLOURS[method]}; stroke:', plot)
    return [(float(x), float(y)) for x, y in (match.groups() for match in found)]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    leads.forest(tmp_path / "forest.svg", ["linear", "MLP"], rows(), NAMES)
    return tmp_path / "forest.svg"


def test_a_forest_has_all_rows_panels_and_methods(drawn: Path) -> None:
    assert {"linear", "MLP", "right", "wrong", "CLOOB", "InfoLOOB"} <= set(texts(drawn))


def test_dots_stand_by_their_means_and_rows(drawn: Path) -> None:
    (ahead, first), (behind, second), (far, third) = dots(drawn, "cloob")
    ((other, beside),) = dots(drawn, "infoloob")
    assert second == third > first
    assert behind < other < ahead < far
    # One scale: from −1 to 1 it is twice as far as from 1 to 2.
    assert other - behind == pytest.approx(2 * (ahead - other), rel=1e-3)
    assert first < beside < second


def test_lines_have_a_dot_for_each_share(tmp_path: Path) -> None:
    path = tmp_path / "lines.svg"
    by_share = {0.0: Lead(1.0, 0.0, 2.0), 0.4: Lead(3.0, 2.0, 4.0), 0.8: Lead(2.0, 1.0, 3.0)}
    leads.lines(path, {"cloob": by_share}, NAMES)
    assert {"wrong captions, %", "CLOOB", "CLIP", "40", "80"} <= set(texts(path))
    (a, low), (b, high), (c, middle) = dots(path, "cloob")
    assert b - a == pytest.approx(c - b, rel=1e-3) and low > middle > high
    assert low - high == pytest.approx(2 * (middle - high), rel=1e-3)


def test_a_figure_says_its_numbers(tmp_path: Path, drawn: Path) -> None:
    assert leads.described(drawn) == [
        "CLOOB, right, linear: +2.0 (+1.0 … +3.0)",
        "InfoLOOB, right, linear: +1.0 (+0.5 … +1.5)",
        "CLOOB, wrong, linear: -1.0 (-2.0 … +0.0)",
        "CLOOB, wrong, MLP: +4.0 (+3.0 … +5.0)",
    ]
    leads.lines(tmp_path / "lines.svg", {"cloob": {0.4: Lead(3.0, 2.0, 4.0)}}, NAMES)
    assert leads.described(tmp_path / "lines.svg") == ["CLOOB, 40 % wrong: +3.0 (+2.0 … +4.0)"]


def test_the_same_figure_is_the_same_file(tmp_path: Path, drawn: Path) -> None:
    again = tmp_path / "again" / "forest.svg"
    again.parent.mkdir()
    leads.forest(again, ["linear", "MLP"], rows(), NAMES)
    assert again.read_bytes() == drawn.read_bytes()
