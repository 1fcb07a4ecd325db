"""The two figures of ``docs/study.md``, drawn from the cells that its tables are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from benchmarks.factors import plan
from benchmarks.factors.searched import searches
from benchmarks.factors.tables import Cells, mean_zero_shot, paired, select
from benchmarks.factors.world import World
from benchmarks.leads import Lead, Row, forest, lines
from benchmarks.pictograms import records
from benchmarks.pictograms.selection import NAMES
from benchmarks.pictograms.stats import t_interval

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
MEMBERS = ("cloob", "infoloob", "infonce-hopfield")
"""All but CLIP, which they are compared with."""
SHARES = sorted(plan.SIDE_WRONG)
_LABELS = {
    "pool": "{:,} pairs".format,
    "batch": "batches of {}".format,
    "named": "{:.0%} of the factors named".format,
    "correlation": "factors correlated, {:g}".format,
}
_STREAM = "a stream of fresh pairs"


def write(results: Path, images: Path = IMAGES) -> None:
    """Draws both."""
    cells = select(records.read("cells", results), searches(results))
    by_share = {m: {w: found for w in sorted(plan.WRONG) if (found := lead(cells, World(wrong=w), m))} for m in MEMBERS}
    lines(images / "factors-wrong.svg", by_share, NAMES)
    titles = [f"{100 * share:g} % wrong captions" if share else "right captions" for share in SHARES]
    forest(images / "factors-worlds.svg", titles, list(rows(cells)), NAMES)


def rows(cells: Cells) -> Iterator[Row]:
    """The base world, then one changed thing a row; CLOOB's lead and InfoLOOB's, by the share of wrong captions."""
    changes: Sequence[tuple[str, dict[str, float]]] = [("the base world", {})]
    changes = [*changes, *((label(key, value), {key: value}) for key, values in plan.SIDES for value in sorted(values))]
    for text, change in changes:
        worlds = [World(wrong=share, **change) for share in SHARES]  # type: ignore[arg-type]
        yield Row(text, [{m: found for m in MEMBERS[:2] if (found := lead(cells, w, m))} for w in worlds])


def label(key: str, value: float) -> str:
    """What is changed, in words."""
    whole = key == "pool" and value == World.seen
    return _STREAM if whole else _LABELS[key](value)


def lead(cells: Cells, world: World, method: str) -> Lead | None:
    """A method's lead over CLIP in a world, in points; None before two seeds of both have been run."""
    differences = [100 * d for d in paired(cells, world, method, "clip", mean_zero_shot)]
    return Lead(float(np.mean(differences)), *t_interval(differences)) if len(differences) > 1 else None
