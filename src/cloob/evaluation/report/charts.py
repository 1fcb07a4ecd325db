"""The charts of the report: losses and effective eigenvalues during training, and
spectra; the template draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloob.evaluation.report.tables import Row, count, decimal, set_names

Point = tuple[float, float]
Lines = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model -> the lines of its metrics.jsonl, or what was measured of its checkpoints."""

_LEFT, _RIGHT, _TOP, _BOTTOM = (
    54,
    446,
    26,
    224,
)  # where the axes are, in a drawing of 460 × 264
_MAX_POINTS = 160
_SPECTRUM_POINTS = 200
_SIDES = {
    "image": "Image embeddings",
    "text": "Text embeddings",
    "a": "Embeddings of a",
    "b": "Embeddings of b",
}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class _Line:
    model: str
    colour: int
    points: Sequence[Point]  # by x
    remark: str  # in the legend
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high)
    mark: tuple[float, float, str] | None = None
    dots: bool = False


def losses(curves: Lines, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    figures = []
    for model, metrics in curves.items():
        points, band = _curve(metrics, "loss")
        if points:
            broken = sum("loss" in entry and entry["loss"] is None for entry in metrics)
            remark = f"last {decimal(points[-1][1])}" + (
                f", {broken} skipped or not finite" if broken else ""
            )
            line = _Line(model, colours[model], points, remark, band)
            figures.append(
                _figure(
                    model, [line], f"Training loss of {model} by step", "step", "loss"
                )
            )
    return figures


def training_geometry(
    curves: Lines, colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    lines = []
    for model, metrics in curves.items():
        for side in _SIDES:
            points, band = _curve(metrics, f"effective_eigenvalues_{side}")
            if points:
                lines.append(
                    (
                        side,
                        _Line(
                            model,
                            colours[model],
                            points,
                            f"last {count(round(points[-1][1], 1))}",
                            band,
                        ),
                    )
                )
    return _eigenvalues(lines, "training step", "step")


def by_epoch(runs: Lines, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """The paper's figure: effective eigenvalues over the checkpoints of runs that have
    several with a step.
    """
    dated = {
        model: [point for point in run if point["step"] is not None]
        for model, run in runs.items()
    }
    several = {model: points for model, points in dated.items() if len(points) > 1}
    unit = (
        "epoch"
        if all(point["epoch"] is not None for run in several.values() for point in run)
        else "step"
    )
    lines = []
    for model, run in several.items():
        for side in _SIDES:
            key = f"effective_eigenvalues_{side}"
            if points := sorted(
                (point[unit], point[key]) for point in run if key in point
            ):
                remark = f"{count(points[0][1])} → {count(points[-1][1])}"
                lines.append(
                    (side, _Line(model, colours[model], points, remark, dots=True))
                )
    return _eigenvalues(lines, unit, unit)


def _eigenvalues(
    lines: Sequence[tuple[str, _Line]], over: str, x_label: str
) -> list[dict[str, Any]]:
    figures = []
    for side, heading in _SIDES.items():
        if some := [line for of, line in lines if of == side]:
            label = f"Effective eigenvalues of the {heading.lower()} by {over}"
            figures.append(
                _figure(
                    heading,
                    some,
                    label,
                    x_label,
                    "effective eigenvalues",
                    from_zero=True,
                )
            )
    return figures


def spectra(
    rows: Sequence[Row], colours: Mapping[str, int]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Per set: eigenvalue spectra as shares of their sum, with the 99 % count
    marked.
    """
    sections = []
    for name in set_names(rows, "geometry"):
        figures = []
        for side, heading in _SIDES.items():
            lines = []
            for row in rows:
                values = row.get("geometry", {}).get(name, {})
                spectrum, k = (
                    values.get(f"spectrum_{side}", ()),
                    values.get(f"effective_eigenvalues_{side}"),
                )
                total = sum(spectrum) or 1.0
                # Below 1e-9 of the sum an eigenvalue of float32 embeddings is rounding
                # and would stretch the axis.
                points = [
                    (float(rank), v / total)
                    for rank, v in enumerate(spectrum, 1)
                    if v / total > 1e-9
                ]
                if points:
                    mark = (
                        (float(k), points[k - 1][1], count(k))
                        if 0 < k <= len(points)
                        else None
                    )
                    remark = f"{count(k)} of {len(spectrum)} hold 99 %"
                    thinned = points[:: len(points) // _SPECTRUM_POINTS + 1]
                    lines.append(
                        _Line(
                            row["model"],
                            colours[row["model"]],
                            thinned,
                            remark,
                            mark=mark,
                        )
                    )
            label = (
                f"Eigenvalue spectrum of the {side} embeddings on {name}, logarithmic"
            )
            axes = "eigenvalue, by size", "share of the variance"
            figures += (
                [_figure(heading, lines, label, *axes, log_y=True)] if lines else []
            )
        sections.append((name, figures))
    return sections


def _curve(
    metrics: Sequence[Mapping[str, Any]], key: str
) -> tuple[Sequence[Point], list[tuple[float, float, float]]]:
    """The finite numbers by step; many in few bins: their means, and a band of their
    extremes.
    """
    numbers = (entry for entry in metrics if isinstance(entry.get(key), int | float))
    points = sorted(
        (entry["step"], entry[key]) for entry in numbers if math.isfinite(entry[key])
    )
    n = len(points)
    if n <= _MAX_POINTS:
        return points, []
    line, band = [], []
    for i in range(_MAX_POINTS):
        xs, ys = zip(
            *points[i * n // _MAX_POINTS : (i + 1) * n // _MAX_POINTS], strict=True
        )
        x = sum(xs) / len(xs)
        line.append((x, sum(ys) / len(ys)))
        band.append((x, min(ys), max(ys)))
    return line, band


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about
    ``n`` of them.
    """
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick's number, short: ``12k``, ``0.05``, ``−3``."""
    return (f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}").replace(
        "-", "−"
    )


def _figure(
    heading: str,
    lines: Sequence[_Line],
    label: str,
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    from_zero: bool = False,
) -> dict[str, Any]:
    """Lines over one pair of axes, placed; ``label`` describes the picture for those
    who cannot see it.
    """
    y_of: Callable[[float], float] = math.log10 if log_y else float
    xs = [x for line in lines for x, _ in line.points]
    ys = [
        y_of(y)
        for line in lines
        for _, *heights in (*line.points, *line.band)
        for y in heights
    ]
    x0, x1 = _padded(min(xs), max(xs), 0.0)
    y0, y1 = _padded(0.0 if from_zero else min(ys), max(ys), 0.05)
    y0 = 0.0 if from_zero else y0

    def px(x: float) -> float:
        return round(_LEFT + (x - x0) / (x1 - x0) * (_RIGHT - _LEFT), 1)

    def py(y: float) -> float:
        return round(_BOTTOM - (y_of(y) - y0) / (y1 - y0) * (_BOTTOM - _TOP), 1)

    if log_y:
        stride = max(1, math.ceil((math.floor(y1) - math.ceil(y0) + 1) / 6))
        powers = range(math.ceil(y0), math.floor(y1) + 1, stride)
        y_ticks = [
            (py(10.0**k), f"10{str(k).translate(_SUPERSCRIPT)}" if k else "1")
            for k in powers
        ]
    else:
        y_ticks = [(py(y), tick_text(y)) for y in nice_ticks(y0, y1)]
    drawn = []
    for line in lines:
        points = [(px(x), py(y)) for x, y in line.points]
        around = [(x, high) for x, _, high in line.band] + [
            (x, low) for x, low, _ in reversed(line.band)
        ]
        shape = {"path": "L".join(f"{x} {y}" for x, y in points)}
        shape["band"] = "L".join(f"{px(x)} {py(y)}" for x, y in around)
        dots = points if line.dots or len(points) == 1 else []
        drawn.append(
            {"model": line.model, "colour": line.colour, **shape, "dots": dots}
        )
    marks: list[
        dict[str, Any]
    ] = []  # dots with a number; numbers that would overlap go one above the other
    for value, y_value, text, colour in sorted(
        (*line.mark, line.colour) for line in lines if line.mark
    ):
        x, y = px(value), py(y_value)
        text_y = y - 9
        while any(
            abs(x - other["x"]) < 34 and abs(text_y - other["text_y"]) < 15
            for other in marks
        ):
            text_y -= 15
        marks.append(
            {
                "x": x,
                "y": y,
                "text_y": max(text_y, _TOP - 2),
                "text": text,
                "colour": colour,
            }
        )
    return {
        "heading": heading,
        "legend": [(line.model, line.colour, line.remark) for line in lines],
        "binned": any(line.band for line in lines),
        "label": label,
        "x_label": x_label,
        "y_label": y_label,
        "x_ticks": [(px(x), tick_text(x)) for x in nice_ticks(x0, x1)],
        "y_ticks": y_ticks,
        "lines": drawn,
        "marks": marks,
    }


def _padded(low: float, high: float, share: float) -> Point:
    """Widens a range by a share of itself on both sides, and an empty one to something
    with an extent.
    """
    extra = share * (high - low) if high - low >= 1e-12 else abs(low) * 0.1 or 1.0
    return low - extra, high + extra
