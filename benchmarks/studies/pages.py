"""How tables and numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NAMES = {
    "clip": "CLIP",
    "infoloob": "InfoLOOB",
    "infonce-hopfield": "InfoNCE + Hopfield",
    "cloob": "CLOOB",
    "cloob-warm": "CLOOB, InfoLOOB first",
}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    return f"{100 * value:+z.1f}"


def span(interval: tuple[float, float]) -> str:
    return (
        "–"
        if math.isnan(interval[0])
        else f"{points(interval[0])} … {points(interval[1])}"
    )


def spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, sd = (
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
    )
    return percent(mean) if math.isnan(sd) else f"{percent(mean)} ± {percent(sd)}"


def replaced(text: str, tables: str, begin: str, end: str) -> str:
    """The page's text with other tables between two markers.

    Raises:
        ValueError: It does not have both markers, once each and in order.
    """
    if (
        text.count(begin) != 1
        or text.count(end) != 1
        or text.index(begin) > text.index(end)
    ):
        raise ValueError(
            f"the page must hold {begin} and {end}, once each and in order"
        )
    return f"{text[: text.index(begin)]}{begin}\n{tables}\n{text[text.index(end) :]}"
