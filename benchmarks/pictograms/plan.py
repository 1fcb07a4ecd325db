"""What is run: methods, settings, the search's rule and the grid of cells.

No torch here.

The search is coordinate descent with the same number of runs for each method. Round by
round one coordinate is varied around the method's best setting so far; what is best is
decided by the mean recall on the validation pairs alone (``tiny-resnet``, one seed).
Three settings go on to the length of the cells, and for the two other towers the
learning rate is chosen anew. The lists below are fixed beforehand, so the search is a
function of its records.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.studies.comparison import Record

METHODS = ("clip", "infoloob", "infonce-hopfield", "cloob", "cloob-warm")
"""The four members of the family, and CLOOB that begins as InfoLOOB: retrieval joins
after half of the run.

The attempts led to the last (``benchmarks/LOG.md``); it was added before any test set
was looked at, with equal budget.
"""
TOWERS = ("tiny-resnet", "tiny-vit", "tiny-convnext")
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
"""Not one of the cells' seeds: they are not what the settings were chosen on."""
SEARCH_EPOCHS = 3
FINAL_EPOCHS = 12
CELL_EPOCHS = 12
"""As long as the finalists: what was chosen at a length is used at that length."""
LONG_EPOCHS = 36
LONGEST_EPOCHS = 60
"""The paper's gain grows with training: one tower for three times and for five times as
long.
"""
CLAIMED = ("clip", "cloob")
"""The claim's two methods: also as published, at length with every seed, and at the
greatest length.
"""
IMAGE_SIZE = 64


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    ``inv_tau`` is the start where it is learned; ``option`` names a variant of the
    objective.

    Attributes:
        lr: Peak learning rate (AdamW, linear warm-up over a tenth of the run, cosine).
        weight_decay: Of matrices and kernels.
        batch_size: Pairs a step; the number of pairs seen does not depend on it.
        inv_tau: τ⁻¹.
        learnable_inv_tau: Whether τ⁻¹ is trained.
        beta: β; None for methods without retrieval.
        mask_duplicates: Pairs of equal caption are no negatives of each other.
        option: "" for the objective as published; "warm": no retrieval in the first
            half of the run.
        start: "" for the towers as initialised; an attempt had "centred".
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    batch_size: int = 128
    inv_tau: float = 30.0
    learnable_inv_tau: bool = False
    beta: float | None = None
    mask_duplicates: bool = False
    option: str = ""
    start: str = ""

    @property
    def slug(self) -> str:
        tau = f"t{self.inv_tau:.3g}" + ("learned" if self.learnable_inv_tau else "")
        parts = [
            f"lr{self.lr:g}",
            f"wd{self.weight_decay:g}",
            f"n{self.batch_size}",
            tau,
        ]
        parts += [f"b{self.beta:g}"] if self.beta is not None else []
        parts += ["masked"] if self.mask_duplicates else []
        return "_".join([*parts, *filter(None, (self.option, self.start))])


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        stage: ``search`` or ``cells``; or a stage of ``wrong``.
        method: One of ``METHODS``.
        tower: One of ``TOWERS``.
        seed: Of the initial towers, the order of the pairs and their augmentation.
        epochs: Passes over the training pairs.
        setting: The rest.
    """

    stage: str
    method: str
    tower: str
    seed: int
    epochs: int
    setting: Setting

    @property
    def id(self) -> str:
        return f"{self.method}_{self.tower}_e{self.epochs}_s{self.seed}_{self.setting.slug}"

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


DEFAULTS: dict[str, Setting] = {
    "clip": Setting(inv_tau=1 / 0.07, learnable_inv_tau=True),
    "infoloob": Setting(inv_tau=30.0),
    "infonce-hopfield": Setting(inv_tau=30.0, beta=8.0),
    "cloob": Setting(inv_tau=30.0, beta=8.0),
    "cloob-warm": Setting(inv_tau=30.0, beta=8.0, option="warm"),
}
"""As published; the temperatures of the others are CLOOB's."""

