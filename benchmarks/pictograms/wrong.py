"""From scratch with wrong captions: what is run and what is chosen, fixed before the
first run. No torch here.

40 % of the training captions and of the held-out ones are another pair's; the test sets
are as they are. Each of the four members is searched with four runs of 12 epochs: the
first study's choice, the same at two other temperatures of that study (the published
ones first), and the best of these three with a weight decay of 2. All runs are looked
at as they go, the best look by mean recall on the held-out pairs, wrong as they are, is
kept, and the setting with the best look is chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from benchmarks.pictograms.plan import (
    CELL_EPOCHS,
    DEFAULTS,
    LONG_EPOCHS,
    SEARCH_SEED,
    SEEDS,
    TOWERS,
    Cell,
    Scores,
    Setting,
    chosen_setting,
)
from benchmarks.studies.comparison import mean_sd, t_interval
from benchmarks.studies.pages import NAMES, percent, points, span, spread, table

Records = Mapping[str, dict[str, Any]]
SHARE = 0.4
MEMBERS = ("clip", "cloob", "infoloob", "infonce-hopfield")
"""In the order in which they are run: the claim's two first."""
RUNS_A_METHOD = 4
_RETRIEVING = [{"inv_tau": 15.0, "beta": 8.0}, {"inv_tau": 15.0, "beta": 16.0}]
_TEMPERATURES: dict[str, list[dict[str, Any]]] = {
    "clip": [{"inv_tau": 20.0, "learnable_inv_tau": False}],
    "cloob": _RETRIEVING,
    "infoloob": [{"inv_tau": t} for t in (12.0, 20.0)],
    "infonce-hopfield": _RETRIEVING,
}
_WEIGHT_DECAY = 2.0
_AGAINST = "clip", "infoloob"
SEARCH, RUNS = "wrong-search", "wrong"
"""The stages of the records."""


def temperatures(method: str, first_study: Scores) -> list[Setting]:
    """The first study's choice and the same at two other temperatures."""
    base, published = chosen_setting(method, first_study), DEFAULTS[method]
    as_published = {
        key: getattr(published, key) for key in ("inv_tau", "learnable_inv_tau", "beta")
    }
    tempered = [
        dataclasses.replace(base, **change)
        for change in (as_published, *_TEMPERATURES[method])
    ]
    return [base, *[setting for setting in tempered if setting != base][:2]]


def search(method: str, first_study: Scores, searched: Records) -> list[Cell]:
    """The runs of a method's search, those that the records determine so far."""
    found = [
        _search_cell(method, setting) for setting in temperatures(method, first_study)
    ]
    if all(cell.id in searched for cell in found):
        best = _best(found, searched).setting
        found.append(
            _search_cell(method, dataclasses.replace(best, weight_decay=_WEIGHT_DECAY))
        )
    return found


def _search_cell(method: str, setting: Setting) -> Cell:
    return Cell(SEARCH, method, TOWERS[0], SEARCH_SEED, CELL_EPOCHS, setting)


def _best(tried: list[Cell], searched: Records) -> Cell:
    return max(
        tried, key=lambda cell: best_look(searched[cell.id])["val"]["mean_recall"]
    )


def cells(first_study: Scores, searched: Records) -> Iterator[Cell]:
    """The runs with the chosen settings, those of the methods whose search is
    complete.
    """
    for epochs in (CELL_EPOCHS, LONG_EPOCHS):
        for seed in SEEDS:
            for method in MEMBERS:
                setting = chosen(method, first_study, searched)
                if setting is not None:
                    yield Cell(RUNS, method, TOWERS[0], seed, epochs, setting)


def chosen(method: str, first_study: Scores, searched: Records) -> Setting | None:
    """The setting with the best look; None until all of the search have been run."""
    tried = search(method, first_study, searched)
    if len(tried) < RUNS_A_METHOD or any(cell.id not in searched for cell in tried):
        return None
    return _best(tried, searched).setting


def best_look(record: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a run's curve with the best recall, of those that have test scores
    where there are any.
    """
    curve = record["curve"]
    tested = [line for line in curve if "zeroshot" in line]
    best: dict[str, Any] = max(
        tested or curve, key=lambda line: line["val"]["mean_recall"]
    )
    return best


def zeroshot(record: Mapping[str, Any]) -> float:
    return float(np.mean(list(best_look(record)["zeroshot"].values())))


def render(first_study: Scores, searched: Records, runs: Records) -> str:
    tried = [
        cell for method in MEMBERS for cell in search(method, first_study, searched)
    ]
    whole = len(MEMBERS) * len(SEEDS) * 2
    listed = [cell for cell in cells(first_study, searched) if cell.id in runs]
    state = (
        f"State: {sum(c.id in searched for c in tried)} of"
        f" {len(MEMBERS) * RUNS_A_METHOD} search runs, {len(listed)} of {whole} cells."
    )
    parts = [state]
    for epochs in (CELL_EPOCHS, LONG_EPOCHS):
        by_method = {
            method: {
                c.seed: runs[c.id]
                for c in listed
                if c.method == method and c.epochs == epochs
            }
            for method in MEMBERS
        }
        if any(by_method.values()):
            parts.append(_table(epochs, by_method))
    if done := [cell for cell in tried if cell.id in searched]:
        parts.append(_search_table(done, searched))
    return "\n\n".join(parts)


def _search_table(done: list[Cell], searched: Records) -> str:
    looks = [(cell, best_look(searched[cell.id])) for cell in done]
    lines = [
        [
            NAMES[cell.method],
            f"`{cell.setting.slug}`",
            str(look["epoch"]),
            percent(look["val"]["mean_recall"], 2),
        ]
        for cell, look in looks
    ]
    return table(
        ["the search", "setting", "best look, epoch", "held-out recall, %"], lines
    )


def _table(epochs: int, by_method: Mapping[str, Mapping[int, dict[str, Any]]]) -> str:
    lines = []
    for method, of_seed in by_method.items():
        recalls = [
            best_look(record)["val"]["mean_recall"] for record in of_seed.values()
        ]
        looks = ", ".join(
            str(best_look(record)["epoch"]) for record in of_seed.values()
        )
        accuracy = spread([zeroshot(record) for record in of_seed.values()])
        recall = percent(float(np.mean(recalls))) if recalls else "–"
        lines.append([NAMES[method], str(len(of_seed)), looks or "–", recall, accuracy])
        lines[-1] += [_lead(method, other, by_method) for other in _AGAINST]
    head = [
        f"{epochs} epochs",
        "seeds",
        "best look, epoch",
        "held-out recall, %",
        "zero-shot top-1, %",
        *(f"− {NAMES[other]}, points" for other in _AGAINST),
    ]
    return table(head, lines)


def _lead(
    method: str, other: str, by_method: Mapping[str, Mapping[int, dict[str, Any]]]
) -> str:
    """The mean over seeds of what a method has more than another, with its interval."""
    one, two = by_method[method], by_method[other]
    gains = [zeroshot(one[seed]) - zeroshot(two[seed]) for seed in one if seed in two]
    return (
        "–"
        if method == other or not gains
        else f"{points(mean_sd(gains)[0])} ({span(t_interval(gains))})"
    )
