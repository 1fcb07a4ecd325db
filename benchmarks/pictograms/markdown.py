"""How tables and numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.pictograms.stats import mean_sd


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(value: float, digits: int = 1) -> str:
    """A fraction as per cent."""
    return f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """A difference of fractions in points, with its sign."""
    return f"{100 * value:+z.1f}"


def span(interval: tuple[float, float]) -> str:
    """An interval in points."""
    return "–" if math.isnan(interval[0]) else f"{points(interval[0])} … {points(interval[1])}"


def spread(values: Sequence[float]) -> str:
    """Mean ± sd of fractions, in per cent."""
    if not values:
        return "–"
    mean, sd = mean_sd(values)
    return percent(mean) if math.isnan(sd) else f"{percent(mean)} ± {percent(sd)}"
