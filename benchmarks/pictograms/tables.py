"""All tables of ``docs/results.md``, and README's, recomputed from the records between two marker lines.

Cells count when they were run with the setting that the search chooses from the records as they are; CLIP and CLOOB
with their published settings stand beside them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from benchmarks.pictograms import records
from benchmarks.pictograms.cells import (
    CELL_EPOCHS,
    DEFAULTS,
    FINAL_EPOCHS,
    FINALISTS,
    LONG_EPOCHS,
    METHODS,
    PROBED,
    RATES,
    RUNS_A_METHOD,
    SEARCH_EPOCHS,
    SEEDS,
    TOWERS,
    ZEROSHOT,
    Setting,
    chosen_setting,
    long_search,
    rate_search,
    search_cell,
    short_search,
)
from benchmarks.pictograms.comparison import Record, Sets, compared, counted, together
from benchmarks.pictograms.markdown import percent, points, span, spread, table

BEGIN, END = "<!-- pictograms:begin -->", "<!-- pictograms:end -->"
NAMES = {
    "clip": "CLIP",
    "infoloob": "InfoLOOB",
    "infonce-hopfield": "InfoNCE + Hopfield",
    "cloob": "CLOOB",
    "cloob-warm": "CLOOB, InfoLOOB first",
}
COMPARED = (("cloob", "clip"), ("cloob-warm", "clip"), ("infoloob", "clip"), ("cloob-warm", "infoloob"))
"""The claim, the claim for the form that retrieves later, what InfoLOOB alone does, and what retrieval adds to it."""
Runs = dict[tuple[str, str], dict[int, Record]]
"""(method, tower) -> seed -> record."""


def write(results: Path, root: Path) -> None:
    """Puts the tables between the markers of ``docs/results.md`` and of README."""
    for page, tables in ((root / "docs" / "results.md", render(results)), (root / "README.md", summary(results))):
        page.write_text(replaced(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def replaced(text: str, tables: str) -> str:
    """The page's text with other tables.

    Raises:
        ValueError: It does not have both markers, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page must hold {BEGIN} and {END}, once each and in order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{tables}\n{text[text.index(END) :]}"


def render(results: Path = records.RESULTS) -> str:
    """All tables as Markdown."""
    scores = records.search_scores(results)
    cells = records.read("cells", results)
    runs, published = select(cells, scores)
    parts = [progress(results, runs, scores)]
    if runs:
        parts += [zeroshot_table(runs, tower) for tower in TOWERS if any(t == tower for _, t in runs)]
        labels = records.labels_by_set(results)
        parts += [differences(runs, labels, *pair) for pair in COMPARED]
        parts += [ablation(runs), other_scores(runs), over_time(runs, records.timing(results)), geometry_table(runs)]
        parts.append(lengths(runs, select(cells, scores, LONG_EPOCHS)[0]))
    if published:
        parts.append("### As published, nothing tuned\n\n" + zeroshot_table(published, TOWERS[0]))
    parts += [search_table(results, scores), attempts_table(results)]
    return "\n\n".join(part for part in parts if part)


def summary(results: Path = records.RESULTS) -> str:
    """README's table: the mean zero-shot top-1 of each method on each tower, and the differences to CLIP."""
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
            mean = together(compared(runs.get((method, tower), {}), runs.get((baseline, tower), {}), sets).values())
            row.append(f"{points(mean.mean)} ({span(mean.over_classes)})" if mean else "–")
        lines.append(row)
    done = {tower: min(len(runs.get((method, tower), {})) for method in METHODS) for tower in TOWERS}
    seeds = ", ".join(f"{tower} {n} of {len(SEEDS)}" for tower, n in done.items())
    head = ["zero-shot top-1, mean of the eight sets, %", *TOWERS]
    return (
        f"{table(head, lines)}\n\nDifferences: paired, mean of the sets above chance for one of the two, with the 95 % "
        f"interval over classes and pictures. Seeds that all methods have: {seeds}."
    )


