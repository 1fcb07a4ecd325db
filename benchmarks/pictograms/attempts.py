"""What is tried beside the published forms: each attempt changes one thing of a published setting, with a reason.

They are as long as the search's short runs, or as its finalists', whose published settings are what to compare with,
and like these they are judged on the validation pairs alone; ``docs/log.md`` says what came out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.pictograms.cells import DEFAULTS, FINAL_EPOCHS, SEARCH_EPOCHS, SEARCH_SEED, TOWERS, Cell

ATTEMPTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("cloob", "retrieval slows the start: spread the image embeddings before the first step", {"start": "centred"}),
    ("cloob", "both terms together", {"option": "sum"}),
    ("cloob", "beta against ln N: as sharp as eight patterns", {"option": "perplexity"}),
    ("cloob", "duplicate captions are false negatives", {"mask_duplicates": True}),
    ("infoloob", "the same start without retrieval", {"start": "centred"}),
    ("clip", "the same start for CLIP", {"start": "centred"}),
    ("infoloob", "masked duplicates without retrieval", {"mask_duplicates": True}),
    ("clip", "masked duplicates for CLIP", {"mask_duplicates": True}),
    ("cloob", "InfoLOOB first, without a jump", {"option": "ramp"}),
    ("cloob", "beta is learned", {"option": "learned-beta"}),
    ("cloob", "beta grows", {"option": "grown-beta"}),
    (
        "cloob",
        "the common direction grows back, and all patterns retrieve it: take it off in every step",
        {"option": "centring", "start": "centred"},
    ),
)

LONGER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("cloob", "a batch of 128 is a small memory: retrieve from the last 1,024 pairs as well", {"option": "queue"}),
    ("cloob", "both terms together, as long", {"option": "sum"}),
    ("infonce-hopfield", "the warm start without leaving the positive out", {"option": "warm"}),
)
"""What promised something in three epochs, in as many as a finalist has."""


REPEATS = ("clip", "infoloob")
"""Their published settings with other seeds say by how much a score of the search differs by chance."""
REPEAT_SEEDS = (101, 102)


def attempts() -> list[Cell]:
    """The runs, on the search's tower, with the search's seed if it is not the seed that they are about."""
    tried = [
        Cell("attempts", method, TOWERS[0], SEARCH_SEED, epochs, dataclasses.replace(DEFAULTS[method], **changes))
        for listed, epochs in ((ATTEMPTS, SEARCH_EPOCHS), (LONGER, FINAL_EPOCHS))
        for method, _, changes in listed
    ]
    repeated = [
        Cell("attempts", method, TOWERS[0], seed, SEARCH_EPOCHS, DEFAULTS[method])
        for method in REPEATS
        for seed in REPEAT_SEEDS
    ]
    return repeated + tried
