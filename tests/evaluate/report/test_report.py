"""The report: numbers and wording by hand-computed cases, the page itself in a real headless Chromium."""

from __future__ import annotations

import base64
import io
import math
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from cloob.evaluate.report import (
    Confusion,
    ExampleQuery,
    ReportExtras,
    ShownPicture,
    headline,
    numbers,
    render_report,
    write_report,
)
from cloob.evaluate.report import confusion as report_confusion
from cloob.evaluate.report import figures as report_figures
from cloob.evaluate.report.pictures import data_uri
from cloob.evaluate.report.plots import Series, line_chart, nice_ticks, thin
from cloob.evaluate.report.problems import problems
from cloob.evaluate.report.tables import differences, result_tables
from support import picture

EVIL = "<script>alert(1)</script>\"'&"


def row(model: str, **sets: float) -> dict[str, Any]:
    return {"model": model, "objective": model, "zeroshot": {name: {"acc1": acc} for name, acc in sets.items()}}


def full_results() -> dict[str, Any]:
    spectrum = [0.5**k for k in range(40)]
    rows = []
    for model, acc, missing in (("cloob", 0.192, 0.3), ("clip", 0.164, math.nan), ("infoloob", 0.171, 0.1)):
        zeroshot = {
            "noto": {
                "acc1": acc,
                "acc1_interval": [acc - 0.02, acc + 0.02],
                "acc5": missing,
                "n": 100,
                "n_classes": 20,
            },
            "flags": {"acc1": acc / 2, "acc5": 0.5, "n": 90, "per_class": {f"land {i}": i / 30 for i in range(20)}},
        }
        geometry = {"effective_eigenvalues_image": 7, "spectrum_image": spectrum, "spectrum_text": spectrum, "odd": 1.5}
        rows.append(
            {
                "model": model,
                "objective": model,
                "zeroshot": zeroshot,
                "retrieval": {"pairs": {"image_to_text@1": acc, "text_to_image@10": None, "n": 50}},
                "geometry": {"pairs": geometry},
                "train_seconds": 192.4,
                "settings": {"inv_tau": 30.0, "seed": 0, "learnable_inv_tau": False, "nested": math.nan},
            }
        )
    return {"rows": rows}


def full_queries() -> list[ExampleQuery]:
    found = [ShownPicture(picture("red"), "a cat", i == 0, 0.5 - i / 10) for i in range(4)]
    found.append(ShownPicture(picture("blue"), EVIL, False, math.nan))
    return [ExampleQuery(f"a drawing of {EVIL}", {"cloob": found, "clip": found[::-1]})]


def full_curves() -> dict[str, list[dict[str, Any]]]:
    return {
        "cloob": [{"step": s, "loss": -s / 1000, "effective_eigenvalues_image": s / 10} for s in range(500)],
        "clip": [{"step": s, "loss": None if s == 3 else 5 - s / 100} for s in range(40)],
    }


def full_confusions() -> list[Confusion]:
    matrix = torch.tensor([[3, 1, 0], [0, 2, 2]])
    return [Confusion("noto", model, ("cat", EVIL), matrix) for model in ("cloob", "clip")]


def render(**changes: Any) -> str:
    extras = {"curves": full_curves(), "queries": full_queries(), "confusions": full_confusions()}
    extras |= {key: changes.pop(key) for key in list(changes) if key in ReportExtras.__dataclass_fields__}
    return render_report(**({"results": full_results(), "title": "T"} | changes), extras=ReportExtras(**extras))


# --- numbers


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.3", True, [0.1], {}])
def test_what_is_no_finite_number_is_missing(value: object) -> None:
    assert numbers.number(value) is None
    assert numbers.percent(numbers.number(value)) == "–"


def test_formats() -> None:
    assert numbers.percent(0.1724) == "17.2"
    assert numbers.points(0.023) == "+2.3"
    assert numbers.points(-0.0234) == "−2.3"
    assert numbers.points(-0.0001) == numbers.points(-0.0) == "+0.0"
    assert numbers.count(12345.0) == "12\u202f345"
    assert numbers.count(30.5) == "30.5"
    assert numbers.decimal(-2.91) == "−2.910"
    assert numbers.decimal(0.00012) == "1.2e−04"
    spaces = [numbers.duration(s).replace("\u00a0", " ") for s in (3.21, 52.4, 192.4, 7500.0, 59.7)]
    assert spaces == ["3.2 s", "52 s", "3 min 12 s", "2 h 5 min", "1 min 0 s"]


