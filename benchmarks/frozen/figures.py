"""The figure of ``docs/study.md``: the leads over CLIP in the claim's worlds, from the cells of its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.frozen import tables
from benchmarks.frozen.worlds import CORE, World
from benchmarks.leads import Lead, Row, forest
from benchmarks.pictograms import records
from benchmarks.pictograms.comparison import together
from benchmarks.pictograms.selection import NAMES

FIGURE = "docs/images/frozen.svg"
SHOWN = ("cloob", "infoloob")
_TITLES = {"linear": "linear heads", "mlp": "MLP heads"}


def write(results: Path, root: Path) -> None:
    """Draws it."""
    scores = {name: record["score"] for name, record in records.read("search", results).items()}
    runs = tables.select(records.read("cells", results), scores)
    sets = records.labels_by_set(results)
    forest(root / FIGURE, list(_TITLES.values()), list(rows(runs, sets)), NAMES)


def rows(runs: tables.Runs, sets: tables.Sets) -> Iterator[Row]:
    """A row for each share of wrong captions, a panel for each kind of heads."""
    found = {method: tables.differences(runs, sets, method, "clip") for method in SHOWN}
    for share in sorted({world.share for world in CORE}):
        worlds = [World(head, "swap", share) for head in _TITLES]
        leads = [{m: lead for m in SHOWN if (lead := mean_lead(found[m], world))} for world in worlds]
        yield Row(f"{100 * share:g} % wrong" if share else "right captions", leads)


def mean_lead(differences: tables.Differences, world: World) -> Lead | None:
    """The mean over the sets above chance, in points, with its interval over classes; None without a run."""
    mean = together([d for d in differences.get(world, {}).values() if d.told])
    return None if mean is None else Lead(*(100 * x for x in (mean.mean, *mean.over_classes)))
