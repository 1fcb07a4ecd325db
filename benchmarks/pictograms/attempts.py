"""What is tried beside the published forms: each attempt is one run at the finalists' length, with a reason.

They start from CLOOB's chosen setting and change one thing; ``docs/log.md`` says what came out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.pictograms.cells import FINAL_EPOCHS, SEARCH_SEED, TOWERS, Cell, chosen_setting

ATTEMPTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("cloob", "the chosen setting itself, to compare with", {}),
    ("clip", "likewise", {}),
    ("infoloob", "likewise", {}),
    ("cloob", "duplicate captions are false negatives", {"mask_duplicates": True}),
    ("infoloob", "the same without retrieval", {"mask_duplicates": True}),
    ("clip", "the same for CLIP", {"mask_duplicates": True}),
    ("cloob", "retrieval slows the start: let InfoLOOB make it", {"option": "warm"}),
    ("cloob", "the same without a jump", {"option": "ramp"}),
    ("cloob", "both terms together", {"option": "sum"}),
    ("cloob", "beta against ln N: as sharp as eight patterns", {"option": "perplexity"}),
    ("cloob", "beta is learned", {"option": "learned-beta"}),
    ("cloob", "beta grows", {"option": "grown-beta"}),
)


def attempts(scores: Mapping[str, float]) -> list[Cell]:
    """The runs, with the search's seed."""
    listed = []
    for method, _, changes in ATTEMPTS:
        setting = dataclasses.replace(chosen_setting(method, scores)[0], **changes)
        listed.append(Cell("attempts", method, TOWERS[0], SEARCH_SEED, FINAL_EPOCHS, setting))
    return listed
