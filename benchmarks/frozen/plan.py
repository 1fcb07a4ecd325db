"""What is run: worlds, settings, the search's rule and the order of it all, fixed
before the first run. No torch here.

A world is a kind of head and a state of the captions. In each world each method is
searched by itself with the same number of runs, by coordinate descent: round by round
one coordinate is varied around the best setting so far. What is best is decided by
held-out pairs that are as wrong as the training pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.pictograms.plan import Setting

METHODS = ("clip", "infoloob", "infonce-hopfield", "cloob", "cloob-warm")
CLAIMED = ("clip", "cloob")
"""The claim's two methods, which come first in each world."""
SEEDS = (0, 1, 2, 3, 4)
PAIRS = 43_276
SIZES = (3_000, 6_000, 12_000, 24_000)
EPOCHS = 10
"""The search's start for all pairs; with fewer pairs more epochs, see
`World.start_epochs`.
"""


@dataclass(frozen=True)
class World:
    """Attributes: head: ``linear`` or ``mlp``. kind: What wrong captions are: ``swap``,
    ``cut`` or ``name`` (``captions.wrong_rows``). share: How many of the captions.
    pairs: Training pairs.
    """

    head: str
    kind: str
    share: float
    pairs: int = PAIRS

    @property
    def slug(self) -> str:
        return f"{self.head}_{self.kind}{self.share:g}_{self.pairs}"

    @property
    def start_epochs(self) -> int:
        """Where the search of the length begins: the number of steps falls with the
        root of the number of pairs.
        """
        return round(EPOCHS * math.sqrt(PAIRS / self.pairs))


CORE = [
    World(head, "swap", share)
    for head in ("linear", "mlp")
    for share in (0.4, 0.0, 0.6)
]
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
WORLDS = [*CORE, *BESIDE]


def nearest(world: World) -> World | None:
    """The world whose chosen setting the search in one beside it starts from; None
    where it starts as published.
    """
    if world in CORE:
        return None
    share = 0.4 if world.share and world.kind != "cut" else 0.0
    return World(world.head, "swap", share)


def methods(world: World) -> tuple[str, ...]:
    if world not in CORE:
        return CLAIMED
    explaining = ("infonce-hopfield", "cloob-warm") if world.share == 0.4 else ()
    return (*CLAIMED, "infoloob", *explaining)


def seeds(world: World) -> tuple[int, ...]:
    return SEEDS if world in CORE else SEEDS[:3]


SEARCH_SEED = 100
"""Not one of the cells': other wrong captions, other initial heads, another order."""
DECAYS = (1.0, 3.0, 10.0)
"""Weight decays beside the recipe's 0.1, tried after the search around its best run."""


@dataclass(frozen=True)
class Cell:
    """One run: ``stage`` is ``search`` or ``cells``, also the stage of its record; the
    seed is of everything drawn.
    """

    stage: str
    method: str
    world: World
    seed: int
    epochs: int
    setting: Setting

    @property
    def id(self) -> str:
        return f"{self.method}_{self.world.slug}_e{self.epochs}_s{self.seed}_{self.setting.slug}"

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_RETRIEVING = Setting(batch_size=256, inv_tau=30.0, beta=8.0)
DEFAULTS: dict[str, Setting] = {
    "clip": Setting(batch_size=256, inv_tau=1 / 0.07, learnable_inv_tau=True),
    "infoloob": Setting(batch_size=256, inv_tau=30.0),
    "infonce-hopfield": _RETRIEVING,
    "cloob": _RETRIEVING,
    "cloob-warm": dataclasses.replace(_RETRIEVING, option="warm"),
}
"""Temperatures as published."""