_RETRIEVING: list[dict[str, Any]] = [
    {"inv_tau": 30.0, "beta": 16.0},
    {"inv_tau": 15.0, "beta": 8.0},
    {"inv_tau": 15.0, "beta": 16.0},
    {"inv_tau": 8.0, "beta": 16.0},
]
TEMPERATURES: dict[str, list[dict[str, Any]]] = {
    "clip": [
        {"inv_tau": t, "learnable_inv_tau": False} for t in (10.0, 20.0, 30.0, 50.0)
    ],
    "infoloob": [{"inv_tau": t} for t in (8.0, 12.0, 20.0, 50.0)],
    "infonce-hopfield": _RETRIEVING,
    "cloob": _RETRIEVING,
    "cloob-warm": _RETRIEVING,
}
_FURTHER: dict[str, list[dict[str, Any]]] = {
    "clip": [{"inv_tau": 100.0, "learnable_inv_tau": False}],
    "infoloob": [{"inv_tau": 40.0}],
    "infonce-hopfield": [{"inv_tau": 8.0, "beta": 32.0}],
    "cloob": [{"inv_tau": 8.0, "beta": 32.0}],
    "cloob-warm": [{"inv_tau": 8.0, "beta": 32.0}],
}
"""Beyond the edge of the temperatures."""
_NEXT_RATE = {5e-4: 2.5e-4, 1e-3: 7e-4, 2e-3: 4e-3}
"""Beyond the edge of the learning rates, or between two of them."""
_ROUNDS: tuple[tuple[str, Callable[[str, Setting], list[dict[str, Any]]]], ...] = (
    ("temperature", lambda method, _: TEMPERATURES[method]),
    ("learning rate", lambda *_: [{"lr": lr} for lr in (5e-4, 2e-3)]),
    ("further learning rate", lambda _, best: [{"lr": _NEXT_RATE[best.lr]}]),
    ("batch", lambda *_: [{"batch_size": n} for n in (64, 256)]),
    ("weight decay", lambda *_: [{"weight_decay": w} for w in (0.02, 0.5)]),
    ("further temperature", lambda method, _: _FURTHER[method]),
)
RUNS_A_METHOD = 1 + 4 + 2 + 1 + 2 + 2 + 1
FINALISTS = 3
RATES = 2
"""Learning rates tried for each of the other towers."""

Scores = Mapping[str, float]
"""Search cell's id -> mean recall on the validation pairs."""


def search_cell(method: str, setting: Setting, epochs: int) -> Cell:
    return Cell("search", method, TOWERS[0], SEARCH_SEED, epochs, setting)


def short_search(method: str, scores: Scores) -> Iterator[tuple[str, Cell]]:
    """The short runs of a method in their order, with their round, as far as the
    records determine them.
    """
    best = search_cell(method, DEFAULTS[method], SEARCH_EPOCHS)
    yield "published", best
    if best.id not in scores:
        return
    for name, values in _ROUNDS:
        around = best.setting
        tried = [
            search_cell(method, dataclasses.replace(around, **v), SEARCH_EPOCHS)
            for v in values(method, around)
        ]
        yield from ((name, cell) for cell in tried)
        if any(cell.id not in scores for cell in tried):
            return
        best = max([best, *tried], key=lambda cell: scores[cell.id])


def long_search(method: str, scores: Scores) -> list[Cell]:
    """The finalists at greater length: the published setting, and once they are all
    there two of the short runs.

    These are the best one, and the published temperatures with the best one's learning
    rate, batch and weight decay: how sharp a contrast is best depends on the length of
    a run. If that is one of the two already, the second best.
    """
    cells = [cell for _, cell in short_search(method, scores)]
    chosen = [DEFAULTS[method]]
    if len(cells) == RUNS_A_METHOD and all(cell.id in scores for cell in cells):
        best, second, *_ = (
            cell.setting
            for cell in sorted(cells[1:], key=lambda cell: -scores[cell.id])
        )
        tuned = {
            key: getattr(best, key) for key in ("lr", "batch_size", "weight_decay")
        }
        published = dataclasses.replace(DEFAULTS[method], **tuned)
        chosen += [best, second if published in (best, DEFAULTS[method]) else published]
    return [search_cell(method, setting, FINAL_EPOCHS) for setting in chosen]


