"""The tables of ``tables.md``, recomputed from the records between marker lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from benchmarks.pictograms import wrong
from benchmarks.pictograms.plan import (
    LONG_EPOCHS,
    LONGEST_EPOCHS,
    METHODS,
    SEEDS,
    TOWERS,
    Runs,
    Scores,
    chosen_setting,
    search_scores,
    select,
)
from benchmarks.studies import records
from benchmarks.studies.comparison import (
    ZEROSHOT,
    Difference,
    Record,
    Sets,
    compared,
    counted,
    together,
    won_and_lost,
    zeroshot_mean,
)
from benchmarks.studies.pages import NAMES, points, replaced, span, spread, table

TABLES = "<!-- pictograms:begin -->", "<!-- pictograms:end -->"
SUMMARY = "<!-- pictograms-summary:begin -->", "<!-- pictograms-summary:end -->"
WRONG = "<!-- pictograms-wrong:begin -->", "<!-- pictograms-wrong:end -->"
STUDY = Path(__file__).parent
Found = Mapping[str, Mapping[str, Record]]
"""Stage -> id -> record."""
COMPARED = (
    ("cloob", "clip"),
    ("cloob-warm", "clip"),
    ("infoloob", "clip"),
    ("cloob-warm", "infoloob"),
)
"""The claim, the claim for the form that retrieves later, what InfoLOOB alone does, and
what retrieval adds to it.
"""
CLAIMS = COMPARED[:2]


def filled(text: str) -> str:
    """The page's text with the summary and all tables as the records give them."""
    found = {
        stage: records.read(stage, STUDY)
        for stage in ("search", "cells", "attempts", wrong.SEARCH, wrong.RUNS)
    }
    scores = search_scores(found["search"])
    of_wrong = wrong.render(scores, found[wrong.SEARCH], found[wrong.RUNS])
    text = replaced(text, summary(found["cells"], scores), *SUMMARY)
    return replaced(replaced(text, render(found, scores), *TABLES), of_wrong, *WRONG)


def draw(_: Path) -> None:
    """This study has no figure."""


def render(found: Found, scores: Scores) -> str:
    cells, sets = found["cells"], records.labels_by_set(STUDY)
    runs, published = select(cells, scores)
    longer = {
        epochs: select(cells, scores, epochs)[0]
        for epochs in (LONG_EPOCHS, LONGEST_EPOCHS)
    }
    parts = _of_cells(runs, sets, scores)
    parts += _of_longer(longer, sets)
    parts.append("### As published, nothing tuned")
    parts.append(zeroshot_table(published, TOWERS[0], ", as published"))
    parts.append(
        differences(
            published,
            sets,
            "cloob",
            "clip",
            "#### CLOOB against CLIP, both as published",
        )
    )
    return "\n\n".join(part for part in parts if part)


def _of_cells(runs: Runs, sets: Sets, scores: Scores) -> list[str]:
    parts = [
        "### Zero-shot",
        *(
            zeroshot_table(runs, tower)
            for tower in TOWERS
            if any(t == tower for _, t in runs)
        ),
    ]
    for method, baseline in COMPARED:
        title = f"### {NAMES[method]} against {NAMES[baseline]}, paired by seed"
        parts.append(differences(runs, sets, method, baseline, title))
        if (method, baseline) in CLAIMS and parts[-1]:
            parts.append(verdict(runs, sets, method, baseline))
    return [*parts, chosen_table(scores)]


def _of_longer(longer: Mapping[int, Runs], sets: Sets) -> list[str]:
    """The longer runs against each other."""
    parts = ["### Training for longer, with the same settings"]
    for epochs, of_length in longer.items():
        parts.append(zeroshot_table(of_length, TOWERS[0], f", {epochs} epochs"))
        for method, baseline in COMPARED:
            title = f"#### {NAMES[method]} against {NAMES[baseline]}, {epochs} epochs"
            parts.append(differences(of_length, sets, method, baseline, title))
    return parts


def summary(cells: Mapping[str, Record], scores: Scores) -> str:
    """The page's summary: the mean zero-shot top-1 of each method on each tower, and
    the differences to CLIP.
    """
    runs, _ = select(cells, scores)
    sets = records.labels_by_set(STUDY)
    lines = []
    for method in METHODS:
        found = [list(runs.get((method, tower), {}).values()) for tower in TOWERS]
        lines.append(
            [
                NAMES[method],
                *(spread([zeroshot_mean(r) for r in of_tower]) for of_tower in found),
            ]
        )
    for method, baseline in (pair for pair in COMPARED if pair[1] == "clip"):
        row = [f"{NAMES[method]} − {NAMES[baseline]}, points"]
        for tower in TOWERS:
            found = compared(
                runs.get((method, tower), {}), runs.get((baseline, tower), {}), sets
            ).values()
            mean, n = together(found), sum(d.told for d in found)
            row.append(
                f"{points(mean.mean)} ({span(mean.over_classes)}; {n} sets)"
                if mean
                else "–"
            )
        lines.append(row)
    done = {
        tower: min(len(runs.get((method, tower), {})) for method in METHODS)
        for tower in TOWERS
    }
    seeds = ", ".join(f"{tower} {n} of {len(SEEDS)}" for tower, n in done.items())
    head = ["zero-shot top-1, mean of the eight sets, %", *TOWERS]
    return (
        f"{table(head, lines)}\n\nDifferences: paired, mean of the sets above chance"
        " for one of the two (so many), with the 95 % interval over classes and"
        f" pictures. Seeds that all methods have: {seeds}."
    )


