"""All tables of ``tables.md``, recomputed from the records between marker lines.

Cells count when they were run with the setting that the search chooses from the records as they are; CLIP and CLOOB
with their published settings stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.pictograms import records, wrong
from benchmarks.pictograms.cell_tables import (
    ablation,
    chosen_table,
    differences,
    effects,
    geometry_table,
    lengths,
    over_time,
    probe_table,
    retrieval_tables,
    verdict,
    zeroshot_table,
)
from benchmarks.pictograms.cells import (
    FINALISTS,
    LONG_EPOCHS,
    LONGEST_EPOCHS,
    METHODS,
    RATES,
    RUNS_A_METHOD,
    SEEDS,
    TOWERS,
    grid,
    long_search,
    rate_search,
    short_search,
)
from benchmarks.pictograms.comparison import Sets, compared, together
from benchmarks.pictograms.markdown import points, span, spread, table
from benchmarks.pictograms.search_tables import attempts_table, equal_settings, search_table
from benchmarks.pictograms.selection import NAMES, Runs, select, zeroshot_mean

BEGIN, END = "<!-- pictograms:begin -->", "<!-- pictograms:end -->"
SUMMARY = "<!-- pictograms-summary:begin -->", "<!-- pictograms-summary:end -->"
WRONG = "<!-- pictograms-wrong:begin -->", "<!-- pictograms-wrong:end -->"
PAGE = "benchmarks/pictograms/tables.md"
COMPARED = (("cloob", "clip"), ("cloob-warm", "clip"), ("infoloob", "clip"), ("cloob-warm", "infoloob"))
"""The claim, the claim for the form that retrieves later, what InfoLOOB alone does, and what retrieval adds to it."""
CLAIMS = COMPARED[:2]
EFFECTS = (*COMPARED, ("infonce-hopfield", "clip"), ("cloob", "infonce-hopfield"), ("cloob", "infoloob"))


def write(results: Path, root: Path) -> None:
    """Puts the tables between the markers of ``tables.md``."""
    page = root / PAGE
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def filled(text: str, results: Path = records.STUDY) -> str:
    """The page's text with the summary and all tables as the records give them."""
    searched, runs = (records.read(stage, results) for stage in (wrong.SEARCH, wrong.RUNS))
    of_wrong = wrong.render(records.search_scores(results), searched, runs)
    return replaced(replaced(replaced(text, summary(results), *SUMMARY), render(results)), of_wrong, *WRONG)


def replaced(text: str, tables: str, begin: str = BEGIN, end: str = END) -> str:
    """The page's text with other tables between two markers.

    Raises:
        ValueError: It does not have both markers, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must hold {begin} and {end}, once each and in order")
    return f"{text[: text.index(begin)]}{begin}\n{tables}\n{text[text.index(end) :]}"


def render(results: Path = records.STUDY) -> str:
    """All tables as Markdown."""
    scores = records.search_scores(results)
    cells = records.read("cells", results)
    runs, published = select(cells, scores)
    parts = [progress(results, runs, scores)]
    if runs:
        parts += _of_cells(runs, records.labels_by_set(results), results, scores)
    longer = {epochs: select(cells, scores, epochs)[0] for epochs in (LONG_EPOCHS, LONGEST_EPOCHS)}
    if any(longer.values()):
        parts += _of_longer(runs, longer, records.labels_by_set(results))
    if published:
        parts.append("### As published, nothing tuned")
        parts.append(zeroshot_table(published, TOWERS[0], ", as published"))
        title = "#### CLOOB against CLIP, both as published"
        parts.append(differences(published, records.labels_by_set(results), "cloob", "clip", title))
    parts += [search_table(scores), attempts_table(results)]
    return "\n\n".join(part for part in parts if part)


def _of_cells(runs: Runs, sets: Sets, results: Path, scores: Mapping[str, float]) -> list[str]:
    """What the grid of cells says."""
    parts = ["### Zero-shot", *(zeroshot_table(runs, tower) for tower in TOWERS if any(t == tower for _, t in runs))]
    for method, baseline in COMPARED:
        title = f"### {NAMES[method]} against {NAMES[baseline]}, paired by seed"
        parts.append(differences(runs, sets, method, baseline, title))
        if (method, baseline) in CLAIMS and parts[-1]:
            parts.append(verdict(runs, sets, method, baseline))
    parts += [effects(runs, sets, EFFECTS), ablation(runs), equal_settings(results), chosen_table(scores)]
    parts += [probe_table(runs), *retrieval_tables(runs), over_time(runs, records.timing(results))]
    return [*parts, geometry_table(runs)]


def _of_longer(runs: Runs, longer: Mapping[int, Runs], sets: Sets) -> list[str]:
    """The longer runs beside those of the study's length, and against each other."""
    parts = ["### Training for longer, with the same settings", lengths(runs, longer)]
    for epochs, of_length in longer.items():
        if not of_length:
            continue
        parts.append(zeroshot_table(of_length, TOWERS[0], f", {epochs} epochs"))
        for method, baseline in COMPARED:
            title = f"#### {NAMES[method]} against {NAMES[baseline]}, {epochs} epochs"
            parts.append(differences(of_length, sets, method, baseline, title))
        parts.append(over_time(of_length, {}, f"#### Accuracy along {epochs} epochs"))
        parts.append(geometry_table(of_length, f"#### Geometry along {epochs} epochs, on the validation pairs"))
    return parts


