"""Tables of what the validation pairs alone were asked: the search and the attempts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.pictograms import records
from benchmarks.pictograms.cells import (
    DEFAULTS,
    FINAL_EPOCHS,
    METHODS,
    TOWERS,
    Setting,
    chosen_setting,
    long_search,
    rate_search,
    search_cell,
    short_search,
)
from benchmarks.pictograms.comparison import Record
from benchmarks.pictograms.markdown import percent, points, table
from benchmarks.pictograms.selection import NAMES


def search_table(scores: Mapping[str, float]) -> str:
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


def equal_settings(results: Path) -> str:
    """The 2×2 with the published settings, which differ by nothing else but CLIP's learned temperature."""
    tried = records.read("search", results)
    found = {method: tried.get(search_cell(method, DEFAULTS[method], FINAL_EPOCHS).id) for method in METHODS}

    def shown(method: str) -> str:
        record = found[method]
        if record is None:
            return "–"
        val = record["val"]
        return (
            f"{percent(val['mean_recall'])}; {val['effective_eigenvalues_image']}, "
            f"{val['effective_eigenvalues_text']}; {val['ajne_image']:.1f}"
        )

    if not any(found.values()):
        return ""
    lines = [
        ["InfoNCE", shown("clip"), shown("infonce-hopfield")],
        ["InfoLOOB", shown("infoloob"), shown("cloob")],
        ["InfoLOOB, retrieval after half of the run", "–", shown("cloob-warm")],
    ]
    setting = DEFAULTS["cloob"]
    return (
        f"### Ablation at equal settings: {TOWERS[0]}, {FINAL_EPOCHS} epochs of the search\n\nMean recall on the "
        "validation pairs, %; effective eigenvalues of images, texts; Ajne of the images. All with learning rate "
        f"{setting.lr:g}, weight decay {setting.weight_decay:g}, batch {setting.batch_size}, τ⁻¹ {setting.inv_tau:g} "
        f"(CLIP's is learned from {DEFAULTS['clip'].inv_tau:.1f}), β {setting.beta:g}: tuned for none.\n\n"
        + table(["contrast", "no retrieval", "Hopfield retrieval"], lines)
    )


def attempts_table(study: Path) -> str:
    """What was tried beside the published forms, each under the run that it is compared with."""
    listed = sorted(records.read("attempts", study).values(), key=lambda record: record["place"])
    searched = records.read("search", study)
    lines = []
    for baseline in dict.fromkeys(record["baseline"] for record in listed):
        base = searched[baseline]
        method, setting = base["config"]["method"], Setting(**base["config"]["setting"])
        kind = "as published" if setting == DEFAULTS[method] else "as chosen"
        lines.append([f"**{NAMES[method]}**, {kind}: `{setting.slug}`", *_validation(base), ""])
        for own in (record for record in listed if record["baseline"] == baseline):
            gain = own["val"]["mean_recall"] - base["val"]["mean_recall"]
            name = f"{own['why']} (`{Setting(**own['config']['setting']).slug}`)"
            lines.append([name, *_validation(own), points(gain)])
    head = ["run", "epochs", "seed", "val mean recall, %", "effective eigenvalues, images", "Ajne, images"]
    head.append("against its baseline, points")
    return f"### Attempts: {TOWERS[0]}, on the validation pairs alone\n\n" + table(head, lines) if lines else ""


def _validation(record: Record) -> list[str]:
    config, val = record["config"], record["val"]
    row = [str(config["epochs"]), str(config["seed"]), percent(val["mean_recall"], 2)]
    return [*row, str(val["effective_eigenvalues_image"]), f"{val['ajne_image']:.1f}"]
