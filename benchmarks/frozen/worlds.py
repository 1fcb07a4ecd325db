"""The worlds, and what is run in each of them, fixed before the first run. No torch here.

A world is a kind of head and a state of the captions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.pictograms.cells import METHODS as FIRST_METHODS

METHODS = (*FIRST_METHODS, "sum")
"""Those of the first study, and the mean of InfoLOOB and CLOOB."""
CLAIMED = ("clip", "cloob")
"""The claim's two methods, which come first in each world."""
SEEDS = (0, 1, 2, 3, 4)
PAIRS = 43_276
SIZES = (3_000, 6_000, 12_000, 24_000)
NEW_TEXT, FINE_TUNE = "new-text", "fine-tune"
EPOCHS = 10
"""The search's start for all pairs; with fewer pairs more epochs, see `World.start_epochs`."""
TUNED_EPOCHS = 4
"""Of `fine-tune`, where an epoch costs three times as much; `new-text` is mostly best in the fourth to sixth of ten."""


@dataclass(frozen=True)
class World:
    """Attributes:
    head: ``linear``, ``mlp``; with a text tower of its own ``new-text`` or, where the image encoder learns too,
        ``fine-tune``.
    kind: What wrong captions are: ``swap``, ``cut`` or ``name`` (``captions.wrong_rows``).
    share: How many of the captions.
    pairs: Training pairs.
    """

    head: str
    kind: str
    share: float
    pairs: int = PAIRS

    @property
    def slug(self) -> str:
        """In letters that suit a file name."""
        return f"{self.head}_{self.kind}{self.share:g}_{self.pairs}"

    @property
    def start_epochs(self) -> int:
        """Where the search of the length begins: the number of steps falls with the root of the number of pairs."""
        if self.head == FINE_TUNE:
            return TUNED_EPOCHS
        return round(EPOCHS * math.sqrt(PAIRS / self.pairs))


CORE = [World(head, "swap", share) for head in ("linear", "mlp") for share in (0.4, 0.0, 0.6)]
"""What the claim is about."""
BESIDE = [
    World("linear", "swap", 0.2),
    World("linear", "name", 0.4),
    World("linear", "cut", 1.0),
    *(World("linear", "swap", share, pairs) for share in (0.4, 0.0) for pairs in SIZES),
    World("mlp", "swap", 0.2),
    World("mlp", "name", 0.4),
    World("mlp", "cut", 1.0),
]
MASKED = [World("linear", "swap", 0.4)]
"""Where the claim's methods are run with ``mask_duplicates`` too, at the setting chosen without it."""
LIT = [World(NEW_TEXT, "swap", 0.4)]
"""A new text tower on a frozen image encoder."""
TUNED = [World(FINE_TUNE, "swap", 0.4)]
"""A new text tower beside an image encoder that is fine-tuned."""
SUMMED = World("mlp", "swap", 0.4)
"""The only world of the sum, which was not as good there as the rule for it asked."""
WORLDS = [*CORE, *LIT, *TUNED, *BESIDE]


def nearest(world: World) -> World | None:
    """The world whose chosen setting the search in one beside it starts from; None where it starts as published."""
    if world in CORE or world.head == NEW_TEXT:
        return None
    if world.head == FINE_TUNE:
        return World(NEW_TEXT, world.kind, world.share)
    share = 0.4 if world.share and world.kind != "cut" else 0.0
    return World(world.head, "swap", share)


def methods(world: World) -> tuple[str, ...]:
    """What is run in a world."""
    if world.head in (NEW_TEXT, FINE_TUNE):
        return ("clip", "infoloob", "cloob-warm")
    if world not in CORE:
        return CLAIMED
    explaining = ("infonce-hopfield", "cloob-warm") if world.share == 0.4 else ()
    return (*CLAIMED, "infoloob", *explaining, *(("sum",) if world == SUMMED else ()))


def seeds(world: World) -> tuple[int, ...]:
    """Of a world's cells."""
    return SEEDS if world in CORE else SEEDS[:3]