def select(cells: Mapping[str, Record], scores: Mapping[str, float], epochs: int | None = None) -> tuple[Runs, Runs]:
    """The runs of a length (the study's) with the chosen settings, and those with the published ones."""
    chosen: Runs = defaultdict(dict)
    published: Runs = defaultdict(dict)
    for record in cells.values():
        config = record["config"]
        method, setting = config["method"], Setting(**config["setting"])
        if config["epochs"] != (epochs or CELL_EPOCHS):
            continue
        if setting == chosen_setting(method, scores, config["tower"])[0]:
            chosen[method, config["tower"]][config["seed"]] = record
        elif setting == DEFAULTS[method]:
            published[method, config["tower"]][config["seed"]] = record
    return dict(chosen), dict(published)


def progress(results: Path, runs: Runs, scores: Mapping[str, float]) -> str:
    """How much of the study the tables rest on."""
    short = sum(cell.id in scores for m in METHODS for _, cell in short_search(m, scores))
    final = sum(cell.id in scores for m in METHODS for cell in long_search(m, scores))
    done, whole = sum(map(len, runs.values())), len(METHODS) * len(TOWERS) * len(SEEDS)
    seconds = sum(
        r["cpu_seconds"] for stage in ("search", "cells", "attempts") for r in records.read(stage, results).values()
    )
    rates = sum(c.id in scores for m in METHODS for t in TOWERS[1:] for c in rate_search(m, t, scores))
    return (
        f"State: {short} of {RUNS_A_METHOD * len(METHODS)} short search runs, {final} of {FINALISTS * len(METHODS)} "
        f"finalists' runs, {rates} of {RATES * (len(TOWERS) - 1) * len(METHODS)} for the other towers, {done} of "
        f"{whole} cells; {seconds / 3600:.1f} CPU-core hours of training so far."
    )


def search_table(results: Path, scores: Mapping[str, float]) -> str:
    """Every setting that was tried, with its validation score."""
    lines = []
    for method in METHODS:
        rows = list(short_search(method, scores))
        rows += [("finalist", cell) for cell in long_search(method, scores)]
        rows += [(f"{tower}, rate", cell) for tower in TOWERS[1:] for cell in rate_search(method, tower, scores)]
        for name, cell in rows:
            if cell.id not in scores:
                continue
            setting, basis = chosen_setting(method, scores, cell.tower)
            decides = cell.tower != TOWERS[0] or (cell.epochs == FINAL_EPOCHS) == (basis == "finalists")
            best = cell.setting == setting and decides
            mark = (" **chosen**" if basis == "finalists" else " (best so far)") if best else ""
            shown = f"{percent(scores[cell.id], 2)}{mark}"
            lines.append([NAMES[method], name, str(cell.epochs), f"`{cell.setting.slug}`", shown])
    head = ["method", "round", "epochs", "setting", "mean recall on the validation pairs, %"]
    return "### The search\n\n" + (table(head, lines) if lines else "Nothing yet.")


def zeroshot_table(runs: Runs, tower: str) -> str:
    """Top-1 by set, mean ± sd over the seeds."""
    methods = [m for m in METHODS if (m, tower) in runs]
    lines = []
    for name in ZEROSHOT:
        values = [[r["zeroshot"][name]["acc1"] for r in runs[m, tower].values()] for m in methods]
        lines.append([name, *map(spread, values)])
    means = [[zeroshot_mean(r) for r in runs[m, tower].values()] for m in methods]
    lines.append(["**mean**", *map(spread, means)])
    head = ["set", *(f"{NAMES[m]} (n = {len(runs[m, tower])})" for m in methods)]
    return f"#### Zero-shot top-1, %, {tower}\n\n" + table(head, lines)


