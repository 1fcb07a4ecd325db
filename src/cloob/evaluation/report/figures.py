"""The figures: loss curves, effective eigenvalues during training, spectra, recall of single classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloob.evaluation.report import numbers
from cloob.evaluation.report.numbers import count, number
from cloob.evaluation.report.plots import Point, Series, line_chart, thin

CLASSES_SHOWN = 8
SPECTRUM_POINTS = 200


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and legend (name, colour, remark); ``svg`` is empty where the legend says it all."""

    heading: str
    svg: str
    legend: Sequence[tuple[str, int, str]]
    binned: bool = False


def _curve(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[Point], int]:
    """(step, value) of every entry with a finite value, by step, and how many had one that is null or not finite."""
    points, broken = [], 0
    for i, entry in enumerate(metrics):
        value = numbers.number(entry.get(key))
        step = numbers.number(entry.get("step"))
        if value is not None:
            points.append((float(i) if step is None else step, value))
        broken += value is None and key in entry
    return sorted(points), broken


def losses(curves: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, int]) -> list[Figure]:
    """A loss panel for each model, each on its own scale."""
    figures = []
    for model, metrics in curves.items():
        points, broken = _curve(metrics, "loss")
        line, band = thin(points)
        label = f"Training loss of {model} by step"
        series = Series(model, colours[model], line, band)
        svg = line_chart([series], label=label, x_label="step", y_label="loss")
        if line:
            remark = f"last {numbers.decimal(line[-1][1])}" if svg else f"one step: {numbers.decimal(line[0][1])}"
            remark += f", {broken} skipped or not finite" if broken else ""
            figures.append(Figure(model, svg, [(model, colours[model], remark)], binned=bool(band)))
    return figures


def training_geometry(curves: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, int]) -> list[Figure]:
    """Effective eigenvalues by step, image and text, all models on one scale."""
    figures = []
    for key, heading in (
        ("effective_eigenvalues_image", "Image embeddings"),
        ("effective_eigenvalues_text", "Text embeddings"),
    ):
        series = []
        for model, metrics in curves.items():
            line, band = thin(_curve(metrics, key)[0])
            if line:
                series.append(Series(model, colours[model], line, band))
        svg = line_chart(
            series,
            label=f"Effective eigenvalues of the {heading.lower()} by training step",
            x_label="step",
            y_label="effective eigenvalues",
            from_zero=True,
        )
        if series:
            last = "last" if svg else "one step:"
            legend = [(s.name, s.colour, f"{last} {numbers.count(round(s.points[-1][1], 1))}") for s in series]
            figures.append(Figure(heading, svg, legend))
    return figures


def by_epoch(runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, int]) -> list[Figure]:
    """The paper's figure: effective eigenvalues over the checkpoints of runs, images and texts on one scale each.

    Args:
        runs: Model -> its checkpoints, see :func:`cloob.evaluation.analysis.analyze`; a run needs two that have a step.
        colours: Of the models.
    """
    dated = {model: [c for c in run if number(c.get("step")) is not None] for model, run in runs.items()}
    lines = {model: checkpoints for model, checkpoints in dated.items() if len(checkpoints) > 1}
    points = [checkpoint for checkpoints in lines.values() for checkpoint in checkpoints]
    unit = "epoch" if points and all(number(point.get("epoch")) is not None for point in points) else "step"
    drawn = []
    for side, heading in (("image", "Image embeddings"), ("text", "Text embeddings")):
        series, legend = [], []
        for model, checkpoints in lines.items():
            key = f"effective_eigenvalues_{side}"
            pairs = [(number(point[unit]), number(point.get(key))) for point in checkpoints]
            line = sorted((x, y) for x, y in pairs if x is not None and y is not None)
            if line:
                series.append(Series(model, colours[model], line, dots=True))
                legend.append((model, colours[model], f"{count(line[0][1])} → {count(line[-1][1])}"))
        label = f"Effective eigenvalues of the {heading.lower()} by {unit}"
        svg = line_chart(series, label=label, x_label=unit, y_label="effective eigenvalues", from_zero=True)
        if svg:
            drawn.append(Figure(heading, svg, legend))
    return drawn


