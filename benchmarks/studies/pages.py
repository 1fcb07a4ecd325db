"""How the pages write tables, numbers and intervals."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence

NAMES = {
    "clip": "CLIP",
    "infoloob": "InfoLOOB",
    "infonce-hopfield": "InfoNCE + Hopfield",
    "cloob": "CLOOB",
    "cloob-warm": "CLOOB, InfoLOOB first",
    "cca": "CCA",
}
_MARKED = re.compile(r"(<!-- figure (\S+) -->).*?(<!-- /figure -->)", re.DOTALL)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """A difference of two shares in points, with its sign."""
    return f"{100 * value:+z.1f}"


def span(interval: tuple[float, float]) -> str:
    if math.isnan(interval[0]):
        return "–"
    return f"{points(interval[0])} … {points(interval[1])}"


def lead(mean: float, interval: tuple[float, float]) -> str:
    return f"{points(mean)} ({span(interval)})"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    if not values:
        return "–"
    mean = percent(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {percent(statistics.stdev(values))}"


def marked(text: str, figures: Mapping[str, Callable[[], str]]) -> str:
    """The page with each figure between its marks ``<!-- figure NAME -->`` written
    anew.
    """

    def written(mark: re.Match[str]) -> str:
        figure = figures[mark[2]]()
        if "\n" in figure:
            figure = f"\n{figure}\n"
        return f"{mark[1]}{figure}{mark[3]}"

    return _MARKED.sub(written, text)