def differences(runs: Runs, sets: Sets, method: str, baseline: str) -> str:
    """A method − another, by cell and by tower, over the seeds that both have, and the sign tests."""
    lines: list[list[str]] = []
    told: dict[str, list[float]] = {}
    cells = 0
    for tower in TOWERS:
        found = compared(runs.get((method, tower), {}), runs.get((baseline, tower), {}), sets)
        cells += len(found)
        for name, difference in found.items():
            lines.append([tower, name, *difference.shown(), "yes" if difference.told else "no"])
            if difference.told:
                told.setdefault(name, []).append(difference.mean)
        if mean := together(found.values()):
            lines.append([f"**{tower}**", "**mean of the sets above chance**", *mean.shown(), ""])
    if not lines:
        return ""
    head = ["tower", "set", f"{NAMES[method]} − {NAMES[baseline]}, points"]
    head += ["95 %, over seeds", "95 %, over classes", "above chance"]
    above = [value for values in told.values() for value in values]
    verdict = (
        f"{NAMES[method]} is ahead in {counted(above)} (tower, set) cells above chance; {cells - len(above)} cells are "
        "not above chance for either. Sets are not independent from tower to tower: averaged over the towers it is "
        f"ahead in {counted([float(np.mean(values)) for values in told.values()])} sets."
    )
    title = f"### {NAMES[method]} against {NAMES[baseline]}, paired by seed"
    return f"{title}\n\n{table(head, lines)}\n\n{verdict}"


def ablation(runs: Runs) -> str:
    """The 2×2 of the family, by tower: mean zero-shot top-1 over the sets."""
    lines = []
    for tower in TOWERS:
        values = {m: [zeroshot_mean(r) for r in runs.get((m, tower), {}).values()] for m in METHODS}
        if any(values.values()):
            for contrast, methods in (("InfoNCE", ("clip", "infonce-hopfield")), ("InfoLOOB", ("infoloob", "cloob"))):
                lines.append([tower, contrast, *(spread(values[m]) for m in methods)])
            lines.append([tower, "InfoLOOB, retrieval after half of the run", "–", spread(values["cloob-warm"])])
    title = "### Ablation: mean zero-shot top-1 over the eight sets, %"
    return f"{title}\n\n" + table(["tower", "contrast", "no retrieval", "Hopfield retrieval"], lines)


def other_scores(runs: Runs) -> str:
    """Linear probe and retrieval."""
    lines = []
    for (method, tower), of_seed in ordered(runs):
        found = list(of_seed.values())
        probe = [spread([r["probe"][name]["acc1"] for r in found]) for name in PROBED]
        keys = ("image_to_text@1", "text_to_image@1", "mean_recall")
        val = [spread([r["val"][k] for r in found]) for k in keys]
        photos = [spread([r["retrieval"]["tuxpaint-captions"][k] for r in found]) for k in keys[2:]]
        lines.append([tower, NAMES[method], *probe, *val, *photos])
    head = ["tower", "method", *(f"probe {name}" for name in PROBED)]
    head += ["val image→text@1", "val text→image@1", "val mean recall", "tuxpaint-captions mean recall"]
    return "### Linear probe and retrieval, %\n\n" + table(head, lines)


def over_time(runs: Runs, timing: Mapping[str, Mapping[str, float]]) -> str:
    """Mean zero-shot top-1 along the run, with the training's seconds up to there."""
    epochs = sorted({line["epoch"] for r in every(runs) for line in r["curve"] if "zeroshot" in line})
    lines = []
    for (method, tower), of_seed in ordered(runs):
        row = [tower, NAMES[method]]
        for epoch in epochs:
            at = [
                line for r in of_seed.values() for line in r["curve"] if line["epoch"] == epoch and "zeroshot" in line
            ]
            a_step = timing.get(tower, {}).get(method)
            times = [line["cpu_seconds"] if a_step is None else line["step"] * a_step for line in at]
            seconds = float(np.mean(times)) if at else math.nan
            accuracy = float(np.mean([np.mean(list(line["zeroshot"].values())) for line in at])) if at else math.nan
            row.append(f"{percent(accuracy)} ({seconds:.0f} s)" if at else "–")
        lines.append(row)
    head = ["tower", "method", *(f"epoch {epoch}" for epoch in epochs)]
    how = "steps times what a step takes, measured side by side" if timing else "of each run, whatever else went on"
    title = f"### Accuracy against epochs and time: mean zero-shot top-1, % (seconds of one core: {how})"
    return f"{title}\n\n{table(head, lines)}"


