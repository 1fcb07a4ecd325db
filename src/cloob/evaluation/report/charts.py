"""The charts of the report: matplotlib draws the lines, the page gives them their
colours, so that they are readable in the light and in the dark.

No text of a user is drawn: names stand in the legend, which the template writes.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cloob.errors import require
from cloob.evaluation.report.tables import Row, count, decimal, set_names

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model -> the lines of its metrics.jsonl, or what was measured of its checkpoints."""

N_COLOURS = 8
SIDES = {
    "image": "Image embeddings",
    "text": "Text embeddings",
    "a": "Embeddings of a",
    "b": "Embeddings of b",
}
_SIZE = (5.0, 3.0)  # inches of 72 CSS pixels: as wide as a phone, where text stays 1:1
_MAX_POINTS = 160
# Below this share of their sum an eigenvalue of float32 embeddings is rounding.
_ROUNDING = 1e-9
# matplotlib's colour "#c0ffe3" becomes the page's var(--c3).
_COLOUR = "#c0ffe{}"
_TEXT, _AXIS = _COLOUR.format(8), _COLOUR.format(9)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cloob",  # equal charts are equal bytes
    "font.size": 11,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _AXIS,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _AXIS,
    "xtick.color": _AXIS,
    "xtick.labelcolor": _TEXT,
    "ytick.color": _AXIS,
    "ytick.labelcolor": _TEXT,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Line:
    """A line of a chart and what the legend says of it."""

    model: str
    colour: int
    x: np.ndarray
    y: np.ndarray
    remark: str
    band: tuple[np.ndarray, np.ndarray] | None = None  # least and greatest around it
    marked: int | None = None  # the place of a point that stands out


@dataclass(frozen=True)
class Axes:
    """What stands at the axes."""

    x: str
    y: str
    is_log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing; ``label`` describes it for those who cannot see it."""

    heading: str
    label: str
    lines: Sequence[Line]
    axes: Axes

    @property
    def is_binned(self) -> bool:
        return any(line.band is not None for line in self.lines)

    def svg(self) -> str:
        """The drawing as an element of an HTML page."""
        # It would tell of its cache of fonts on the terminal.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        matplotlib = require("matplotlib", "train")
        with matplotlib.rc_context(_STYLE):
            from matplotlib.figure import Figure

            figure = Figure(_SIZE, layout="constrained")
            plot = figure.subplots()
            plot.margins(y=0.1)
            for line in self.lines:
                _draw(plot, line)
            plot.set_xlabel(self.axes.x, loc="right")
            plot.set_title(self.axes.y, loc="left", fontsize="medium")
            if self.axes.from_zero:
                plot.set_ylim(bottom=0)
            if self.axes.is_log:
                plot.set_yscale("log")
                plot.yaxis.set_major_formatter("{x:g}")
                plot.minorticks_off()
            stream = io.StringIO()
            figure.savefig(
                stream, format="svg", transparent=True, metadata=_NO_METADATA
            )
        return _for_page(stream.getvalue())


_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _draw(plot: Any, line: Line) -> None:
    """Draws a line with its band and its marked point."""
    colour = _COLOUR.format(line.colour % N_COLOURS)
    style = "-" if line.colour < N_COLOURS else "--"
    marker = "o" if len(line.x) < 20 else None
    plot.plot(line.x, line.y, style, color=colour, marker=marker, markersize=4)
    if line.band is not None:
        low, high = line.band
        plot.fill_between(line.x, low, high, color=colour, alpha=0.16, linewidth=0)
    if line.marked is not None:
        plot.plot(line.x[line.marked], line.y[line.marked], "o", color=colour)


def _for_page(svg: str) -> str:
    """The element alone, in the colours of the page; HTML needs no namespaces."""
    element = svg[svg.index("<svg") :]
    element = re.sub(
        r' (xmlns|xmlns:xlink|width|height)="[^"]*(//|pt)[^"]*"', "", element
    )
    return re.sub(_COLOUR.format(r"(\d)"), r"var(--c\1)", element)


def loss_charts(curves: Records, colours: Mapping[str, int]) -> list[Chart]:
    """The training loss of every model, each on a scale of its own."""
    charts = []
    for model, metrics in curves.items():
        steps, losses = _finite(metrics)
        if not len(steps):
            continue
        remark = f"last {decimal(losses[-1])}"
        skipped = sum("loss" in entry and entry["loss"] is None for entry in metrics)
        if skipped:
            remark += f", {skipped} skipped or not finite"
        line = _binned(Line(model, colours[model], steps, losses, remark))
        label = f"Training loss of {model} by step"
        charts.append(Chart(model, label, [line], Axes("step", "loss")))
    return charts


def _finite(metrics: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses, by step, of the losses that are finite."""
    points = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    steps, losses = np.array(sorted(points), float).reshape(-1, 2).T
    usable = np.isfinite(losses)
    return steps[usable], losses[usable]


