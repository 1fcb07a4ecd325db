"""What is tried beside the published forms: each attempt changes one thing of a setting, with a reason.

The first ones changed the published settings, in three epochs or twelve; since the search the chosen ones are changed,
for as long as a finalist runs, and each is to be compared with its finalist. All are judged on the validation pairs
alone; ``docs/log.md`` says what came out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.pictograms.cells import (
    DEFAULTS,
    FINAL_EPOCHS,
    SEARCH_EPOCHS,
    SEARCH_SEED,
    TOWERS,
    Cell,
    Scores,
    chosen_setting,
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


def attempts(scores: Scores) -> list[Cell]:
    """The runs, on the search's tower, with the search's seed if it is not the seed that they are about.

    Args:
        scores: What the search knows; what changes a chosen setting waits for it.
    """

    def cell(attempt: Attempt, base: Any, epochs: int) -> Cell:
        method, _, changes = attempt
        return Cell("attempts", method, TOWERS[0], SEARCH_SEED, epochs, dataclasses.replace(base, **changes))

    repeated = [
        Cell("attempts", method, TOWERS[0], seed, SEARCH_EPOCHS, DEFAULTS[method])
        for method in REPEATS
        for seed in REPEAT_SEEDS
    ]
    published = [cell(attempt, DEFAULTS[attempt[0]], epochs) for epochs, attempt in PUBLISHED]
    chosen = ((attempt, *chosen_setting(attempt[0], scores)) for attempt in CHOSEN)
    changed = [cell(attempt, base, FINAL_EPOCHS) for attempt, base, basis in chosen if basis == "finalists"]
    return list(dict.fromkeys(repeated + published + changed))
