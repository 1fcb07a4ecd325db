"""The chart of the report, the paper's figure of effective eigenvalues: matplotlib
draws the lines, the page gives them their colours, so that they are readable in the
light and in the dark.

No text of a user is drawn: names stand in the legend, which the template writes.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cloob.errors import require
from cloob.evaluation.report.tables import count
from cloob.evaluation.results import Checkpoint

N_COLOURS = 8
_SIDES: Mapping[
    str, Literal["effective_eigenvalues_image", "effective_eigenvalues_text"]
] = {
    "Image embeddings": "effective_eigenvalues_image",
    "Text embeddings": "effective_eigenvalues_text",
}
_STYLE = Path(__file__).with_suffix(".mplstyle")
# matplotlib's colour "#c0ffe3" becomes the page's var(--c3).
_COLOUR = "#c0ffe{}"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Line:
    """How a count of a model changes over its checkpoints."""

    model: str
    colour: int
    x: np.ndarray
    y: Sequence[float]

    @property
    def remark(self) -> str:
        """What the legend says of it."""
        return f"{count(self.y[0])} → {count(self.y[-1])}"


@dataclass(frozen=True)
class Chart:
    """The effective eigenvalues of one side, by step or epoch."""

    heading: str
    unit: str
    lines: Sequence[Line]

    @property
    def label(self) -> str:
        """What it shows, for those who cannot see it."""
        return f"Effective eigenvalues of the {self.heading.lower()} by {self.unit}"

    def svg(self) -> str:
        """The drawing as an element of an HTML page."""
        # It would tell of its cache of fonts on the terminal.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        matplotlib = require("matplotlib", "train")
        with matplotlib.rc_context(fname=_STYLE):
            from matplotlib.figure import Figure

            figure = Figure(layout="constrained")
            plot = figure.subplots()
            plot.margins(y=0.1)
            for line in self.lines:
                colour = _COLOUR.format(line.colour % N_COLOURS)
                style = "o-" if line.colour < N_COLOURS else "o--"
                plot.plot(line.x, line.y, style, color=colour, markersize=4)
            plot.set_xlabel(self.unit, loc="right")
            plot.set_title("effective eigenvalues", loc="left", fontsize="medium")
            plot.set_ylim(bottom=0)
            stream = io.StringIO()
            figure.savefig(
                stream, format="svg", transparent=True, metadata=_NO_METADATA
            )
        return _for_page(stream.getvalue())


def _for_page(svg: str) -> str:
    """The element alone, in the colours of the page; HTML needs no namespaces."""
    element = svg[svg.index("<svg") :]
    element = re.sub(
        r' (xmlns|xmlns:xlink|width|height)="[^"]*(//|pt)[^"]*"', "", element
    )
    return re.sub(_COLOUR.format(r"(\d)"), r"var(--c\1)", element)


def checkpoint_charts(
    runs: Mapping[str, Sequence[Checkpoint]], colours: Mapping[str, int]
) -> list[Chart]:
    """The paper's figure: effective eigenvalues over the checkpoints of runs that have
    several.
    """
    runs = {model: points for model, points in runs.items() if len(points) > 1}
    if not runs:
        return []
    epochs = [point["epoch"] for points in runs.values() for point in points]
    unit: Literal["step", "epoch"] = "step" if None in epochs else "epoch"
    charts = []
    for heading, key in _SIDES.items():
        lines = []
        for model, points in runs.items():
            x = np.array([point[unit] for point in points], float)
            y = [point[key] for point in points]
            lines.append(Line(model, colours[model], x, y))
        charts.append(Chart(heading, unit, lines))
    return charts