def _binned(line: Line) -> Line:
    """A line of many points as means of stretches, with a band of their extremes."""
    if len(line.x) <= _MAX_POINTS:
        return line
    stretches = np.array_split(line.y, _MAX_POINTS)
    x = np.array([part.mean() for part in np.array_split(line.x, _MAX_POINTS)])
    y = np.array([part.mean() for part in stretches])
    low = np.array([part.min() for part in stretches])
    high = np.array([part.max() for part in stretches])
    return Line(line.model, line.colour, x, y, line.remark, (low, high))


def checkpoint_charts(runs: Records, colours: Mapping[str, int]) -> list[Chart]:
    """The paper's figure: effective eigenvalues over the checkpoints of runs that have
    several with a step.
    """
    dated = {}
    for model, points in runs.items():
        with_step = [point for point in points if point["step"] is not None]
        if len(with_step) > 1:
            dated[model] = with_step
    epochs = [point["epoch"] for points in dated.values() for point in points]
    unit = "step" if None in epochs else "epoch"
    axes = Axes(unit, "effective eigenvalues", from_zero=True)
    charts = []
    for side, heading in SIDES.items():
        lines = _counts(dated, colours, unit, f"effective_eigenvalues_{side}")
        if lines:
            label = f"Effective eigenvalues of the {heading.lower()} by {unit}"
            charts.append(Chart(heading, label, lines, axes))
    return charts


def _counts(
    runs: Records, colours: Mapping[str, int], unit: str, key: str
) -> list[Line]:
    """A line a run: how a count changes over its checkpoints."""
    lines = []
    for model, points in runs.items():
        measured = sorted((each[unit], each[key]) for each in points if key in each)
        if measured:
            x, y = np.array(measured, float).T
            remark = f"{count(y[0])} → {count(y[-1])}"
            lines.append(Line(model, colours[model], x, y, remark))
    return lines


def spectrum_charts(
    rows: Sequence[Row], colours: Mapping[str, int]
) -> dict[str, list[Chart]]:
    """By set: eigenvalue spectra as shares of their sum, with the 99 % count marked."""
    axes = Axes("eigenvalue, by size", "share of the variance", is_log=True)
    charts: dict[str, list[Chart]] = {}
    for name in set_names(rows, "geometry"):
        charts[name] = []
        measured = [row for row in rows if name in row.get("geometry", {})]
        for side, heading in SIDES.items():
            lines = []
            for row in measured:
                numbers = row["geometry"][name]
                if sum(numbers.get(f"spectrum_{side}", ())) > 0:
                    model = row["model"]
                    lines.append(_spectrum(model, colours[model], numbers, side))
            if lines:
                label = f"Eigenvalue spectrum of the {side} embeddings on {name}"
                charts[name].append(Chart(heading, label, lines, axes))
    return charts


def _spectrum(model: str, colour: int, numbers: Mapping[str, Any], side: str) -> Line:
    """A model's line of eigenvalues of a side, as shares of their sum."""
    spectrum = np.array(numbers[f"spectrum_{side}"])
    shares = spectrum / spectrum.sum()
    shares = shares[shares > _ROUNDING]
    n_effective = numbers[f"effective_eigenvalues_{side}"]
    marked = n_effective - 1 if 0 < n_effective <= len(shares) else None
    remark = f"{count(n_effective)} of {len(spectrum)} hold 99 %"
    ranks = np.arange(1, len(shares) + 1)
    return Line(model, colour, ranks, shares, remark, marked=marked)