def summary(results: Path = records.STUDY) -> str:
    """The page's summary: the mean zero-shot top-1 of each method on each tower, and the differences to CLIP."""
    runs, _ = select(records.read("cells", results), records.search_scores(results))
    if not runs:
        return "No cell has been run yet."
    sets = records.labels_by_set(results)
    lines = []
    for method in METHODS:
        found = [list(runs.get((method, tower), {}).values()) for tower in TOWERS]
        lines.append([NAMES[method], *(spread([zeroshot_mean(r) for r in of_tower]) for of_tower in found)])
    for method, baseline in (pair for pair in COMPARED if pair[1] == "clip"):
        row = [f"{NAMES[method]} − {NAMES[baseline]}, points"]
        for tower in TOWERS:
            found = compared(runs.get((method, tower), {}), runs.get((baseline, tower), {}), sets).values()
            mean, n = together(found), sum(d.told for d in found)
            row.append(f"{points(mean.mean)} ({span(mean.over_classes)}; {n} sets)" if mean else "–")
        lines.append(row)
    done = {tower: min(len(runs.get((method, tower), {})) for method in METHODS) for tower in TOWERS}
    seeds = ", ".join(f"{tower} {n} of {len(SEEDS)}" for tower, n in done.items())
    head = ["zero-shot top-1, mean of the eight sets, %", *TOWERS]
    return (
        f"{table(head, lines)}\n\nDifferences: paired, mean of the sets above chance for one of the two (so many), "
        f"with the 95 % interval over classes and pictures. Seeds that all methods have: {seeds}."
    )


def progress(results: Path, runs: Runs, scores: Mapping[str, float]) -> str:
    """How much of the study the tables rest on."""
    short = sum(cell.id in scores for m in METHODS for _, cell in short_search(m, scores))
    final = sum(cell.id in scores for m in METHODS for cell in long_search(m, scores))
    rates = sum(c.id in scores for m in METHODS for t in TOWERS[1:] for c in rate_search(m, t, scores))
    done, whole = sum(map(len, runs.values())), len(METHODS) * len(TOWERS) * len(SEEDS)
    found = {stage: records.read(stage, results) for stage in ("search", "cells", "attempts")}
    tried = len(found["attempts"])
    beside = [cell.id for cell in grid(scores)[whole:]]
    seconds = sum(record["cpu_seconds"] for of_stage in found.values() for record in of_stage.values())
    return (
        f"State: {short} of {RUNS_A_METHOD * len(METHODS)} short search runs, {final} of {FINALISTS * len(METHODS)} "
        f"finalists' runs, {rates} of {RATES * (len(TOWERS) - 1) * len(METHODS)} for the other towers, {done} of "
        f"{whole} cells, {sum(name in found['cells'] for name in beside)} of {len(beside)} published and longer ones, "
        f"{tried} of {tried} attempts; {seconds / 3600:.1f} CPU-core "
        "hours of training."
    )