Changes = dict[str, Any]
Rounds = tuple[tuple[str, Callable[[Cell], list[Changes]]], ...]
"""The name of each round, and what it varies around the best run so far."""
_SHARP: list[Changes] = [
    {"inv_tau": 30.0, "beta": 16.0},
    {"inv_tau": 15.0, "beta": 8.0},
    {"inv_tau": 15.0, "beta": 16.0},
    {"inv_tau": 8.0, "beta": 16.0},
]
_TEMPERATURES: dict[str, list[Changes]] = {
    "clip": [
        {"inv_tau": t, "learnable_inv_tau": False} for t in (7.5, 15.0, 30.0, 60.0)
    ],
    "infoloob": [{"inv_tau": t} for t in (7.5, 15.0, 22.0, 60.0)],
    "infonce-hopfield": _SHARP,
    "cloob": _SHARP,
    "cloob-warm": _SHARP,
}


_HALF_OCTAVES = (1 / math.sqrt(2), math.sqrt(2))


def _between(best: Cell) -> list[Changes]:
    """Finer steps of the coordinate that was varied most coarsely: β where there is
    one, else τ⁻¹.
    """
    setting = best.setting
    if setting.beta is not None:
        return [{"beta": round(setting.beta * f, 2)} for f in (1 / 1.75, 1.75)]
    if setting.learnable_inv_tau:
        return [{"inv_tau": t, "learnable_inv_tau": False} for t in (20.0, 45.0)]
    return [{"inv_tau": round(setting.inv_tau * f, 2)} for f in _HALF_OCTAVES]


_NEXT_RATE = {3e-4: 1e-4, 1e-3: 6e-4, 3e-3: 6e-3}
_NEXT_EPOCHS = {0.5: 0.25, 1.0: 1.5, 2.0: 4.0}
"""Beyond the edge of what was tried, or between two of them; the epochs as parts of the
start's.
"""


def _epochs(world: World, part: float) -> Changes:
    return {"epochs": max(1, round(part * world.start_epochs))}


def _further_epochs(best: Cell) -> list[Changes]:
    part = min(
        _NEXT_EPOCHS, key=lambda p: abs(_epochs(best.world, p)["epochs"] - best.epochs)
    )
    return [_epochs(best.world, _NEXT_EPOCHS[part])]


_ROUNDS: Rounds = (
    ("temperature", lambda best: _TEMPERATURES[best.method]),
    ("learning rate", lambda _: [{"lr": lr} for lr in (3e-4, 3e-3)]),
    ("further learning rate", lambda best: [{"lr": _NEXT_RATE[best.setting.lr]}]),
    ("batch", lambda _: [{"batch_size": n} for n in (128, 512)]),
    ("epochs", lambda best: [_epochs(best.world, part) for part in (0.5, 2.0)]),
    ("further epochs", _further_epochs),
    ("further temperature", _between),
)
RUNS_A_METHOD = 1 + 4 + 2 + 1 + 2 + 2 + 1 + 2
_BESIDE_ROUNDS: Rounds = (
    (
        "temperature",
        lambda best: [
            {"inv_tau": round(best.setting.inv_tau * f, 2)} for f in _HALF_OCTAVES
        ],
    ),
    (
        "learning rate",
        lambda best: [{"lr": float(f"{best.setting.lr * f:.2g}")} for f in (0.5, 2.0)],
    ),
    (
        "epochs",
        lambda best: [{"epochs": max(1, round(best.epochs * f))} for f in (0.5, 2.0)],
    ),
)
Scores = Mapping[str, float]
"""Search cell's id -> its score, the mean recall on held-out pairs of the best epoch.
"""


def _changed(cell: Cell, changes: Changes) -> Cell:
    own = {key: value for key, value in changes.items() if key != "epochs"}
    setting = dataclasses.replace(cell.setting, **own)
    return dataclasses.replace(
        cell, setting=setting, epochs=changes.get("epochs", cell.epochs)
    )