def lengths(short: Runs, long: Runs) -> str:
    """Longer runs beside those of the study's length, for the seeds that both have."""
    lines = []
    for (method, tower), of_seed in ordered(long):
        seeds = sorted(of_seed.keys() & short.get((method, tower), {}).keys())
        if not seeds:
            continue
        row = [tower, NAMES[method]]
        for runs in (short, long):
            found = [runs[method, tower][seed] for seed in seeds]
            row += [spread([zeroshot_mean(r) for r in found]), spread([r["val"]["mean_recall"] for r in found])]
            row.append(f"{np.mean([r['val']['effective_eigenvalues_image'] for r in found]):.0f}")
        lines.append(row)
    head = ["tower", "method"]
    for epochs in (CELL_EPOCHS, LONG_EPOCHS):
        head += [f"zero-shot, {epochs} epochs", "val mean recall", "effective eigenvalues"]
    title = f"### Training for longer: {LONG_EPOCHS} epochs with the same settings, %"
    return f"{title}\n\n{table(head, lines)}" if lines else ""


def geometry_table(runs: Runs) -> str:
    """Effective eigenvalues and Ajne on the validation pairs, by epoch."""
    last = max(line["epoch"] for r in every(runs) for line in r["curve"])
    epochs = sorted({1, *(max(1, last * k // 4) for k in range(1, 5))})
    parts = []
    for title, key, digits in (
        ("Effective eigenvalues of the images (99 % of the variance)", "effective_eigenvalues_image", 0),
        ("Effective eigenvalues of the texts", "effective_eigenvalues_text", 0),
        ("Ajne of the images (1,000 pairs; lower is more uniform)", "ajne_image", 1),
        ("Ajne of the texts", "ajne_text", 1),
    ):
        lines = []
        for (method, tower), of_seed in ordered(runs):
            at = [
                [line["val"][key] for r in of_seed.values() for line in r["curve"] if line["epoch"] == e]
                for e in epochs
            ]
            lines.append([tower, NAMES[method], *(f"{np.mean(v):.{digits}f}" if v else "–" for v in at)])
        parts.append(f"#### {title}\n\n" + table(["tower", "method", *(f"epoch {e}" for e in epochs)], lines))
    return "### Geometry on the validation pairs\n\n" + "\n\n".join(parts)


def attempts_table(results: Path) -> str:
    """What was tried beside the published forms, next to these at the same length."""
    found = records.read("attempts", results)
    if not found:
        return ""
    lengths = (SEARCH_EPOCHS, FINAL_EPOCHS)
    baselines = [search_cell(method, DEFAULTS[method], epochs).id for epochs in lengths for method in METHODS]
    scores = records.search_scores(results)
    baselines += [search_cell(method, chosen_setting(method, scores)[0], FINAL_EPOCHS).id for method in METHODS]
    tried = records.read("search", results)
    listed = [*(tried[name] for name in dict.fromkeys(baselines) if name in tried), *found.values()]
    lines = []
    for record in sorted(listed, key=lambda record: record["config"]["epochs"]):
        config, val = record["config"], record["val"]
        row = [
            NAMES[config["method"]],
            f"`{Setting(**config['setting']).slug}`",
            str(config["epochs"]),
            str(config["seed"]),
        ]
        row += [percent(val["mean_recall"], 2), str(val["effective_eigenvalues_image"]), f"{val['ajne_image']:.1f}"]
        lines.append([*row, f"{record['cpu_seconds']:.0f}"])
    head = [
        "method",
        "setting",
        "epochs",
        "seed",
        "val mean recall, %",
        "effective eigenvalues, images",
        "Ajne, images",
        "CPU s",
    ]
    return "### Attempts\n\n" + table(head, lines)


def zeroshot_mean(record: Record) -> float:
    """Mean top-1 over the sets."""
    return float(np.mean([found["acc1"] for found in record["zeroshot"].values()]))


def ordered(runs: Runs) -> list[tuple[tuple[str, str], dict[int, Record]]]:
    """The runs tower by tower, methods in the study's order."""
    return sorted(runs.items(), key=lambda item: (TOWERS.index(item[0][1]), METHODS.index(item[0][0])))


def every(runs: Runs) -> Iterable[Record]:
    """All records."""
    return (record for of_seed in runs.values() for record in of_seed.values())
