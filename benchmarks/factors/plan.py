"""What is run: worlds, settings, the search's rule and the order of it all.

No torch here.

The search is coordinate descent, round by round around a method's best setting so far,
with the same number of runs for every method. What is best is decided by the recall on
held-out pairs that are as noisy as the training pairs. The rounds are fixed beforehand,
so the search is a function of its records.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.factors.world import World
from benchmarks.studies import records

STUDY = Path(__file__).parent
METHODS = ("clip", "infoloob", "infonce-hopfield", "cloob")
RETRIEVING = METHODS[2:]
WRONG = (0.4, 0.0, 0.6, 0.2, 0.8)
"""Shares of wrong captions, the most telling first."""
SIDES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("pool", (128_000, 2_000, 16_000)),
    ("batch", (32, 512)),
    ("named", (0.25, 1.0)),
    ("correlation", (0.4, 0.8)),
)
"""One thing changed in the base world, with clean and with 40 % wrong captions."""
SIDE_WRONG = (0.4, 0.0)
SEEDS, SIDE_SEEDS = tuple(range(10)), tuple(range(5))
SEARCH_SEEDS, SIDE_SEARCH_SEEDS = (100, 101), (100,)
"""Not the seeds of the cells: those are not what the settings were chosen on."""


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    Attributes:
        inv_tau: τ⁻¹; the start where it is learned.
        learned: Whether τ⁻¹ is trained (CLIP only: for the others it would rise without
            end, or the paper fixes it).
        beta: β; None without retrieval.
        lr: Peak learning rate (AdamW, warm-up over a tenth, cosine to zero).
        weight_decay: AdamW's.
        length: Share of the world's ``seen`` pairs that the run trains on.
    """

    inv_tau: float
    learned: bool = False
    beta: float | None = None
    lr: float = 1e-3
    weight_decay: float = 0.1
    length: float = 1.0

    @property
    def slug(self) -> str:
        tau = f"t{self.inv_tau:.3g}" + ("learned" if self.learned else "")
        beta = [f"b{self.beta:.3g}"] if self.beta else []
        return "_".join(
            [
                tau,
                *beta,
                f"lr{self.lr:.3g}",
                f"wd{self.weight_decay:.3g}",
                f"l{self.length:g}",
            ]
        )


@dataclass(frozen=True)
class Run:
    """One run, and the name of its record.

    Attributes:
        stage: ``search`` or ``cells``: also the folder of its record.
        method: One of ``METHODS``.
        world: The world it is drawn from.
        seed: Of the drawing, of the encoders as initialised and of the order of the
            pairs.
        setting: The rest.
    """

    stage: str
    method: str
    world: World
    seed: int
    setting: Setting

    @property
    def id(self) -> str:
        return f"{slug(self.world)}_{self.method}_s{self.seed}_{self.setting.slug}"

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Run:
        """The inverse of ``config``."""
        return cls(
            **{
                **config,
                "world": World(**config["world"]),
                "setting": Setting(**config["setting"]),
            }
        )


def slug(world: World) -> str:
    """How a world differs from the base, in letters that suit a file name."""
    changed = [
        f.name
        for f in dataclasses.fields(World)
        if getattr(world, f.name) != f.default and f.name != "wrong"
    ]
    return "_".join(
        [
            f"wrong{world.wrong:g}",
            *(f"{name}{getattr(world, name):g}" for name in changed),
        ]
    )


PUBLISHED: dict[str, Setting] = {
    "clip": Setting(1 / 0.07, learned=True),
    "infoloob": Setting(30.0),
    "infonce-hopfield": Setting(30.0, beta=8.0),
    "cloob": Setting(30.0, beta=8.0),
}
"""Where each search starts; the temperatures of InfoLOOB and InfoNCE with retrieval are
CLOOB's.
"""
_RETRIEVALS: list[dict[str, Any]] = [
    {"inv_tau": t, "beta": b} for t in (10.0, 20.0, 30.0) for b in (8.0, 16.0)
]
_TEMPERATURES: dict[str, list[dict[str, Any]]] = {
    "clip": [
        {"inv_tau": 1 / 0.07, "learned": True},
        *({"inv_tau": t, "learned": False} for t in (5.0, 10.0, 20.0, 30.0, 60.0)),
    ],
    "infoloob": [{"inv_tau": t} for t in (5.0, 8.0, 12.0, 20.0, 30.0, 50.0)],
    "infonce-hopfield": _RETRIEVALS,
    "cloob": _RETRIEVALS,
}
Scores = Mapping[str, float]
"""Search run's id -> the best recall on held-out pairs along the run."""
Superseded = Mapping[tuple[World, str], Sequence[Setting]]
"""(world, method) -> settings that the search in its earlier forms tried there, and in
this form does not come by.
"""
Round = Callable[[str, Setting], Sequence[Mapping[str, Any]]]


