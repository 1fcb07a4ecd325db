"""Writes the report of an evaluation: one HTML file without network, readable on a
phone, in print and in the dark.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cloob.errors import require
from cloob.evaluation.report import charts, tables
from cloob.evaluation.report.charts import nice_ticks, tick_text
from cloob.evaluation.report.tables import (
    METRICS,
    MISSING,
    Row,
    count,
    decimal,
    duration,
    percent,
    points,
)
from cloob.files import write_whole
from cloob.pictures import Unreadable, data_uri

_FOLDER = Path(__file__).parent
# pixels: a picture is at most 160 wide on the page, twice that on a dense screen
_SIDE = 320
# part of a row -> the metric of the headline, and how many answers there are to guess
# from
_KINDS = {
    "zeroshot": ("acc1", "n_classes"),
    "retrieval": ("text_to_image@1", "n_images"),
    "vectors": ("a_to_b@1", "n_ids"),
}


@dataclass(frozen=True)
class ShownPicture:
    """One picture next to a query."""

    image: bytes  # encoded
    label: str  # its class or caption
    correct: bool  # whether it answers the query
    score: float  # the similarity that ranked it


@dataclass(frozen=True)
class ExampleQuery:
    """A text, and model -> the pictures nearest to it, best first."""

    query: str
    answers: dict[str, list[ShownPicture]]


def write_report(
    path: Path,
    results: Mapping[str, Any],
    *,
    title: str = "Report",
    notes: Sequence[str] = (),
    curves: charts.Lines | None = None,  # the lines of metrics.jsonl
    checkpoints: charts.Lines | None = None,  # what was measured of each
    queries: Sequence[ExampleQuery] = (),
    searches: Sequence[
        ExampleQuery
    ] = (),  # without right answers; they come first, the first model's pictures large
) -> None:
    """Writes the report of what :func:`cloob.evaluate` returned; equal arguments give
    equal bytes.

    ``notes`` are paragraphs under the title; curves, checkpoints and pictures are by
    model.
    """
    rows = results["rows"]
    curves = curves or {}
    checkpoints = checkpoints or {}
    names = [*(row["model"] for row in rows), *curves, *checkpoints]
    colours = {name: i for i, name in enumerate(dict.fromkeys(names))}
    what = measure(rows)
    gaps = differences(results, what.key) if what else {}
    verdict = find_verdict(results, what, gaps)
    problems = {kind: some for kind, some in tables.problems(results).items() if some}
    jinja2 = require("jinja2", "train")
    options = {
        "autoescape": True,
        "undefined": jinja2.StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), **options)
    environment.filters |= {"data_uri": _data_uri, "setting": _setting}
    environment.filters |= {
        form.__name__: form for form in (count, decimal, duration, percent)
    }
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html.j2").render(
        css=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(
            hashlib.sha256(script.encode()).digest()
        ).decode(),
        title=title,
        notes=notes,
        colours=colours,
        rows=rows,
        verdict=verdict,
        measure=what,
        metric=METRICS[what.key] if what else None,
        forest=forest(what, gaps, colours, verdict) if what else None,
        problems=[(tables.PROBLEMS[kind], some) for kind, some in problems.items()],
        tables=tables.result_tables(results, colours),
        queries=queries,
        searches=searches,
        by_epoch=charts.by_epoch(checkpoints, colours),
        losses=charts.losses(curves, colours),
        training=charts.training_geometry(curves, colours),
        spectra=charts.spectra(rows, colours),
        settings=_settings(rows),
    )
    write_whole(path, page, f"{path}: the report cannot be written here")


def _data_uri(picture: bytes) -> str | None:
    try:
        return data_uri(picture, _SIDE)
    except Unreadable:
        return None


def _settings(rows: Sequence[Row]) -> list[tuple[str, list[Any]]]:
    """(name, value per model) of the settings that any model has."""
    per_model = [
        {"objective": row.get("objective"), **row.get("settings", {})} for row in rows
    ]
    for settings in per_model:
        if settings.get("hopfield") is False:  # β is without effect
            settings |= {"beta": None, "learnable_beta": None}
    table = []
    for key in dict.fromkeys(key for settings in per_model for key in settings):
        values = [settings.get(key) for settings in per_model]
        if any(value is not None for value in values):
            table.append(
                (tables.SETTINGS.get(key, key.replace("_", " ").capitalize()), values)
            )
    return table


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        MISSING
        if value is None
        else f"{value:.5g}"
        if isinstance(value, float)
        else str(value)
    )


# The headline


class Estimate(NamedTuple):
    """A fraction, or a difference of two, with its interval."""

    value: float
    low: float
    high: float


Gaps = Mapping[tuple[str, str, str | None], Estimate]
"""(model, baseline, set) -> model − baseline; of the set None on the mean of the sets.
"""


@dataclass(frozen=True)
class Measure:
    key: str
    values: Mapping[str, Mapping[str, Estimate]]  # model -> set -> estimate
    guessing: Mapping[str, float]  # set -> what guessing gives
    sets: Sequence[str]  # that every model was measured on

    def mean(self, model: str) -> float:
        return sum(self.values[model][name].value for name in self.sets) / len(
            self.sets
        )


def measure(rows: Sequence[Row]) -> Measure | None:
    """Zero-shot top-1 if it was measured, else text → image recall@1 or that of a → b,
    else None.
    """
    for kind, (key, choices) in _KINDS.items():
        values: dict[str, dict[str, Estimate]] = {}
        guessing: dict[str, float] = {}
        for row in rows:
            for name, numbers in row.get(kind, {}).items():
                values.setdefault(row["model"], {})[name] = Estimate(
                    numbers[key], *numbers[f"{key}_interval"]
                )
                guessing[name] = 1 / numbers[choices]
        if sets := [
            name
            for name in guessing
            if all(name in of_set for of_set in values.values())
        ]:
            return Measure(key, values, guessing, sets)
    return None


def differences(results: Mapping[str, Any], key: str) -> Gaps:
    """The differences of a metric, both ways round."""
    result = {}
    for entry in results["differences"]:
        if entry["metric"] == key:
            model, baseline, name = entry["model"], entry["baseline"], entry["set"]
            gap = Estimate(entry["difference"], entry["low"], entry["high"])
            result[model, baseline, name] = gap
            result[baseline, model, name] = Estimate(-gap.value, -gap.high, -gap.low)
    return result


class Verdict(NamedTuple):
    """One sentence, the facts that support it, and the two best models."""

    title: str
    detail: str
    leader: str | None = None
    runner_up: str | None = None


def find_verdict(
    results: Mapping[str, Any], what: Measure | None, gaps: Gaps
) -> Verdict:
    """Which model is ahead, and by how much.

    Two models do not differ clearly if the interval of their difference includes zero.
    No model leads if the best one's interval includes guessing.
    """
    if what is None:
        return _geometry_verdict(results["rows"])
    sets = what.sets
    where = f"on {sets[0]}" if len(sets) == 1 else f"on average over {len(sets)} sets"
    order = sorted(what.values, key=what.mean, reverse=True)
    # models whose interval of the mean includes guessing; distances of independent sets
    # add squared
    guessing = []
    for model in order:
        below = math.hypot(
            *(
                what.values[model][name].value - what.values[model][name].low
                for name in sets
            )
        )
        if len(sets) * what.mean(model) - below <= sum(
            what.guessing[name] for name in sets
        ):
            guessing.append(model)
    if len(order) == 1:
        title = f"{order[0]}: {percent(what.mean(order[0]))}\u00a0% {METRICS[what.key]}"
        return Verdict(
            title + (", no clear difference from guessing" if guessing else ""),
            f"Measured {where}.",
        )
    a, b = order[:2]
    leads = {
        other: gaps[a, other, sets[0] if len(sets) == 1 else None]
        for other in order[1:]
    }
    gap, low, high = leads[b]
    clear = "clear of zero" if low > 0 else "which includes zero"
    sentences = [
        f"{percent(what.mean(a))}\u00a0% against {percent(what.mean(b))}\u00a0%"
        f" {METRICS[what.key]} {where}: {points(gap)} points,"
        f" {100 * results['level']:g}\u00a0% interval {points(low)} to {points(high)},"
        f" {clear}"
    ]
    if len(sets) > 1:
        wins = sum(
            what.values[a][name].value > what.values[b][name].value for name in sets
        )
        sentences.append(f"Ahead of {b} on {wins} of {len(sets)} sets")
    if guessing and a not in guessing:
        sentences.append(f"Not clearly above guessing: {_listed(guessing)}")
    elsewhere = []
    for entry in results["differences"]:
        models = [entry["model"], entry["baseline"]]
        clear_there = entry["low"] > 0 or entry["high"] < 0
        if (
            clear_there
            and entry["metric"] != what.key
            and entry["set"] is not None
            and a in models
        ):
            side = (
                "ahead of"
                if (entry["difference"] > 0) == (a == entry["model"])
                else "behind"
            )
            by = (
                f"{percent(abs(entry['difference']))} points in"
                f" {METRICS[entry['metric']]}"
            )
            elsewhere.append(
                f"{a} is {side} {models[1 - models.index(a)]} by {by} on {entry['set']}"
            )
    sentences += elsewhere[:3]
    level = [other for other, lead in leads.items() if lead.low <= 0]
    behind = [other for other in order[1:] if other not in level]
    title = f"{a} is ahead of {b}" if len(order) == 2 else f"{a} leads, {b} follows"
    if a in guessing:
        title = "No clear difference from guessing"
    elif what.mean(a) == what.mean(b):
        title = f"{a} and {b} are level"
    elif b in level:
        title = f"No clear difference between {_listed([a, *level])}"
        title += (
            f"; {_listed(behind)} {'is' if len(behind) == 1 else 'are'} behind"
            if behind
            else ""
        )
    return Verdict(title, f"{'. '.join(sentences)}.", a, b)


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _geometry_verdict(rows: Sequence[Row]) -> Verdict:
    """Whose image embeddings use most directions, if only the geometry was measured."""
    result = {
        row["model"]: next(iter(row["geometry"].items()))
        for row in rows
        if row.get("geometry")
    }
    if not result:
        return Verdict(
            "Nothing to compare yet",
            "The results hold neither zero-shot nor retrieval numbers.",
        )
    counts = {
        model: values["effective_eigenvalues_image"]
        for model, (_, values) in result.items()
    }
    first, *others = sorted(counts, key=lambda model: -counts[model])
    title = f"{first}’s image embeddings use the most directions"
    if not others:
        title = f"{first}: {count(counts[first])} effective eigenvalues"
    elif counts[first] == counts[others[0]]:
        title = f"{first} and {others[0]} use equally many directions"
    listed = ", ".join(f"{model} {count(counts[model])}" for model in (first, *others))
    return Verdict(
        title,
        f"Effective eigenvalues of the image embeddings on {result[first][0]}:"
        f" {listed}.",
    )


def forest(
    what: Measure, gaps: Gaps, colours: Mapping[str, int], ahead: Verdict
) -> dict[str, Any]:
    """The headline's number for every set and model, and the difference of the two
    best, on one scale each.

    Positions are percentages of a track's width. Ticks are (position, text).
    """
    a, b = ahead.leader, ahead.runner_up
    between = {
        name: gap
        for (one, other, name), gap in gaps.items()
        if name is not None and (one, other) == (a, b)
    }
    ends = [
        end
        for of_set in what.values.values()
        for item in of_set.values()
        for end in item
    ]
    top = _ceiling([*ends, *what.guessing.values()])
    reach = _ceiling([end for gap in between.values() for end in gap])
    rows = []
    for name in what.guessing:
        measured = [
            (model, of_set[name])
            for model, of_set in what.values.items()
            if name in of_set
        ]
        row = {
            "name": name,
            "chance": round(100 * what.guessing[name] / top, 2),
            "difference": None,
        }
        row["spans"] = [
            _span(model, colours[model], result, 0.0, top, percent)
            for model, result in measured
        ]
        if (gap := between.get(name)) and (better := a if gap.value >= 0 else b):
            row["difference"] = _span(
                better, colours[better], gap, -reach, reach, points
            )
        rows.append(row)
    ticks = [
        (100 * t / top, tick_text(round(100 * t, 6))) for t in nice_ticks(0.0, top, 4)
    ]
    gap_ticks = [
        (50 + 50 * t / reach, tick_text(round(100 * t, 6)))
        for t in nice_ticks(-reach, reach, 4)
    ]
    return {"rows": rows, "ticks": ticks, "difference_ticks": gap_ticks}


def _ceiling(ends: Sequence[float]) -> float:
    """A round number a little above all values, as the end of an axis of fractions."""
    value = 1.04 * max([0.001, *map(abs, ends)])
    power = 10.0 ** math.floor(math.log10(value))
    return float(
        next(
            m * power for m in (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * power >= value
        )
    )


def _span(
    model: str,
    colour: int,
    estimate: Estimate,
    start: float,
    end: float,
    form: Callable[[float], str],
) -> dict[str, Any]:
    at, low, high = (
        round(min(max(100 * (x - start) / (end - start), 0.0), 100.0), 2)
        for x in estimate
    )
    shown = {
        "model": model,
        "colour": colour,
        "at": at,
        "low": low,
        "width": round(high - low, 2),
    }
    return {
        **shown,
        "text": form(estimate.value),
        "interval": f"{form(estimate.low)} to {form(estimate.high)}",
    }