def rate_search(method: str, tower: str, scores: Scores) -> list[Cell]:
    """Short runs of another tower: the chosen setting, and the same with another
    learning rate.
    """
    final = long_search(method, scores)
    if len(final) < FINALISTS or any(cell.id not in scores for cell in final):
        return []
    setting = max(final, key=lambda cell: scores[cell.id]).setting
    other = 1e-3 if setting.lr != 1e-3 else 2e-3
    settings = (setting, dataclasses.replace(setting, lr=other))
    return [
        Cell("search", method, tower, SEARCH_SEED, SEARCH_EPOCHS, each)
        for each in settings
    ]


def search_cells(scores: Scores) -> Iterator[Cell]:
    """What the search has to run next, the methods in turn; everything it has run comes
    up too.
    """
    short = {
        method: [cell for _, cell in short_search(method, scores)] for method in METHODS
    }
    for place in range(max(map(len, short.values()))):
        yield from (cells[place] for cells in short.values() if place < len(cells))
    final = {method: long_search(method, scores) for method in METHODS}
    for place in range(FINALISTS):
        yield from (cells[place] for cells in final.values() if place < len(cells))
    for tower in TOWERS[1:]:
        for method in METHODS:
            yield from rate_search(method, tower, scores)


def chosen_setting(method: str, scores: Scores, tower: str = TOWERS[0]) -> Setting:
    tried = (
        long_search(method, scores)
        if tower == TOWERS[0]
        else rate_search(method, tower, scores)
    )
    return max(tried, key=lambda cell: scores[cell.id]).setting


def grid(scores: Scores) -> list[Cell]:
    """Seed × tower × method with the chosen settings, so that a part compares all; then
    published and long runs.
    """
    chosen = [
        Cell(
            "cells",
            method,
            tower,
            seed,
            CELL_EPOCHS,
            chosen_setting(method, scores, tower),
        )
        for seed in SEEDS
        for tower in TOWERS
        for method in METHODS
    ]
    published = [
        Cell("cells", method, TOWERS[0], seed, CELL_EPOCHS, DEFAULTS[method])
        for seed in SEEDS
        for method in CLAIMED
        if chosen_setting(method, scores) != DEFAULTS[method]
    ]
    first = chosen[: len(METHODS)]
    long = [dataclasses.replace(cell, epochs=LONG_EPOCHS) for cell in first]
    further = [
        cell for cell in chosen if cell.tower == TOWERS[0] and cell.seed != SEEDS[0]
    ]
    long += [
        dataclasses.replace(cell, epochs=LONG_EPOCHS)
        for cell in further
        if cell.method in CLAIMED
    ]
    longest = [
        dataclasses.replace(cell, epochs=LONGEST_EPOCHS)
        for cell in first
        if cell.method in CLAIMED
    ]
    return chosen + published + long + longest


Runs = dict[tuple[str, str], dict[int, Record]]
"""(method, tower) -> seed -> record."""


def select(
    cells: Mapping[str, Record], scores: Mapping[str, float], epochs: int | None = None
) -> tuple[Runs, Runs]:
    """The runs of a length (the study's) with the chosen settings, and those with the
    published ones.
    """
    chosen: Runs = defaultdict(dict)
    published: Runs = defaultdict(dict)
    for record in cells.values():
        config = record["config"]
        method, setting = config["method"], Setting(**config["setting"])
        if config["epochs"] != (epochs or CELL_EPOCHS):
            continue
        if setting == chosen_setting(method, scores, config["tower"]):
            chosen[method, config["tower"]][config["seed"]] = record
        elif setting == DEFAULTS[method]:
            published[method, config["tower"]][config["seed"]] = record
    return dict(chosen), dict(published)


def search_scores(searched: Mapping[str, Record]) -> dict[str, float]:
    """What the search knows: the mean recall on the validation pairs of each of its
    records.
    """
    return {name: record["val"]["mean_recall"] for name, record in searched.items()}
