"""Tables of the cells: zero-shot transfer, paired differences, what each part does, and what goes with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from benchmarks.pictograms.cells import (
    CELL_EPOCHS,
    METHODS,
    PROBED,
    SEEDS,
    TOWERS,
    ZEROSHOT,
    chosen_setting,
)
from benchmarks.pictograms.comparison import Difference, Sets, compared, counted, together, won_and_lost
from benchmarks.pictograms.markdown import percent, spread, table
from benchmarks.pictograms.selection import NAMES, Runs, every, ordered, zeroshot_mean

TARGET = 0.8
"""The share of the cells above chance in which CLOOB is to be ahead."""


def zeroshot_table(runs: Runs, tower: str, what: str = "") -> str:
    """Top-1 by set, mean ± sd over the seeds; ``what`` ends the title."""
    methods = [m for m in METHODS if (m, tower) in runs]
    lines = []
    for name in ZEROSHOT:
        values = [[r["zeroshot"][name]["acc1"] for r in runs[m, tower].values()] for m in methods]
        lines.append([name, *map(spread, values)])
    means = [[zeroshot_mean(r) for r in runs[m, tower].values()] for m in methods]
    lines.append(["**mean**", *map(spread, means)])
    head = ["set", *(f"{NAMES[m]} (n = {len(runs[m, tower])})" for m in methods)]
    return f"#### Zero-shot top-1, %, {tower}{what}\n\n" + table(head, lines)


def differences(runs: Runs, sets: Sets, method: str, baseline: str, title: str) -> str:
    """A method − another, by cell and by tower, over the seeds that both have, and the sign tests."""
    lines: list[list[str]] = []
    every_cell: list[float] = []
    told: dict[str, list[float]] = {}
    for tower, found in _by_tower(runs, sets, method, baseline).items():
        for name, difference in found.items():
            lines.append([tower, name, *difference.shown(), "yes" if difference.told else "no"])
            every_cell.append(difference.mean)
            if difference.told:
                told.setdefault(name, []).append(difference.mean)
        for everything, n in ((False, sum(d.told for d in found.values())), (True, len(found))):
            if mean := together(found.values(), everything):
                which = "all sets" if everything else f"the {n} sets above chance"
                lines.append([f"**{tower}**", f"**mean of {which}**", *mean.shown(), ""])
    if not lines:
        return ""
    head = ["tower", "set", f"{NAMES[method]} − {NAMES[baseline]}, points"]
    head += ["95 %, over seeds", "95 %, over classes", "above chance"]
    above = [value for values in told.values() for value in values]
    of_sets = [float(np.mean(values)) for values in told.values()]
    counts = (
        f"{NAMES[method]} is ahead in {counted(above)} (tower, set) cells above chance, and in {counted(every_cell)} "
        "of all. Sets are not independent from tower to tower: averaged over the towers on which they are above "
        f"chance, it is ahead in {counted(of_sets)} sets."
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
    complete = all(len(runs.get((m, tower), {})) == len(SEEDS) for m in (method, baseline) for tower in TOWERS)
    met = share >= TARGET and len(clear) == len(TOWERS)
    answer = ("met" if met else "not met") + ("" if complete else " by the cells so far")
    return (
        f"Target for {NAMES[method]}, ahead in {100 * TARGET:.0f} % of the cells above chance and both intervals of "
        f"the mean above zero for each tower: **{answer}**. It is ahead in {100 * share:.0f} %, and both intervals are "
        f"above zero for {', '.join(clear) or 'no tower'}."
    )


def effects(runs: Runs, sets: Sets, pairs: Sequence[tuple[str, str]]) -> str:
    """The mean differences of more pairs of methods in one table: what each part of CLOOB does."""
    lines = []
    for method, baseline in pairs:
        for tower, found in _by_tower(runs, sets, method, baseline).items():
            if mean := together(found.values()):
                n, seeds = sum(d.told for d in found.values()), len(mean.seeds)
                lines.append([f"{NAMES[method]} − {NAMES[baseline]}", tower, *mean.shown(), str(n), str(seeds)])
    head = ["difference", "tower", "points", "95 %, over seeds", "95 %, over classes", "sets above chance", "seeds"]
    title = "### What each part does: mean differences of the sets above chance"
    return f"{title}\n\n{table(head, lines)}" if lines else ""


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
    return (
        f"{title}\n\nEach method with the settings that are best for it, which are not the same (a table below).\n\n"
        + table(["tower", "contrast", "no retrieval", "Hopfield retrieval"], lines)
    )


def chosen_table(scores: Mapping[str, float]) -> str:
    """The settings of the cells: whoever compares two methods by them compares these as well."""
    lines = []
    for method in METHODS:
        slugs = {tower: chosen_setting(method, scores, tower)[0].slug for tower in TOWERS}
        if len(set(slugs.values())) == 1:
            slugs = {"all": slugs[TOWERS[0]]}
        lines += [[NAMES[method], tower, f"`{slug}`"] for tower, slug in slugs.items()]
    note = (
        "`lr` learning rate, `wd` weight decay, `n` batch, `t` τ⁻¹, `b` β. Learning rate and weight decay move the "
        "covariance as retrieval does ([log](../LOG.md)), so two methods differ here by more than their objective."
    )
    return f"### Settings of the cells\n\n{note}\n\n" + table(["method", "tower", "setting"], lines)


def probe_table(runs: Runs) -> str:
    """Linear probe."""
    lines = [
        [tower, NAMES[method], *(spread([r["probe"][name]["acc1"] for r in of_seed.values()]) for name in PROBED)]
        for (method, tower), of_seed in ordered(runs)
    ]
    return "### Linear probe, top-1, %\n\n" + table(["tower", "method", *PROBED], lines)


def retrieval_tables(runs: Runs) -> list[str]:
    """Recalls both ways, on the validation pairs and on photographs with captions of their own."""
    ways = (("image→text", "image_to_text"), ("text→image", "text_to_image"))
    columns = [(f"{way} @{k}", f"{key}@{k}") for way, key in ways for k in (1, 5, 10)] + [("mean", "mean_recall")]
    parts = []
    for title, found_in in (
        ("the validation pairs", lambda r: r["val"]),
        ("tuxpaint-captions", lambda r: r["retrieval"]["tuxpaint-captions"]),
    ):
        lines = [
            [tower, NAMES[method], *(spread([found_in(r)[key] for r in of_seed.values()]) for _, key in columns)]
            for (method, tower), of_seed in ordered(runs)
        ]
        head = ["tower", "method", *(name for name, _ in columns)]
        parts.append(f"### Recall on {title}, %\n\n" + table(head, lines))
    return parts


def over_time(
    runs: Runs, timing: Mapping[str, Mapping[str, Sequence[float]]], title: str = "### Accuracy against epochs"
) -> str:
    """Mean zero-shot top-1 along the run, with the training's seconds up to there where steps were timed."""
    epochs = sorted({line["epoch"] for r in every(runs) for line in r["curve"] if "zeroshot" in line})
    lines = []
    for (method, tower), of_seed in ordered(runs):
        row = [tower, NAMES[method]]
        for epoch in epochs:
            at = [
                (line, r["curve"][-1]["step"])
                for r in of_seed.values()
                for line in r["curve"]
                if line["epoch"] == epoch and "zeroshot" in line
            ]
            if not at:
                row.append("–")
                continue
            accuracy = percent(float(np.mean([np.mean(list(line["zeroshot"].values())) for line, _ in at])))
            halves = timing.get(tower, {}).get(method)
            seconds = [_seconds(line["step"], whole, halves) for line, whole in at] if halves else []
            row.append(f"{accuracy} ({np.mean(seconds):.0f} s)" if seconds else accuracy)
        lines.append(row)
    head = ["tower", "method", *(f"epoch {epoch}" for epoch in epochs)]
    how = " and time" if timing else ""
    note = " (seconds of one core: steps times what a step takes, all methods measured side by side)" if timing else ""
    return f"{title}{how}: mean zero-shot top-1, %{note}\n\n{table(head, lines)}"