def _finer(name: str, factor: float) -> Round:
    """The best value of a coordinate, divided and multiplied by a factor."""
    return lambda _, best: [
        {name: getattr(best, name) * by} for by in (1 / factor, factor)
    ]


def _further(method: str, best: Setting) -> Sequence[Mapping[str, Any]]:
    """A half octave to both sides: of β where there is retrieval, else of τ⁻¹, whose
    learned form starts below 100.
    """
    return _finer("beta" if method in RETRIEVING else "inv_tau", math.sqrt(2))(
        method, best
    )


def _last(method: str, best: Setting) -> Sequence[Mapping[str, Any]]:
    """τ⁻¹ below the list of those with retrieval, whose lowest was chosen everywhere;
    of the others more finely.
    """
    factors = (1 / 2, 1 / math.sqrt(2)) if method in RETRIEVING else (2**-0.25, 2**0.25)
    return [{"inv_tau": best.inv_tau * by} for by in factors]


_TOGETHER = [
    {"lr": lr, "weight_decay": 10.0, "length": length}
    for lr, length in ((1e-3, 0.25), (1e-3 / math.sqrt(3), 0.5), (3e-4, 1.0))
]
"""Rate, decay and length moved at once, so that their product hardly changes: no
coordinate alone gets there.
"""
_MAIN: tuple[Round, ...] = (
    lambda method, _: [
        t | {"length": length} for t in _TEMPERATURES[method] for length in (1.0, 0.25)
    ],
    lambda *_: [{"lr": lr} for lr in (3e-4, 3e-3)],
    lambda *_: [{"weight_decay": w} for w in (1.0, 3.0, 10.0)],
    lambda *_: [{"length": length} for length in (0.5, 0.125)],
    lambda *_: _TOGETHER,
    _further,
    _finer("lr", math.sqrt(3)),
    _finer("weight_decay", math.sqrt(10)),
    _last,
)
"""Temperature with length, rate, weight decay, other lengths, three together; all but
the length finely; τ⁻¹ again.
"""
_SIDE: tuple[Round, ...] = (
    lambda method, best: [
        t
        for t in _TEMPERATURES[method]
        if any(getattr(best, k) != v for k, v in t.items())
    ][:5],
    lambda *_: [{"length": length} for length in (1.0, 0.5, 0.25, 0.125)],
    lambda *_: _TOGETHER,
    _finer("lr", math.sqrt(3)),
    _finer("weight_decay", math.sqrt(10)),
)
"""The same in short, around what was chosen in the base world with as many wrong
captions.
"""
_SIDE_LAST: tuple[Round, ...] = (
    _finer("lr", math.sqrt(3)),
    _finer("weight_decay", math.sqrt(10)),
    lambda _, best: [
        {"length": best.length / 2},
        {"length": min(1.0, best.length * 2)},
    ],
    _last,
    _further,
)
"""Beyond the edges, on which some of these searches had ended, and β between and beside
the list's values.
"""


def worlds() -> list[World]:
    """The base world with each share of wrong captions, then the sides."""
    sides = [
        World(wrong=w, **{name: value})
        for name, values in SIDES
        for value in values
        for w in SIDE_WRONG
    ]
    return [World(wrong=w) for w in WRONG] + sides


def is_side(world: World) -> bool:
    """Whether something but the share of wrong captions differs from the base world."""
    return world != World(wrong=world.wrong)


def seeds(world: World) -> tuple[int, ...]:
    return SIDE_SEEDS if is_side(world) else SEEDS


