"""What is tried beside the published forms: each attempt changes one thing of a setting, with a reason.

The first ones changed the published settings, in three epochs or twelve; since the search the chosen ones are changed,
for as long as a finalist runs, and each is to be compared with its finalist. All are judged on the validation pairs
alone; ``docs/log.md`` says what came out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from benchmarks.pictograms.cells import (
    DEFAULTS,
    FINAL_EPOCHS,
    SEARCH_EPOCHS,
    SEARCH_SEED,
    TOWERS,
    Cell,
    Scores,
    Setting,
    chosen_setting,
    search_cell,
)

Attempt = tuple[str, str, dict[str, Any]]

PUBLISHED: tuple[tuple[int, Attempt], ...] = (
    (
        SEARCH_EPOCHS,
        ("cloob", "retrieval slows the start: spread the image embeddings before it", {"start": "centred"}),
    ),
    (SEARCH_EPOCHS, ("cloob", "both terms together", {"option": "sum"})),
    (SEARCH_EPOCHS, ("cloob", "beta against ln N: as sharp as eight patterns", {"option": "perplexity"})),
    (FINAL_EPOCHS, ("cloob", "both terms together, for longer", {"option": "sum"})),
)
CHOSEN: tuple[Attempt, ...] = (
    ("cloob", "beta against ln N: as sharp as eight patterns", {"option": "perplexity"}),
    ("cloob", "both terms together", {"option": "sum"}),
    ("cloob", "spread the image embeddings before the first step", {"start": "centred"}),
    ("cloob", "beta is learned", {"option": "learned-beta"}),
    ("cloob", "beta rises: a wide retrieval for the start, a sharp one at the end", {"option": "grown-beta"}),
    ("cloob", "duplicate captions are false negatives", {"mask_duplicates": True}),
    ("infoloob", "masked duplicates without retrieval", {"mask_duplicates": True}),
    ("clip", "masked duplicates for CLIP", {"mask_duplicates": True}),
    ("cloob-warm", "InfoLOOB first, without a jump", {"option": "ramp"}),
    ("cloob-warm", "InfoLOOB only until the embeddings have left the cone", {"option": "early"}),
    ("cloob-warm", "a batch is a small memory: retrieve from the last 1,024 pairs as well", {"option": "queue"}),
    ("infonce-hopfield", "the warm start without leaving the positive out", {"option": "warm"}),
)
REPEATS = ("clip", "infoloob")
"""Their published settings with other seeds say by how much a score of the search differs by chance."""
REPEAT_SEEDS = (101, 102)


class Attempted(NamedTuple):
    """A run, what it is to be compared with, and why it was made."""

    cell: Cell
    baseline: Cell
    why: str


def planned(scores: Scores) -> list[Attempted]:
    """The runs, on the search's tower, with the search's seed if it is not the seed that they are about.

    Args:
        scores: What the search knows; what changes a chosen setting waits for it.
    """

    def attempted(method: str, why: str, base: Setting, epochs: int, seed: int, **changes: Any) -> Attempted:
        cell = Cell("attempts", method, TOWERS[0], seed, epochs, dataclasses.replace(base, **changes))
        return Attempted(cell, search_cell(method, base, epochs), why)

    found = [
        attempted(method, "another seed", DEFAULTS[method], SEARCH_EPOCHS, seed)
        for method in REPEATS
        for seed in REPEAT_SEEDS
    ]
    for epochs, (method, why, changes) in PUBLISHED:
        found.append(attempted(method, why, DEFAULTS[method], epochs, SEARCH_SEED, **changes))
    for method, why, changes in CHOSEN:
        base, basis = chosen_setting(method, scores)
        if basis == "finalists":
            found.append(attempted(method, why, base, FINAL_EPOCHS, SEARCH_SEED, **changes))
    first: dict[Cell, Attempted] = {}
    for each in found:
        first.setdefault(each.cell, each)
    return list(first.values())


def attempts(scores: Scores) -> list[Cell]:
    """The runs of `planned`."""
    return [each.cell for each in planned(scores)]