def _seconds(step: int, whole: int, halves: Sequence[float]) -> float:
    """Of the first ``step`` of ``whole`` steps, a step of each half of the run taking its own time."""
    half = math.ceil(whole / 2)
    return min(step, half) * halves[0] + max(0, step - half) * halves[1]


def lengths(short: Runs, longer: Mapping[int, Runs]) -> str:
    """Longer runs beside those of the study's length, for the seeds that both have."""
    lines = []
    for epochs, long in longer.items():
        for (method, tower), of_seed in ordered(long):
            seeds = sorted(of_seed.keys() & short.get((method, tower), {}).keys())
            if not seeds:
                continue
            pairs = [[runs[method, tower][seed] for seed in seeds] for runs in (short, long)]
            row = [tower, NAMES[method], str(epochs), ", ".join(map(str, seeds))]
            row += [spread([zeroshot_mean(r) for r in found]) for found in pairs]
            row += [spread([r["val"]["mean_recall"] for r in found]) for found in pairs]
            row += [f"{np.mean([r['val']['effective_eigenvalues_image'] for r in found]):.0f}" for found in pairs]
            lines.append(row)
    head = ["tower", "method", "epochs", "seeds"]
    for what in ("zero-shot, %", "val mean recall, %", "effective eigenvalues"):
        head += [f"{what}: {CELL_EPOCHS} epochs", "so many"]
    return table(head, lines) if lines else ""


def geometry_table(runs: Runs, title: str = "### Geometry on the validation pairs") -> str:
    """Effective eigenvalues, Ajne and saturation, by epoch."""
    below = "#" + title.split()[0]
    last = max(line["epoch"] for r in every(runs) for line in r["curve"])
    epochs = sorted({1, *(max(1, last * k // 4) for k in range(1, 5))})
    parts = []
    for name, key, digits in (
        ("Effective eigenvalues of the images (99 % of the variance)", "effective_eigenvalues_image", 0),
        ("Effective eigenvalues of the texts", "effective_eigenvalues_text", 0),
        ("Ajne of the images (1,000 pairs; lower is more uniform)", "ajne_image", 1),
        ("Ajne of the texts", "ajne_text", 1),
        ("Saturation, 1 − mean p of the pair, of the 1,000 pairs at τ⁻¹ = 30 for all", "saturation", 2),
        ("Saturation of training batches, each method at its own τ⁻¹ and batch", "train_saturation", 2),
    ):
        lines = []
        for (method, tower), of_seed in ordered(runs):
            of_epoch = [[line for r in of_seed.values() for line in r["curve"] if line["epoch"] == e] for e in epochs]
            at = [[line[key] if key in line else line["val"][key] for line in found] for found in of_epoch]
            lines.append([tower, NAMES[method], *(f"{np.mean(v):.{digits}f}" if v else "–" for v in at)])
        parts.append(f"{below} {name}\n\n" + table(["tower", "method", *(f"epoch {e}" for e in epochs)], lines))
    return f"{title}\n\n" + "\n\n".join(parts)


def _by_tower(runs: Runs, sets: Sets, method: str, baseline: str) -> dict[str, dict[str, Difference]]:
    """Tower -> set -> difference, where both methods have a seed in common."""
    found = {t: compared(runs.get((method, t), {}), runs.get((baseline, t), {}), sets) for t in TOWERS}
    return {tower: of_sets for tower, of_sets in found.items() if of_sets}