@dataclass(frozen=True)
class Search:
    """The search of one method in one world, as far as the records determine it.

    Attributes:
        tried: Its settings, in order.
        scores: Mean recall over the search's seeds of those that are finished.
        complete: Whether nothing is left to try.
    """

    tried: tuple[Setting, ...]
    scores: Mapping[Setting, float]
    complete: bool

    @property
    def best(self) -> Setting:
        return max(self.scores, key=lambda setting: self.scores[setting])


def search(
    method: str,
    world: World,
    scores: Scores,
    superseded: Superseded = MappingProxyType({}),
) -> Search:
    def kept(_: str, best: Setting) -> list[Mapping[str, Any]]:
        return [
            dataclasses.asdict(setting)
            for setting in superseded.get((world, method), ())
        ]

    rounds, start = (*_MAIN, kept), PUBLISHED[method]
    if is_side(world):
        base = search(method, World(wrong=world.wrong), scores, superseded)
        if not base.complete:
            return Search((), {}, complete=False)
        rounds, start = (*_SIDE, kept, *_SIDE_LAST), base.best
    tried: dict[Setting, float | None] = {start: _score(method, world, start, scores)}
    known = {setting: score for setting, score in tried.items() if score is not None}
    for around in rounds:
        if not known:
            break
        best = max(known, key=lambda setting: known[setting])
        candidates = [
            dataclasses.replace(best, **change) for change in around(method, best)
        ]
        tried |= {
            setting: _score(method, world, setting, scores) for setting in candidates
        }
        known = {
            setting: score for setting, score in tried.items() if score is not None
        }
        if len(known) < len(tried):
            return Search(tuple(tried), known, complete=False)
    return Search(tuple(tried), known, complete=len(known) == len(tried))


def superseded_settings(
    configs: Iterable[Mapping[str, Any]], scores: Scores
) -> Superseded:
    """The settings of the runs of earlier searches, of those that were judged by all
    seeds.
    """
    found: dict[tuple[World, str], dict[Setting, None]] = defaultdict(dict)
    for run in map(Run.from_config, configs):
        if _score(run.method, run.world, run.setting, scores) is not None:
            found[run.world, run.method][run.setting] = None
    return {place: tuple(settings) for place, settings in found.items()}


def search_runs(method: str, world: World, setting: Setting) -> list[Run]:
    of_search = SIDE_SEARCH_SEEDS if is_side(world) else SEARCH_SEEDS
    return [Run("search", method, world, seed, setting) for seed in of_search]


def _score(method: str, world: World, setting: Setting, scores: Scores) -> float | None:
    by_seed = [scores.get(run.id) for run in search_runs(method, world, setting)]
    known = [score for score in by_seed if score is not None]
    return sum(known) / len(known) if len(known) == len(by_seed) else None


def runs(
    scores: Scores, superseded: Superseded = MappingProxyType({})
) -> Iterator[Run]:
    """All runs that are known by now, in the order in which they are to be done: by
    world, the search before cells.
    """
    sides = [world for world in worlds() if is_side(world)]
    base = [world for world in worlds() if not is_side(world)]
    for world in (*base, *sides):
        searches = {
            method: search(method, world, scores, superseded) for method in METHODS
        }
        for method in METHODS:
            for setting in searches[method].tried:
                yield from search_runs(method, world, setting)
        if all(each.complete for each in searches.values()):
            for seed in seeds(world):
                yield from (
                    Run("cells", method, world, seed, searches[method].best)
                    for method in METHODS
                )


def scores(results: Path) -> tuple[dict[str, float], Superseded]:
    """The best held-out recall of each run, and the settings of the runs under
    ``superseded``.
    """
    before = records.read("superseded", results)
    found = {
        name: record["recall"]
        for name, record in (before | records.read("search", results)).items()
    }
    return found, superseded_settings(
        [record["config"] for record in before.values()], found
    )


def searches(results: Path) -> dict[tuple[World, str], Search]:
    """Each method's search in each world, as far as the records of its runs go."""
    known = scores(results)
    return {(world, m): search(m, world, *known) for world in worlds() for m in METHODS}