def test_tables_mark_the_best_of_each_set_and_no_tie() -> None:
    rows = [row("a", one=0.2, two=0.5), row("b", one=0.1, two=0.5)]
    (table,) = result_tables(rows, {"a": 0, "b": 1})
    assert table.id == "zeroshot"
    shown = [(line[0].text, line[1].text, line[2].text, line[2].best) for line in table.rows]
    assert shown == [
        ("one", "a", "20.0", True),
        ("one", "b", "10.0", False),
        ("two", "a", "50.0", False),
        ("two", "b", "50.0", False),
    ]
    assert [line[3].text for line in table.rows] == ["–"] * 4  # top-5 was not measured


def test_median_rank_is_better_when_low_and_infinite_is_missing() -> None:
    ranks = {"a": 4.0, "b": 9.0, "c": math.inf}
    rows = [{"model": m, "retrieval": {"s": {"image_to_text_median_rank": r}}} for m, r in ranks.items()]
    (table,) = result_tables(rows, {"a": 0, "b": 1, "c": 2})
    column = len(table.headers) - 1
    assert [(line[column].text, line[column].best) for line in table.rows] == [("4", True), ("9", False), ("–", False)]
    assert sum(width for _, width in table.groups) == len(table.headers)


def test_training_time_is_shown_without_geometry() -> None:
    tables = result_tables([row("a", s=0.1) | {"train_seconds": 61.0}], {"a": 0})
    assert [t.id for t in tables] == ["zeroshot", "geometry"]
    assert tables[1].rows[0][tables[1].headers.index("Training time")].value == 61.0


def test_unknown_scalar_of_the_geometry_gets_a_column() -> None:
    tables = result_tables([{"model": "a", "geometry": {"s": {"brand_new": 0.25, "list": [1]}}}], {"a": 0})
    assert tables[0].headers[-1] == "Brand new"
    assert tables[0].rows[0][-1].text == "0.250"


# --- the headline


def verdict(results: dict[str, Any]) -> headline.Verdict:
    found = headline.verdict(results, headline.measure(results["rows"]))
    return headline.Verdict(found.title, found.detail.replace("\u00a0", " "), found.leader, found.runner_up)


def test_verdict_without_intervals_subtracts() -> None:
    found = verdict({"rows": [row("clip", s=0.15), row("cloob", s=0.172)]})
    assert found.title == "cloob is ahead of clip; no interval is known"
    assert found.detail == "17.2 % against 15.0 % zero-shot top-1 on s: +2.2 points."


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("low", "high", "clear"), [(0.004, 0.04, True), (-0.01, 0.05, False)])
def test_verdict_reads_the_interval_either_way_round(turned: bool, low: float, high: float, clear: bool) -> None:
    entry = {"metric": "acc1", "set": "s", "model": "cloob", "baseline": "clip", "difference": 0.022}
    entry |= {"low": low, "high": high}
    if turned:
        entry |= {"model": "clip", "baseline": "cloob", "difference": -0.022, "low": -high, "high": -low}
    other = entry | {"set": "t", "difference": 0.9}
    found = verdict({"rows": [row("clip", s=0.15), row("cloob", s=0.172)], "differences": [other, entry], "level": 0.9})
    assert found.title == ("cloob is ahead of clip" if clear else "No clear difference between cloob and clip")
    ends = f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")
    assert f"+2.2 points, 90 % interval {ends}" in found.detail
    assert ("clear of zero" in found.detail) is clear


def test_verdict_over_several_sets_compares_means_on_the_common_ones() -> None:
    rows = [row("a", one=0.2, two=0.3, alone=0.99), row("b", one=0.3, two=0.4), row("c", one=0.1, two=0.5)]
    found = verdict({"rows": rows})
    assert (found.leader, found.runner_up) == ("b", "c")  # means 0.25, 0.35, 0.30
    assert found.title == "b leads, c follows; no interval is known"
    assert found.detail.endswith("+5.0 points. Ahead of c on 1 of 2 sets.")


