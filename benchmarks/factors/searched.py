"""What the records of the search say: the scores of its runs, and what its earlier forms had tried. No torch here."""

from __future__ import annotations

from pathlib import Path

from benchmarks.factors import plan
from benchmarks.factors.world import World
from benchmarks.pictograms import records

STUDY = Path(__file__).parent


def scores(results: Path) -> tuple[dict[str, float], plan.Superseded]:
    """The best held-out recall of each run, and the settings of the runs under ``superseded``."""
    before = records.read("superseded", results)
    found = {name: record["recall"] for name, record in (before | records.read("search", results)).items()}
    return found, plan.superseded_settings([record["config"] for record in before.values()], found)


def searches(results: Path) -> dict[tuple[World, str], plan.Search]:
    """Each method's search in each world, as far as the records of its runs go."""
    known = scores(results)
    return {(world, m): plan.search(m, world, *known) for world in plan.worlds() for m in plan.methods(world)}
