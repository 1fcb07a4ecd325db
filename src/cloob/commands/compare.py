"""Models side by side: what ``eval``, ``demo`` and ``analyze`` share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloob.commands.console import ColumnOptions, DecodeOptions, progress, refuse, say

if TYPE_CHECKING:
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.sets.suites import SuiteSets


@dataclass(frozen=True)
class MeasureOptions(ColumnOptions, DecodeOptions):
    """How pairs are read, where the model runs, and what is kept."""

    batch_size: int = 256  # Images or texts a forward pass.

    def embedding(self) -> EmbedOptions:
        from cloob.cache import Cache
        from cloob.distributed import resolve_device
        from cloob.evaluation.embed import EmbedOptions

        return EmbedOptions(resolve_device(self.device), self.batch_size, self.threads(), Cache())


def check_models(models: Sequence[str]) -> None:
    refuse({"no model given: name a run folder, or NAME/TAG of open_clip (--help says more)": not models})


def begin(models: Sequence[str], out: Path) -> dict[str, str]:
    """Models by name; refuses a folder that cannot be written, and says which runs stand for their best checkpoint."""
    from cloob.models.runs import checkpoint_step, chosen_checkpoint, with_checkpoint

    place = next(path for path in (out, *out.parents) if path.exists())  # a folder made here would outlive an error
    refuse({f"{out}: results cannot be written here": not (place.is_dir() and os.access(place, os.W_OK))})
    for model in models:
        if with_checkpoint(model) == f"{model}:best":
            step = checkpoint_step(chosen_checkpoint(Path(model)))
            say(f"{model}: its best checkpoint, step {step:,} ({model}:last is the last)")
    return dict(zip(distinct([Path(model).name or model for model in models], models), models, strict=True))


def distinct(names: Sequence[str], places: Sequence[str]) -> list[str]:
    """Names; in place of equal ones what was typed."""
    return [place if names.count(name) > 1 else name for name, place in zip(names, places, strict=True)]


def compare(
    models: Mapping[str, str | Path],
    sets: SuiteSets,
    options: EmbedOptions,
    out: Path,
    *,
    seeds: Mapping[str, Mapping[int, str]] | None = None,
    **more: Any,
) -> tuple[Embeddings, dict[str, Any]]:
    """Measures models and writes results.json, with means over groups of ``seeds``; a missing set fails no model."""
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.suite import evaluate, over_seeds, write_results

    with progress() as update:
        embeddings = Embeddings(models, options, progress=update, tower=bool(sets.training))
        results = evaluate(embeddings, sets.sets, sets.pairs, vectors=sets.vectors, training=sets.training, **more)
    if sets.missing:
        absent = [{"model": None, "set": name, "error": error} for name, error in sets.missing.items()]
        results["failures"] = [*absent, *results.get("failures", ())]
    if seeds:
        results["seeds"] = over_seeds(results["rows"], seeds)
    write_results(out / "results.json", results)
    return embeddings, results


def write_page(path: Path, embeddings: Embeddings, results: Mapping[str, Any], sets: SuiteSets, **more: Any) -> None:
    """Writes the report: the numbers, curves of the runs, example queries, and what ``write_report`` takes besides."""
    from cloob.evaluation.analysis import example_queries
    from cloob.evaluation.report import write_report
    from cloob.evaluation.suite import of_sides
    from cloob.models.runs import curve

    rows, queries = results["rows"], []
    models = [row["model"] for row in rows]
    for some, key, n in ((sets.sets, "zeroshot", 8), (sets.pairs, "retrieval", 4)):
        measured = [data for data in some if all(data.name in row[key] for row in rows)]
        queries += example_queries(embeddings, measured[0], n=n, models=models) if measured else []
    curves = {model: lines for model in models if (lines := curve(str(embeddings.models[model])))}
    if sets.vectors:
        curves = {model: list(map(of_sides, lines)) for model, lines in curves.items()}
    write_report(path, results, curves=curves, queries=queries, **more)


def report_problems(results: Mapping[str, Any]) -> int:
    """Says what could not be read, loaded or measured, missing sets apart; returns the exit code."""
    from cloob.evaluation.report.tables import problems

    found = problems(results)
    templates = {"unreadable": "{0.set}", "unloaded": "{0.model} could not be loaded", "failed": "{0.model} on {0.set}"}
    for kind, what in templates.items():
        for problem in found[kind]:
            say(f"{what.format(problem)}: {problem.message}")
    return 1 if results.get("failures") else 0


def print_results(rows: Sequence[Mapping[str, Any]], *, all_geometry: bool = False) -> None:
    """Prints a row per number and a column per model, shares in percent and intervals in brackets."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", pad_edge=False)
    for row in rows:
        table.add_column(escape(row["model"]), justify="right")
    for section in ("zeroshot", "probe", "retrieval", "geometry", "vectors"):
        for name in dict.fromkeys(name for row in rows for name in row.get(section, ())):
            numbers = [row.get(section, {}).get(name, {}) for row in rows]
            keys = dict.fromkeys(key for each in numbers for key in each if isinstance(each[key], int | float))
            if section == "geometry" and not all_geometry:
                keys = dict.fromkeys(key for key in keys if re.fullmatch("effective_eigenvalues_[a-z]+", key))
            what = f"{name}  probe" if section == "probe" else f"{name} "
            table.add_section()
            for key in keys:
                table.add_row(escape(f"{what} {key.replace('_', ' ')}"), *(_cell(each, key) for each in numbers))
    seconds = [row.get("train_seconds") for row in rows]
    if any(each is not None for each in seconds):
        table.add_section()
        table.add_row("training, seconds", *("–" if each is None else f"{each:,.0f}" for each in seconds))
    if table.row_count:
        Console().print(table)


def _cell(numbers: Mapping[str, Any], key: str) -> str:
    value = numbers.get(key)
    if value is None:
        return "–"
    if isinstance(value, int) or not ("@" in key or f"{key}_interval" in numbers):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
    interval = numbers.get(f"{key}_interval")
    return f"{100 * value:.1f} %" + (f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else "")