def search(method: str, world: World, scores: Scores) -> Iterator[tuple[str, Cell]]:
    """The runs of a method's search with their rounds, as far as the records determine
    them.
    """
    best = _start(method, world, scores)
    if best is None:
        return
    yield "start", best
    if best.id not in scores:
        return
    for name, values in rounds(world):
        tried = [_changed(best, changes) for changes in values(best)]
        yield from ((name, cell) for cell in tried)
        if any(cell.id not in scores for cell in tried):
            return
        best = max([best, *tried], key=lambda cell: scores[cell.id])


def _start(method: str, world: World, scores: Scores) -> Cell | None:
    """As published; beside the claim what was chosen in the world that is nearest, None
    before it was.
    """
    near = nearest(world)
    if near is None:
        return Cell(
            "search", method, world, SEARCH_SEED, world.start_epochs, DEFAULTS[method]
        )
    best = chosen(method, near, scores)
    if best is None:
        return None
    return dataclasses.replace(
        best, world=world, epochs=round(best.epochs * world.start_epochs / EPOCHS)
    )


def rounds(world: World) -> Rounds:
    return _ROUNDS if nearest(world) is None else _BESIDE_ROUNDS


def runs_a_method(world: World) -> int:
    return RUNS_A_METHOD if nearest(world) is None else 1 + 2 + 2 + 2


def chosen(method: str, world: World, scores: Scores) -> Cell | None:
    runs = [cell for _, cell in search(method, world, scores)]
    if len(runs) < runs_a_method(world) or any(cell.id not in scores for cell in runs):
        return None
    return max(runs, key=lambda cell: scores[cell.id])


def decays(method: str, world: World, scores: Scores) -> list[Cell]:
    """The search's best run with other weight decays; nothing before the search is
    complete.
    """
    best = chosen(method, world, scores)
    return (
        []
        if best is None
        else [_changed(best, {"weight_decay": decay}) for decay in DECAYS]
    )


def chosen_with_decay(method: str, world: World, scores: Scores) -> Cell | None:
    """The best run when weight decay is chosen too; None before it is."""
    best, tried = chosen(method, world, scores), decays(method, world, scores)
    if best is None or any(cell.id not in scores for cell in tried):
        return None
    return max([best, *tried], key=lambda cell: scores[cell.id])


def cells_of(
    method: str, world: World, scores: Scores, *, with_decay: bool = False
) -> list[Cell]:
    """The chosen setting with each seed; nothing before the search is complete.

    Args:
        method: One of ``METHODS``.
        world: Where.
        scores: The search's.
        with_decay: The weight decay is chosen too.
    """
    best = (chosen_with_decay if with_decay else chosen)(method, world, scores)
    if best is None:
        return []
    return [
        dataclasses.replace(best, stage="cells", seed=seed) for seed in seeds(world)
    ]


def runs(scores: Scores) -> Iterator[Cell]:
    """All runs that are known by now, in the order of doing them: the claim's first,
    then what explains it.
    """
    for world in CORE:
        yield from _searched(CLAIMED, world, scores)
    for share in (0.4, 0.0, 0.6):
        for which in (CLAIMED, ("infoloob",)):
            for world in (world for world in CORE if world.share == share):
                yield from _searched(which, world, scores)
                for method in which:
                    yield from decays(method, world, scores)
                yield from _by_seed(
                    cells_of(method, world, scores, with_decay=True) for method in which
                )
    for world in WORLDS:
        yield from _searched(methods(world), world, scores)


def _searched(which: Iterable[str], world: World, scores: Scores) -> Iterator[Cell]:
    """Each method's search, then the cells of those whose search is complete."""
    for method in which:
        yield from (cell for _, cell in search(method, world, scores))
    yield from _by_seed(cells_of(method, world, scores) for method in which)


def _by_seed(grids: Iterable[list[Cell]]) -> Iterator[Cell]:
    for of_seed in zip(*filter(None, grids), strict=True):
        yield from of_seed


