"""Line charts as small SVG, coloured by the page's CSS, so that they follow dark mode and print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 264
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 40
COLOURS = 8
"""The page's CSS has ``--c0`` to ``--c7``; further models use them again, dashed."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """One line of a chart: (x, y) by x, a band of (x, low, high), a point to mark, and whether to draw dots."""

    name: str
    colour: int
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    mark: tuple[float, float, str] | None = None
    dots: bool = False


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about ``n`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[Point], n: int = 160) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """A long curve in at most ``n`` bins: the mean of each, and a band of its extremes (no band if it was short)."""
    if len(points) <= n:
        return list(points), []
    line, band = [], []
    for i in range(n):
        xs, ys = zip(*points[i * len(points) // n : (i + 1) * len(points) // n], strict=True)
        x = sum(xs) / len(xs)
        line.append((x, sum(ys) / len(ys)))
        band.append((x, min(ys), max(ys)))
    return line, band


def tick_text(value: float) -> str:
    """A tick's number, short: ``12k``, ``0.05``, ``−3``."""
    text = f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
    return text.replace("-", "−")


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    from_zero: bool = False,
) -> str:
    """An ``<svg>`` of lines over one pair of axes; empty if no line has two points.

    ``label`` describes the picture for those who cannot see it.
    """
    series = [s for s in series if s.points]
    if not any(len(s.points) > 1 for s in series):
        return ""
    y_of: Callable[[float], float] = math.log10 if log_y else float
    xs = [x for s in series for x, _ in s.points]
    ys = [y_of(y) for s in series for _, y in s.points]
    ys += [y_of(y) for s in series for _, *pair in s.band for y in pair]
    x0, x1 = _padded(min(xs), max(xs), 0.0)
    y0, y1 = _padded(min([*ys, 0.0]) if from_zero else min(ys), max(ys), 0.05)
    if from_zero and min(ys) >= 0:
        y0 = 0.0

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y_of(y) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += _axes((x0, x1), (y0, y1), px, py, log_y=log_y)
    parts.append(f'<text x="0" y="13">{escape(y_label)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>')
    for s in series:
        parts += _line(s, px, py)
    parts += _marks(series, px, py)
    parts.append("</svg>")
    return "".join(parts)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Widens a range by a share of itself on both sides, and an empty one to something with an extent."""
    if high - low < 1e-12:
        extra = abs(low) * 0.1 or 1.0
        return low - extra, high + extra
    return low - share * (high - low), high + share * (high - low)


def _axes(
    x_range: Point,
    y_range: Point,
    px: Callable[[float], float],
    py: Callable[[float], float],
    *,
    log_y: bool,
) -> list[str]:
    parts = []
    if log_y:
        low, high = math.ceil(y_range[0]), math.floor(y_range[1])
        stride = max(1, math.ceil((high - low + 1) / 6))
        ticks = [(10.0**k, f"10{str(k).translate(_SUPERSCRIPT)}" if k else "1") for k in range(low, high + 1, stride)]
    else:
        ticks = [(y, tick_text(y)) for y in nice_ticks(*y_range)]
    for value, text in ticks:
        y = py(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end">{text}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<path class="base" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for value in nice_ticks(*x_range):
        x = px(value)
        parts.append(f'<path class="base" d="M{x} {base}v4"/>')
        parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle">{tick_text(value)}</text>')
    return parts


def _line(series: Series, px: Callable[[float], float], py: Callable[[float], float]) -> list[str]:
    parts = []
    colour = f"m{series.colour % COLOURS}"
    if series.band:
        upper = [f"{px(x)} {py(high)}" for x, _, high in series.band]
        lower = [f"{px(x)} {py(low)}" for x, low, _ in reversed(series.band)]
        parts.append(f'<path class="band {colour}" d="M{"L".join(upper + lower)}Z"/>')
    name = f"<title>{escape(series.name)}</title>"
    if len(series.points) == 1:
        x, y = series.points[0]
        parts.append(f'<circle class="dot {colour}" cx="{px(x)}" cy="{py(y)}" r="4">{name}</circle>')
    else:
        dash = ' stroke-dasharray="7 4"' if series.colour >= COLOURS else ""
        path = "L".join(f"{px(x)} {py(y)}" for x, y in series.points)
        parts.append(f'<path class="line {colour}"{dash} d="M{path}">{name}</path>')
        if series.dots:
            parts += [f'<circle class="dot {colour}" cx="{px(x)}" cy="{py(y)}" r="3"/>' for x, y in series.points]
    return parts


def _marks(series: Sequence[Series], px: Callable[[float], float], py: Callable[[float], float]) -> list[str]:
    """Dots with a dropped line and a number; numbers that would overlap go one above the other."""
    parts = []
    placed: list[Point] = []
    for s in sorted((s for s in series if s.mark), key=lambda s: s.mark[0] if s.mark else 0.0):
        assert s.mark is not None
        x, y, label = px(s.mark[0]), py(s.mark[1]), s.mark[2]
        colour = f"m{s.colour % COLOURS}"
        text_y = y - 9
        while any(abs(x - other_x) < 34 and abs(text_y - other_y) < 15 for other_x, other_y in placed):
            text_y -= 15
        text_y = max(text_y, TOP - 2)
        placed.append((x, text_y))
        parts.append(f'<path class="drop {colour}" d="M{x} {y}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="4.5"/>')
        anchor = "end" if x > WIDTH - RIGHT - 30 else "start"
        parts.append(
            f'<text class="mark {colour}" x="{x + (5 if anchor == "start" else -5):g}" y="{text_y:g}" '
            f'text-anchor="{anchor}">{escape(label)}</text>'
        )
    return parts