TARGET = 0.8
"""The share of the cells above chance in which CLOOB is to be ahead."""


def zeroshot_table(runs: Runs, tower: str, what: str = "") -> str:
    """Top-1 by set, mean ± sd over the seeds; ``what`` ends the title."""
    methods = [m for m in METHODS if (m, tower) in runs]
    lines = []
    for name in ZEROSHOT:
        values = [
            [r["zeroshot"][name]["acc1"] for r in runs[m, tower].values()]
            for m in methods
        ]
        lines.append([name, *map(spread, values)])
    means = [[zeroshot_mean(r) for r in runs[m, tower].values()] for m in methods]
    lines.append(["**mean**", *map(spread, means)])
    head = ["set", *(f"{NAMES[m]} (n = {len(runs[m, tower])})" for m in methods)]
    return f"#### Zero-shot top-1, %, {tower}{what}\n\n" + table(head, lines)


def differences(runs: Runs, sets: Sets, method: str, baseline: str, title: str) -> str:
    """A method − another, by cell and by tower, over the seeds that both have, and the
    sign tests.
    """
    lines: list[list[str]] = []
    every_cell: list[float] = []
    told: dict[str, list[float]] = {}
    for tower, found in _by_tower(runs, sets, method, baseline).items():
        for name, difference in found.items():
            lines.append(
                [tower, name, *difference.shown(), "yes" if difference.told else "no"]
            )
            every_cell.append(difference.mean)
            if difference.told:
                told.setdefault(name, []).append(difference.mean)
        for everything, n in (
            (False, sum(d.told for d in found.values())),
            (True, len(found)),
        ):
            if mean := together(found.values(), everything):
                which = "all sets" if everything else f"the {n} sets above chance"
                lines.append(
                    [f"**{tower}**", f"**mean of {which}**", *mean.shown(), ""]
                )
    if not lines:
        return ""
    head = ["tower", "set", f"{NAMES[method]} − {NAMES[baseline]}, points"]
    head += ["95 %, over seeds", "95 %, over classes", "above chance"]
    above = [value for values in told.values() for value in values]
    of_sets = [float(np.mean(values)) for values in told.values()]
    counts = (
        f"{NAMES[method]} is ahead in {counted(above)} (tower, set) cells above chance,"
        f" and in {counted(every_cell)} of all. Sets are not independent from tower to"
        " tower: averaged over the towers on which they are above chance, it is ahead"
        f" in {counted(of_sets)} sets."
    )
    return f"{title}\n\n{table(head, lines)}\n\n{counts}"


def verdict(runs: Runs, sets: Sets, method: str, baseline: str) -> str:
    """What became of the target, which was declared before the first cell."""
    by_tower = _by_tower(runs, sets, method, baseline)
    told = [d.mean for found in by_tower.values() for d in found.values() if d.told]
    share = won_and_lost(told)[0] / len(told) if told else 0.0
    means = {tower: together(found.values()) for tower, found in by_tower.items()}
    clear = [
        tower
        for tower, mean in means.items()
        if mean is not None and mean.over_seeds[0] > 0 and mean.over_classes[0] > 0
    ]
    complete = all(
        len(runs.get((m, tower), {})) == len(SEEDS)
        for m in (method, baseline)
        for tower in TOWERS
    )
    met = share >= TARGET and len(clear) == len(TOWERS)
    answer = ("met" if met else "not met") + (
        "" if complete else " by the cells so far"
    )
    return (
        f"Target for {NAMES[method]}, ahead in {100 * TARGET:.0f} % of the cells above"
        " chance and both intervals of the mean above zero for each tower:"
        f" **{answer}**. It is ahead in {100 * share:.0f} %, and both intervals are"
        f" above zero for {', '.join(clear) or 'no tower'}."
    )


def chosen_table(scores: Scores) -> str:
    """The settings of the cells: whoever compares two methods by them compares these as
    well.
    """
    lines = []
    for method in METHODS:
        slugs = {tower: chosen_setting(method, scores, tower).slug for tower in TOWERS}
        if len(set(slugs.values())) == 1:
            slugs = {"all": slugs[TOWERS[0]]}
        lines += [[NAMES[method], tower, f"`{slug}`"] for tower, slug in slugs.items()]
    note = (
        "`lr` learning rate, `wd` weight decay, `n` batch, `t` τ⁻¹, `b` β. Learning"
        " rate and weight decay move the covariance as retrieval does"
        " ([log](../LOG.md)), so two methods differ here by more than their objective."
    )
    return f"### Settings of the cells\n\n{note}\n\n" + table(
        ["method", "tower", "setting"], lines
    )


def _by_tower(
    runs: Runs, sets: Sets, method: str, baseline: str
) -> dict[str, dict[str, Difference]]:
    """Tower -> set -> difference, where both methods have a seed in common."""
    found = {
        t: compared(runs.get((method, t), {}), runs.get((baseline, t), {}), sets)
        for t in TOWERS
    }
    return {tower: of_sets for tower, of_sets in found.items() if of_sets}