CCA = "cca"
MEMBERS = {
    "clip": ("clip", 0, 256),
    "infoloob": ("infoloob", 0, 256),
    "cloob": ("cloob", 0, 256),
    "infoloob-1": ("infoloob", 1, 256),
    "infoloob-2": ("infoloob", 2, 384),
    "infoloob-wide": ("infoloob", 0, 640),
    "clip-2": ("clip", 2, 384),
    "cloob-2": ("cloob", 2, 384),
}
"""The heads of ``claim.md``: method, which of several first weights and orders, width.
"""
CLOSED: tuple[tuple[str, ...], ...] = (("infoloob",), (CCA,), ("infoloob", CCA))
ROWS = (("clip",), ("cloob",), *CLOSED, ("clip", CCA), ("cloob", CCA))
"""With all pairs as they are, CLIP and CLOOB by themselves are cells of the study."""
CONTROLS: tuple[tuple[str, ...], ...] = (
    ("infoloob", "infoloob-2"),
    ("infoloob", "infoloob-1", CCA),
    ("infoloob", "infoloob-1", "infoloob-2"),
)
WIDE = (("infoloob-wide",),)
OTHERS = (("clip", "clip-2"), ("cloob", "cloob-2"))
"""Controls of CLIP ⊕ CCA and CLOOB ⊕ CCA."""
MIXED = (("infoloob", "cloob", CCA),)
"""Members of two objectives, as ``auto`` joins them."""


@dataclass(frozen=True)
class Joined:
    """A run of ``claim.md``: members side by side, from the pairs as they are or from
    those that cleaning left.
    """

    members: tuple[str, ...]
    clean: bool
    world: World
    seed: int
    stage: str = "claim"

    @property
    def id(self) -> str:
        return f"{'+'.join(self.members)}_{'clean' if self.clean else 'all'}_{self.world.slug}_s{self.seed}"

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"members": list(self.members)}

    def cell(self, member: str, scores: Scores) -> Cell:
        """The run of a head: the setting chosen with all pairs; as many epochs as pairs
        ask for.
        """
        best = chosen(
            MEMBERS[member][0], dataclasses.replace(self.world, pairs=PAIRS), scores
        )
        assert best is not None
        epochs = round(best.epochs * self.world.start_epochs / EPOCHS)
        return dataclasses.replace(
            best, stage=self.stage, world=self.world, seed=self.seed, epochs=epochs
        )


def joined() -> Iterator[Joined]:
    """All runs of ``claim.md`` in their order."""
    states = ((False, 0.4), (False, 0.0), (True, 0.4), (True, 0.0))
    fewer = {
        n: [(ROWS, clean, World("mlp", "swap", share, n)) for clean, share in states]
        for n in SIZES
    }
    right, wrong = (World("mlp", "swap", share) for share in (0.0, 0.4))
    blocks = [
        ((*ROWS, *CONTROLS), True, wrong),
        ((*CLOSED, *CONTROLS), False, right),
        ((*CLOSED, *CONTROLS), False, wrong),
        *fewer[3_000],
        *fewer[12_000],
        (ROWS, True, right),
        *((WIDE, False, world) for world in (wrong, right)),
        (CONTROLS, True, right),
        *fewer[6_000],
        *fewer[24_000],
    ]
    for (rows, clean, world), seed in itertools.product(blocks, SEEDS[:3]):
        yield from (Joined(row, clean, world, seed) for row in rows)
    for seed in SEEDS[3:]:
        for rows, clean, world in blocks:
            yield from (
                Joined(row, clean, world, seed) for row in rows if world.pairs == PAIRS
            )
    for seed, (clean, world) in itertools.product(
        SEEDS, ((True, wrong), (True, right))
    ):
        yield from (Joined(row, clean, world, seed) for row in (*OTHERS, *MIXED))
    for seed, world in itertools.product(SEEDS, (right, wrong)):
        yield from (Joined(row, False, world, seed) for row in MIXED)
