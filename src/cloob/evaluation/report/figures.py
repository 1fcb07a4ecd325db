"""The figures of the report: losses, effective eigenvalues during training, spectra, recalls of single classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cloob.evaluation.report.numbers import Row, count, decimal, number, part, set_names
from cloob.evaluation.report.plots import Point, Series, line_chart, thin

_CLASSES_SHOWN = 8
_SPECTRUM_POINTS = 200
_SIDES = (("image", "Image embeddings"), ("text", "Text embeddings"))

Lines = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model -> the lines of its metrics.jsonl, or what was measured of its checkpoints."""


class Figure(NamedTuple):
    """A chart with its heading and legend (name, colour, remark); ``svg`` is empty if the legend says it all."""

    heading: str
    svg: str
    legend: list[tuple[str, int, str]]
    binned: bool = False


def losses(curves: Lines, colours: Mapping[str, int]) -> list[Figure]:
    """The training loss of each model, on its own scale."""
    figures = []
    for model, metrics in curves.items():
        points, broken = _curve(metrics, "loss")
        line, band = thin(points)
        series = Series(model, colours[model], line, band)
        svg = line_chart([series], label=f"Training loss of {model} by step", x_label="step", y_label="loss")
        if line:
            remark = f"last {decimal(line[-1][1])}" if svg else f"one step: {decimal(line[0][1])}"
            remark += f", {broken} skipped or not finite" if broken else ""
            figures.append(Figure(model, svg, [(model, colours[model], remark)], binned=bool(band)))
    return figures


def training_geometry(curves: Lines, colours: Mapping[str, int]) -> list[Figure]:
    """Effective eigenvalues by step, all models on one scale."""
    figures = []
    for side, heading in _SIDES:
        lines = {model: thin(_curve(metrics, f"effective_eigenvalues_{side}")[0]) for model, metrics in curves.items()}
        series = [Series(model, colours[model], *line) for model, line in lines.items() if line[0]]
        svg = _eigenvalues(series, f"{heading.lower()} by training step", "step")
        if series:
            last = "last" if svg else "one step:"
            legend = [(s.name, s.colour, f"{last} {count(round(s.points[-1][1], 1))}") for s in series]
            figures.append(Figure(heading, svg, legend))
    return figures


def by_epoch(runs: Lines, colours: Mapping[str, int]) -> list[Figure]:
    """The paper's figure: effective eigenvalues over the checkpoints of runs that have several with a step."""
    dated = {model: [c for c in run if c["step"] is not None] for model, run in runs.items()}
    lines = {model: checkpoints for model, checkpoints in dated.items() if len(checkpoints) > 1}
    has_epochs = all(point["epoch"] is not None for checkpoints in lines.values() for point in checkpoints)
    unit = "epoch" if has_epochs else "step"
    figures = []
    for side, heading in _SIDES:
        key = f"effective_eigenvalues_{side}"
        series = []
        for model, checkpoints in lines.items():
            if line := sorted((float(c[unit]), float(c[key])) for c in checkpoints if key in c):
                series.append(Series(model, colours[model], line, dots=True))
        if svg := _eigenvalues(series, f"{heading.lower()} by {unit}", unit):
            legend = [(s.name, s.colour, f"{count(s.points[0][1])} → {count(s.points[-1][1])}") for s in series]
            figures.append(Figure(heading, svg, legend))
    return figures


def spectra(rows: Sequence[Row], colours: Mapping[str, int]) -> list[tuple[str, list[Figure]]]:
    """Per set: eigenvalue spectra as shares of their sum, with the 99 % count marked."""
    sections = []
    for name in set_names(rows, "geometry"):
        figures = [_spectrum(rows, colours, name, side, heading) for side, heading in _SIDES]
        if drawn := [figure for figure in figures if figure.svg]:
            sections.append((name, drawn))
    return sections


def classes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per set: the classes that the models know best and worst, and, for two models, where they differ most.

    A set with fewer than three images per class is left out: its recalls rank nothing.
    """
    figures = []
    for name in set_names(rows, "zeroshot"):
        found = {row["model"]: part(row, "zeroshot")[name] for row in rows if name in part(row, "zeroshot")}
        recalls = {m: result["per_class"] for m, result in found.items() if result["n"] >= 3 * len(result["per_class"])}
        if recalls:
            groups = [(title, names) for title, names in _picked(recalls) if names]
            figures.append({"set": name, "groups": groups, "recalls": recalls})
    return figures


def _curve(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[Point], int]:
    """(step, value) of the lines with a finite value, by step, and how many lines have another one."""
    points, broken = [], 0
    for i, entry in enumerate(metrics):
        value, step = number(entry.get(key)), number(entry.get("step"))
        if value is not None:
            points.append((float(i) if step is None else step, value))
        broken += value is None and key in entry
    return sorted(points), broken


def _eigenvalues(series: Sequence[Series], of: str, x_label: str) -> str:
    label = f"Effective eigenvalues of the {of}"
    return line_chart(series, label=label, x_label=x_label, y_label="effective eigenvalues", from_zero=True)


def _spectrum(rows: Sequence[Row], colours: Mapping[str, int], name: str, side: str, heading: str) -> Figure:
    series, legend = [], []
    for row in rows:
        if name not in part(row, "geometry"):
            continue
        values, model = part(row, "geometry")[name], row["model"]
        spectrum = [max(value, 0.0) for value in values[f"spectrum_{side}"]]
        total = sum(spectrum) or 1.0
        # Below 1e-9 of the sum an eigenvalue of float32 embeddings is rounding error and would stretch the axis.
        line = [(float(rank), v / total) for rank, v in enumerate(spectrum, 1) if v / total > 1e-9]
        if line:
            k = values[f"effective_eigenvalues_{side}"]
            mark = (float(k), line[k - 1][1], count(k)) if k <= len(line) else None
            series.append(Series(model, colours[model], _sparse(line), mark=mark))
            legend.append((model, colours[model], f"{count(k)} of {len(spectrum)} hold 99 %"))
    svg = line_chart(
        series,
        label=f"Eigenvalue spectrum of the {side} embeddings on {name}, logarithmic",
        x_label="eigenvalue, by size",
        y_label="share of the variance",
        log_y=True,
    )
    return Figure(heading, svg, legend)


def _sparse(line: list[Point]) -> list[Point]:
    """At most ``_SPECTRUM_POINTS`` of the points, evenly by rank, with the first and the last."""
    n = len(line)
    if n <= _SPECTRUM_POINTS:
        return line
    return [line[round(i * (n - 1) / (_SPECTRUM_POINTS - 1))] for i in range(_SPECTRUM_POINTS)]


def _picked(recalls: Mapping[str, Mapping[str, float]]) -> list[tuple[str, list[str]]]:
    """Groups of classes, each with its title."""
    first, *others = recalls.values()
    names = [name for name in first if all(name in other for other in others)]
    ordered = sorted(names, key=lambda name: -sum(of_class[name] for of_class in recalls.values()))
    n = _CLASSES_SHOWN
    if len(ordered) <= 2 * n:
        return [("All classes", ordered)]
    picked = [("Best", ordered[:n]), ("Worst", ordered[-n:])]
    if len(recalls) == 2:
        (a, of_a), (b, of_b) = recalls.items()
        apart = sorted(ordered, key=lambda name: of_b[name] - of_a[name])
        picked += [
            (f"{a} ahead most", [name for name in apart[:n] if of_a[name] > of_b[name]]),
            (f"{b} ahead most", [name for name in reversed(apart[-n:]) if of_b[name] > of_a[name]]),
        ]
    return picked