def compared(**gaps: tuple[float, float]) -> dict[str, Any]:
    """Results in which ``a`` leads, by so much over each other model (the ends of an interval)."""
    rows = [row("a", s=0.4), *(row(name, s=0.4 - (low + high) / 2) for name, (low, high) in gaps.items())]
    entries = [
        {"set": "s", "model": "a", "baseline": name, "difference": (low + high) / 2, "low": low, "high": high}
        for name, (low, high) in gaps.items()
    ]
    return {"rows": rows, "differences": entries}


@pytest.mark.parametrize(
    ("gaps", "title"),
    [
        ({"b": (0.01, 0.05), "c": (0.02, 0.08)}, "a leads, b follows"),
        ({"b": (-0.01, 0.05), "c": (0.02, 0.08)}, "No clear difference between a and b; c is behind"),
        ({"b": (-0.01, 0.05), "c": (0.0, 0.08)}, "No clear difference between a, b and c"),
        (
            {"b": (-0.01, 0.05), "c": (0.02, 0.08), "d": (0.03, 0.09)},
            "No clear difference between a and b; c and d are behind",
        ),
    ],
)
def test_verdict_of_three_says_who_is_not_told_apart(gaps: dict[str, tuple[float, float]], title: str) -> None:
    assert verdict(compared(**gaps)).title == title


def test_verdict_says_what_other_measures_make_clear() -> None:
    results = compared(b=(-0.01, 0.05), c=(0.01, 0.05))
    other = {"metric": "image_to_text@1", "set": "pairs", "model": "a", "baseline": "b"}
    results["differences"] += [
        {**other, "difference": -0.03, "low": -0.05, "high": -0.01},
        {**other, "model": "c", "baseline": "a", "difference": -0.02, "low": -0.04, "high": -0.01},
        {**other, "metric": "text_to_image@1", "difference": -0.02, "low": -0.05, "high": 0.01},
        {**other, "model": "c", "difference": 0.3, "low": 0.2, "high": 0.4},
    ]
    assert verdict(results).detail.partition("includes zero. ")[2] == (
        "a is behind b by 3.0 points in image → text recall@1 on pairs. "
        "a is ahead of c by 2.0 points in image → text recall@1 on pairs."
    )


def test_verdict_of_what_guessing_could_give() -> None:
    """The best model's interval holds one in 20 classes: then nothing is said of who is ahead."""
    results = compared(b=(0.01, 0.05))
    for entry, low in zip(results["rows"], (0.06, 0.04), strict=True):
        entry["zeroshot"]["s"] |= {"acc1_interval": [low, 0.5], "n_classes": 20}
    found = verdict(results)
    assert found.title == "a is ahead of b" and found.detail.endswith(". Not clearly above guessing: b.")
    results["rows"][0]["zeroshot"]["s"]["acc1_interval"] = [0.05, 0.5]
    assert verdict(results).title == "No clear difference from guessing"
    alone = verdict({"rows": results["rows"][:1]})
    assert alone.title.endswith("% zero-shot top-1, no clear difference from guessing")
    pictures = {"text_to_image@1": 0.1, "text_to_image@1_interval": [0.01, 0.2], "n_images": 50}
    retrieval = {"rows": [{"model": "a", "retrieval": {"s": pictures}}]}
    assert verdict(retrieval).title.endswith("no clear difference from guessing")


def test_verdict_level_single_and_nothing() -> None:
    assert verdict({"rows": [row("a", s=0.2), row("b", s=0.2)]}).title == "a and b are level"
    assert verdict({"rows": [row("a", s=0.2)]}).title.replace("\u00a0", " ") == "a: 20.0 % zero-shot top-1"
    assert verdict({"rows": [{"model": "a"}]}).title == "Nothing to compare yet"
    retrieval = {
        "rows": [{"model": m, "retrieval": {"s": {"text_to_image@1": v}}} for m, v in (("a", 0.1), ("b", 0.2))]
    }
    assert "text → image recall@1 on s" in verdict(retrieval).detail