def spectra(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> list[tuple[str, list[Figure]]]:
    """Per set: eigenvalue spectra as shares of their sum, image and text, with the 99 % count marked."""
    sections = []
    for name in numbers.set_names(rows, "geometry"):
        figures = [_spectrum(rows, colours, name, side) for side in ("image", "text")]
        if drawn := [figure for figure in figures if figure.svg]:
            sections.append((name, drawn))
    return sections


def _spectrum(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, int], name: str, side: str) -> Figure:
    """The spectra of all models on one set, of the ``side`` "image" or "text"."""
    series, legend = [], []
    for row in rows:
        values = numbers.part(row, "geometry").get(name, {})
        model = row["model"]
        line, total = _shares(values.get(f"spectrum_{side}", ()))
        if not line:
            continue
        k = float(values[f"effective_eigenvalues_{side}"])
        share = dict(line).get(k)
        mark = None if share is None else (k, share, numbers.count(k))
        series.append(Series(model, colours[model], _sparse(line), mark=mark))
        legend.append((model, colours[model], f"{numbers.count(k)} of {total} hold 99 %"))
    svg = line_chart(
        series,
        label=f"Eigenvalue spectrum of the {side} embeddings on {name}, logarithmic",
        x_label="eigenvalue, by size",
        y_label="share of the variance",
        log_y=True,
    )
    return Figure(f"{side.capitalize()} embeddings", svg, legend)


def _shares(spectrum: Sequence[float]) -> tuple[list[Point], int]:
    """(rank from 1, eigenvalue / sum) of the positive eigenvalues, and how many eigenvalues there are."""
    values = [max(value, 0.0) for value in spectrum]
    total = sum(values)
    # Below 1e-9 of the sum an eigenvalue of float32 embeddings is rounding error and would stretch the axis.
    return [(k, v / total) for k, v in enumerate(values, 1) if total > 0 and v / total > 1e-9], len(values)


def _sparse(line: Sequence[Point]) -> list[Point]:
    """At most ``SPECTRUM_POINTS`` of the points, evenly by rank, with the first and the last."""
    n = len(line)
    if n <= SPECTRUM_POINTS:
        return list(line)
    return [line[round(i * (n - 1) / (SPECTRUM_POINTS - 1))] for i in range(SPECTRUM_POINTS)]


def classes(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per set: the classes the models know best and least, and, for two models, where they differ most.

    A set with fewer than three images per class is left out: its recalls are 0, ½ or 1, which ranks nothing.
    """
    figures = []
    for set_name in numbers.set_names(rows, "zeroshot"):
        recalls: dict[str, dict[str, float]] = {}
        for row in rows:
            result = numbers.part(row, "zeroshot").get(set_name)
            if result and result["n"] >= 3 * len(result["per_class"]):
                recalls[row["model"]] = result["per_class"]
        if recalls:
            figures.append({"set": set_name, "groups": _class_groups(recalls, colours)})
    return figures


def _class_groups(
    recalls: Mapping[str, Mapping[str, float]], colours: Mapping[str, int]
) -> list[tuple[str, list[dict[str, Any]]]]:
    names = [n for n in next(iter(recalls.values())) if all(n in other for other in recalls.values())]
    ordered = sorted(names, key=lambda name: -sum(recall_of[name] for recall_of in recalls.values()))
    n = CLASSES_SHOWN
    if len(ordered) <= 2 * n:
        picked = [("All classes", ordered)]
    else:
        picked = [("Best", ordered[:n]), ("Worst", ordered[-n:])]
        if len(recalls) == 2:
            (a, first), (b, second) = recalls.items()
            apart = sorted(ordered, key=lambda name: second[name] - first[name])
            picked += [
                (f"{a} ahead most", [name for name in apart[:n] if first[name] > second[name]]),
                (f"{b} ahead most", [name for name in reversed(apart[-n:]) if second[name] > first[name]]),
            ]
    return [
        (
            title,
            [
                {
                    "name": name,
                    "bars": [
                        {
                            "model": model,
                            "colour": colours[model],
                            "text": f"{100 * recall_of[name]:.0f}",
                            "width": round(100 * min(max(recall_of[name], 0.0), 1.0), 1),
                        }
                        for model, recall_of in recalls.items()
                    ],
                }
                for name in chosen
            ],
        )
        for title, chosen in picked
        if chosen
    ]