def test_forest_places_values_intervals_and_guessing() -> None:
    results = {"rows": [row("a", s=0.25), row("b", s=0.5)]}
    results["rows"][0]["zeroshot"]["s"] |= {"acc1_interval": [0.2, 0.3], "n_classes": 10}
    what = headline.measure(results["rows"])
    assert what is not None
    drawn = headline.forest(results, what, {"a": 0, "b": 1}, verdict(results))
    top = 0.6  # the round number above 1.04 · 0.5
    (line,) = drawn.rows
    assert line.chance == pytest.approx(100 * 0.1 / top, abs=0.01)
    a, b = line.spans
    assert (a.at, a.low, a.width) == pytest.approx((25 / top, 20 / top, 10 / top), abs=0.02)
    assert (b.at, b.width) == pytest.approx((50 / top, 0.0), abs=0.01)
    assert line.difference is not None and line.difference.text == "+25.0" and line.difference.model == "b"
    assert line.difference.at == pytest.approx(50 + 50 * 0.25 / 0.3, abs=0.01)


# --- plots and figures


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-0.19, -0.09, [-0.18, -0.16, -0.14, -0.12, -0.1]), (3, 3, [3])],
)
def test_nice_ticks(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_thin_keeps_mean_and_extremes() -> None:
    points = [(float(x), float((x * 7) % 11)) for x in range(103)]
    line, band = thin(points, 10)
    assert len(line) == len(band) == 10
    assert min(low for _, low, _ in band) == min(y for _, y in points)
    assert max(high for *_, high in band) == max(y for _, y in points)
    edges = [i * 103 // 10 for i in range(11)]
    part = points[edges[3] : edges[4]]
    assert line[3] == pytest.approx((sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)))
    assert thin(points[:10], 10) == (points[:10], [])


def test_line_chart_maps_the_corners_and_escapes() -> None:
    svg = line_chart([Series(EVIL, 9, [(0.0, 1.0), (10.0, 100.0)])], label=EVIL, x_label="x", y_label="y", log_y=True)
    assert "<script>" not in svg
    assert 'class="line m1" stroke-dasharray' in svg  # the tenth model: the second colour, dashed
    match = re.search(r'class="line[^>]* d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    assert match is not None
    x0, y0, x1, y1 = map(float, match.groups())
    assert (x0, x1) == (54, 446)
    height = 264 - 26 - 40
    assert (y0 - y1) == pytest.approx(height / 1.1, abs=0.2)  # 5 % of the range is left above and below
    assert line_chart([Series("empty", 0, [])], label="", x_label="", y_label="") == ""
    dot = Series("one", 0, [(1.0, 1.0)])
    assert line_chart([dot], label="", x_label="", y_label="") == ""
    assert "<circle" in line_chart([dot, Series("two", 1, [(1.0, 1.0), (2.0, 1.0)])], label="", x_label="", y_label="")


def test_spectrum_marks_the_given_count_or_computes_it() -> None:
    spectrum = [0.5, 0.3, 0.15, 0.045, 0.005, 0.0]  # 0.5, 0.8, 0.95, 0.995: four hold 99 %
    rows = [{"model": "a", "geometry": {"s": {"spectrum_image": spectrum}}}]
    ((name, (figure,)),) = report_figures.spectra(rows, {"a": 0})
    assert name == "s"
    assert figure.legend == [("a", 0, "4 of 6 hold 99 %")]
    rows[0]["geometry"]["s"]["effective_eigenvalues_image"] = 3
    ((_, (figure,)),) = report_figures.spectra(rows, {"a": 0})
    assert figure.legend == [("a", 0, "3 of 6 hold 99 %")]
    assert ">3</text>" in figure.svg


def test_losses_say_how_many_steps_have_none() -> None:
    curves = {"a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}, {"lr": 0.1}]}
    (figure,) = report_figures.losses(curves, {"a": 0})
    assert figure.legend == [("a", 0, "last 1.000, 1 skipped or not finite")]
    curves["a"] += [{"step": 4, "loss": 10**400}, {"step": 5, "loss": 1e308}, {"step": -1e308, "loss": -1e308}]
    (figure,) = report_figures.losses(curves, {"a": 0})
    assert figure.legend == [("a", 0, "last 1.000, 4 skipped or not finite")]


def test_classes_best_worst_and_apart() -> None:
    names = [f"c{i:02}" for i in range(20)]
    first = {name: i / 20 for i, name in enumerate(names)}
    second = first | {"c03": 1.0, "c15": 0.1}
    rows = [{"model": m, "zeroshot": {"s": {"per_class": r, "n": 100}}} for m, r in (("a", first), ("b", second))]
    (figure,) = report_figures.classes(rows, {"a": 0, "b": 1})
    groups = {title: [line["name"] for line in lines] for title, lines in figure["groups"]}
    assert list(groups) == ["Best", "Worst", "a ahead most", "b ahead most"]
    assert groups["Best"][0] == "c19"
    assert groups["Worst"][-1] == "c00"
    assert groups["a ahead most"] == ["c15"]
    assert groups["b ahead most"] == ["c03"]
    for entry in rows:
        entry["zeroshot"]["s"]["n"] = 20  # one image per class says nothing about a class
    assert report_figures.classes(rows, {"a": 0, "b": 1}) == []


def test_eigenvalues_by_epoch_only_where_all_runs_say_theirs() -> None:
    points = [{"step": 10 * e, "epoch": e, "effective_eigenvalues_image": 50 + e} for e in (1, 2, 3)]
    (figure,) = report_figures.by_epoch({"a": points, "b": points[:1]}, {"a": 0, "b": 1})
    assert figure.legend == [("a", 0, "51 → 53")] and ">epoch</text>" in figure.svg
    assert figure.svg.count("<circle") == 3
    other = [{**point, "epoch": None} for point in points]
    (figure,) = report_figures.by_epoch({"a": points, "b": other}, {"a": 0, "b": 1})
    assert len(figure.legend) == 2 and ">step</text>" in figure.svg
    assert report_figures.by_epoch({"a": points[:1]}, {"a": 0}) == []


def test_differences_say_whether_they_are_clear() -> None:
    what = {"model": "b", "baseline": "a"}
    entries = [
        {**what, "metric": "acc1", "set": "s", "difference": 0.1, "low": 0.02, "high": 0.2},
        {**what, "metric": "probe_acc1", "set": None, "difference": -0.1, "low": -0.3, "high": 0.1},
    ]
    table = differences({"differences": entries}, {"a": 0, "b": 1})
    assert table is not None
    shown = [[cell.text for cell in line] for line in table.rows]
    assert shown == [
        ["s", "b", "a", "zero-shot top-1", "+10.0", "yes"],
        ["mean of the sets", "b", "a", "linear probe top-1", "−10.0", "no"],
    ]
    assert [line[4].best for line in table.rows] == [True, False]
    assert table.rows[0][4].interval == "+2.0 to +20.0"
    assert differences({}, {}) is None


def test_what_is_missing_is_named_once() -> None:
    rows = [
        {"model": m, "zeroshot": {"s": {"n": 9, "unreadable": {"corrupt image": 2, "missing image": 1}}}} for m in "ab"
    ]
    rows[0]["retrieval"] = {"p": {"n_images": 2, "n": 10, "unreadable": {"missing caption": 4}}}
    failures = [
        {"model": None, "set": "ucf101", "error": "ucf101: put there frames/"},
        {"model": "a", "set": "t", "error": "no"},
        {"model": "c", "set": None, "error": "c: no weights"},
    ]
    found = problems({"rows": rows, "failures": failures})
    assert [
        (p.set, p.model, p.message) for p in (*found.missing, *found.unloaded, *found.failed, *found.unreadable)
    ] == [
        ("ucf101", None, "put there frames/"),
        (None, "c", "no weights"),
        ("t", "a", "no"),
        ("s", None, "3 of 9 images could not be read (corrupt image × 2, missing image × 1); they count as wrong"),
        ("p", "a", "4 of 12 images or captions could not be read (missing caption × 4); they count as not found"),
    ]
    assert found.summary == (
        "1 set is not there; 1 model could not be loaded; 1 measurement failed; 2 sets could not be read in full."
    )
    assert not problems({"rows": [{"model": "a"}]})
    page = render(results={"rows": rows, "failures": failures}, curves={})
    assert "What is missing" in page and "put there frames/" in page and 'href="#problems"' in page
    assert "<h3>Models that could not be loaded</h3>" in page and "<dt>c</dt><dd>no weights</dd>" in page
    assert '<dt>t <span class="quiet">a</span></dt><dd>no</dd>' in page and "<dt>ucf101</dt>" in page


def test_confusion_pictures_hold_the_shares() -> None:
    image = pytest.importorskip("PIL.Image")
    # Class 1 has no image; of class 0 all are right, of class 2 a quarter is right, half unreadable.
    matrix = torch.tensor([[4, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 2]])
    (panel,) = report_confusion.panels([Confusion("s", "m", ("x", "y", "z"), matrix)], {"m": 1})
    (item,) = panel["models"]
    with image.open(io.BytesIO(base64.b64decode(item["uri"].partition(",")[2]))) as opened:
        picture = opened.convert("RGBA")
    assert picture.size == (2, 2)
    assert [picture.getpixel(at)[3] for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [255, 0, 128, 128]  # roots of ¼
    assert picture.getpixel((0, 0))[:3] == (0xD0, 0x56, 0x0A)
    assert item["worst"] == [
        {"label": "z", "taken": "(unreadable)", "count": "2 of 4"},
        {"label": "z", "taken": "x", "count": "1 of 4"},
    ]
    assert "62.5 % of 8 images" in item["alt"]
    assert item["names"] == [{"name": "x", "at": 25.0}, {"name": "z", "at": 75.0}]  # of the classes with images
    few = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert report_confusion.panels([Confusion("s", "m", ("x", "y"), few)], {"m": 0}) == []
    many = torch.cat([3 * torch.eye(600, dtype=torch.int64), torch.zeros(600, 1, dtype=torch.int64)], 1)
    (panel,) = report_confusion.panels([Confusion("s", "m", [str(i) for i in range(600)], many)], {"m": 0})
    assert panel["models"][0]["size"] == 200 and panel["models"][0]["worst"] == []
    names = panel["models"][0]["names"]
    assert [entry["name"] for entry in names] == [str(i) for i in range(0, 600, 30)]
    assert names[1]["at"] == pytest.approx(100 * 30.5 / 600, abs=0.01)


# --- the page as text


class _Checker(HTMLParser):
    """Collects what would reach the network, and checks that elements nest."""

    void = frozenset({"meta", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_user_text_is_escaped_and_nothing_is_external() -> None:
    results = full_results()
    for entry in results["rows"]:
        entry["model"] += EVIL
        entry["objective"] = EVIL
        entry["zeroshot"][EVIL] = {"acc1": 0.1, "n": 99, "per_class": {EVIL: 0.5, "b": 0.1}}
        entry["geometry"][EVIL] = entry["geometry"]["pairs"] | {EVIL: 1.0}
        entry["settings"][EVIL] = EVIL
    curves = {f"cloob{EVIL}": full_curves()["cloob"]}
    page = render(results=results, curves=curves, title=EVIL, notes=[EVIL])
    checker = _Checker()
    checker.feed(page)
    checker.close()
    checker.addresses = [address for address in checker.addresses if not address.startswith("#")]
    assert checker.open == []
    assert checker.scripts == 1
    assert page.count("alert(1)") > 20 and "<script>alert" not in page
    assert checker.addresses and all(address.startswith("data:") for address in checker.addresses)
    assert not re.search(r"url\(|@import|https?://", page)


def test_missing_numbers_are_dashes_and_never_nan() -> None:
    page = render()
    written = re.sub(r"base64,[^\"]*", "", page).partition("<script>")[0]
    assert not re.search(r"\b(nan|NaN|None|inf)\b", written)
    assert ">–</td>" in page


def test_same_arguments_give_the_same_bytes() -> None:
    assert render() == render()


def test_the_least_results_make_a_page() -> None:
    for results in ({"rows": []}, {"rows": [{"model": "a"}]}, {"rows": [row("a", s=0.5) | {"geometry": None}]}):
        page = render_report(results=results)
        assert '<p class="title">Report</p>' in page
        assert "<svg" not in page and "<img" not in page


def test_an_unknown_picture_becomes_its_label() -> None:
    lost = ExampleQuery("q", {"cloob": [ShownPicture(b"<svg onload=x>", "a label", True, 0.1)]})
    page = render(queries=[lost], confusions=[])
    assert '<span class="no-image">a label</span>' in page
    assert "<img" not in page


def shown(image: bytes) -> Any:
    """The picture that the page shows for a file, decoded."""
    pil = pytest.importorskip("PIL.Image")
    uri = data_uri(image)
    assert uri is not None
    return pil.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize("side", [16, 600])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_nothing_of_a_file_but_its_pixels_gets_into_the_page(kind: str, side: int) -> None:
    """Where a picture was taken, by what, and what else its file holds is nobody's business."""
    pil = pytest.importorskip("PIL.Image")
    exif = pil.Exif()
    exif[0x010F] = "SECRET maker"
    exif[0x0112] = 6
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 12.0, 59.0), 0x1B: b"SECRET place"})
    info = pytest.importorskip("PIL.PngImagePlugin").PngInfo()
    info.add_text("Author", "SECRET author")
    extra: dict[str, Any] = {
        "JPEG": {"exif": exif.tobytes(), "comment": b"SECRET comment", "icc_profile": b"SECRET profile", "quality": 95},
        "PNG": {"exif": exif.tobytes(), "pnginfo": info, "icc_profile": b"SECRET profile"},
        "WEBP": {"exif": exif.tobytes(), "xmp": b"SECRET xmp", "icc_profile": b"SECRET profile"},
        "GIF": {"comment": b"SECRET comment"},
        "TIFF": {"exif": exif, "description": "SECRET description"},
    }[kind]
    image = pil.new("RGB", (side, side), "red")
    image.paste("blue", (0, 0, side, side // 2))  # the upper half
    stream = io.BytesIO()
    image.save(stream, kind, **extra)
    data = stream.getvalue() + (b"SECRET trailer" if kind == "JPEG" else b"")
    assert b"SECRET" in data
    page = render(queries=[ExampleQuery("q", {"cloob": [ShownPicture(data, "a label", True, 0.1)]})], confusions=[])
    pictures = [base64.b64decode(found) for found in re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", page)]
    assert pictures and not any(b"SECRET" in found for found in pictures)
    found = shown(data)
    assert not found.getexif() and not {"exif", "xmp", "icc_profile", "comment"} & set(found.info)
    if kind != "GIF":  # turned by a quarter to the right
        left, right = (found.convert("RGB").getpixel((x * found.width // 4, found.height // 2)) for x in (1, 3))
        assert left[0] > 200 > right[0] and right[2] > 200 > left[2]


def test_a_small_picture_keeps_its_size_and_colours() -> None:
    for kind in ("WEBP", "PNG", "JPEG", "GIF"):
        found = shown(picture("red", kind=kind))
        assert found.size == (16, 16) and found.format == "WEBP"
        assert max(abs(a - b) for a, b in zip(found.getpixel((8, 8)), (255, 0, 0), strict=True)) < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
def test_a_large_picture_is_made_small(kind: str) -> None:
    pil = pytest.importorskip("PIL.Image")
    noise = torch.randint(0, 256, (150, 200, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stream = io.BytesIO()
    pil.fromarray(noise.numpy()).resize((1600, 1200)).save(stream, kind)
    found = shown(stream.getvalue())
    assert found.size == (320, 240) and found.format == "WEBP"
    uri = data_uri(stream.getvalue())
    assert uri is not None and len(uri) < 100_000 < len(stream.getvalue())


def test_transparency_is_white_as_the_models_see_it() -> None:
    pil = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    pil.new("RGBA", (64, 64), (255, 0, 0, 0)).save(stream, "TIFF")
    assert min(shown(stream.getvalue()).getpixel((5, 5))) > 250


def test_damaged_pictures_have_none() -> None:
    assert data_uri(b"") is None
    assert data_uri(picture("red")[:40] + bytes(20_000)) is None


def test_beta_is_not_a_setting_without_retrieval() -> None:
    rows = [row(m, s=0.5) | {"settings": {"hopfield": m == "cloob", "beta": 8.0, "seed": 3}} for m in ("cloob", "clip")]
    page = render_report({"rows": rows})
    cells = re.search(r"<th[^>]*>β</th>(.*?)</tr>", page, re.S)
    assert cells is not None
    assert re.findall(r"<td[^>]*>(.*?)</td>", cells[1]) == ["8", "–"]


def test_size_stays_small() -> None:
    queries = [ExampleQuery(f"q{i}", {m: [ShownPicture(bytes(picture("red")) + bytes(3000), "x", True, 0.1)] * 5
               for m in ("cloob", "clip")}) for i in range(12)]  # fmt: skip
    long = {m: [{"step": s, "loss": 1 / (s + 1)} for s in range(20_000)] for m in ("cloob", "clip")}
    assert len(render(queries=queries, curves=long).encode()) < 1_000_000


def test_write_is_whole_and_creates_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, full_results(), title="A title", notes="One note.")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert stat.S_ISREG(path.stat().st_mode)


def test_a_single_logged_step_is_a_number_and_no_dot() -> None:
    curves = {"cloob": [{"step": 1, "loss": 4.25, "effective_eigenvalues_image": 9}]}
    page = render(results={"rows": [row("cloob", s=0.5)]}, curves=curves)
    assert "one step: 4.250" in page and "one step: 9" in page and "<svg" not in page
    assert "The loss of the one step that was logged." in page


def test_a_long_caption_is_cut_where_it_is_shown() -> None:
    caption = "a red square and what is around it, " * 80
    found = {"cloob": [ShownPicture(picture("red"), caption, True, 0.1)]}
    page = render(queries=[ExampleQuery(caption, found)])
    heading = re.search(r"<h3 title[^>]*>([^<]*)</h3>", page)
    assert heading is not None and heading[1].endswith("…") and 80 < len(heading[1]) <= 160
    assert page.count(caption) == 1  # whole where the pointer rests on the query
    assert numbers.shortened("x" * 500) == "x" * 159 + "…"
    assert numbers.shortened(" two\nlines ") == "two lines"


def test_the_headline_is_the_first_heading_of_the_page_and_the_only_one_of_its_kind() -> None:
    levels = re.findall(r"<h([1-6])[ >]", render())
    assert levels[0] == "1" and levels.count("1") == 1


def test_a_card_does_not_read_like_another_model() -> None:
    page = render(results={"rows": [row("cloob", s=0.5), row("a", s=0.4) | {"objective": "cloob"}]})
    assert "<span>objective: cloob</span>" in page and "<span>cloob</span>" not in page


# --- the page in a browser


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Any:
    path = tmp_path / "report.html"
    results = full_results()
    results["rows"][0]["zeroshot"][EVIL] = {"acc1": 0.5}
    checkpoints = {"cloob": [{"step": s, "epoch": s / 2, "effective_eigenvalues_image": s} for s in (2, 4, 6)]}
    twins = {
        "clip": [(ShownPicture(picture("red"), "one", False, 0.99), ShownPicture(picture("blue"), "two", False, 0.99))]
    }
    extras = ReportExtras(full_curves(), checkpoints, full_queries(), full_confusions(), twins)
    write_report(path, results, extras, title="A & B", notes=EVIL)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get_log("browser")
    browser.get(path.as_uri())
    return browser


def test_page_loads_without_a_console_message_and_fits_a_phone(page: Any) -> None:
    assert page.title == "A & B"
    assert page.get_log("browser") == []
    kinds = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name.slice(0, 5))")
    assert set(kinds) <= {"data:"}
    images = page.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth > 0, i.alt])")
    assert len(images) == 14 and all(map(all, images))  # 10 found, 2 similar, 2 confusion pictures of two classes
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    page.refresh()
    width, inner = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner == 390


def column(page: Any, table: str, header: int) -> list[str]:
    cells: list[str] = page.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map(r => r.cells[arguments[1]].dataset.v)",
        table,
        header,
    )
    return cells


def test_tables_sort_by_mouse_and_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    before = column(page, "table-zeroshot", 3)
    assert before.count("") == 2  # one NaN, and the set that has no top-5; wherever they stood, they sort last
    heads = page.find_elements("css selector", "#table-zeroshot thead tr:last-child th")
    button = heads[3].find_element("css selector", "button")
    button.click()
    assert heads[3].get_attribute("aria-sort") == "descending"
    known = sorted((float(v) for v in before if v), reverse=True)
    assert column(page, "table-zeroshot", 3) == [*(f"{v:g}" for v in known), "", ""]
    button.send_keys(Keys.ENTER)
    assert heads[3].get_attribute("aria-sort") == "ascending"
    assert column(page, "table-zeroshot", 3) == [*(f"{v:g}" for v in reversed(known)), "", ""]
    heads[1].find_element("css selector", "button").send_keys(Keys.SPACE)
    assert heads[1].get_attribute("aria-sort") == "ascending"
    assert heads[3].get_attribute("aria-sort") is None
    models = column(page, "table-zeroshot", 1)
    assert models == sorted(models)
    assert page.get_log("browser") == []
