"""Models side by side: what ``eval``, ``demo`` and ``analyze`` share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloob.commands.terminal import Progress, print_table
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.data.content import Reader
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.report import ExampleQuery
    from cloob.evaluation.sets.labelled import LabelledSet


@dataclass(frozen=True)
class Comparison:
    """Models by the name they have in results, the sets they were measured on, their embeddings and results.json."""

    models: Mapping[str, str | Path]
    zeroshot: Sequence[LabelledSet]
    retrieval: Sequence[Reader]
    embeddings: Embeddings
    results: dict[str, Any]


def compare(
    models: Mapping[str, str | Path],
    zeroshot: Sequence[LabelledSet],
    retrieval: Sequence[Reader],
    options: EmbedOptions,
    out: Path,
    *,
    missing: Mapping[str, str] | None = None,
    **more: Any,
) -> Comparison:
    """Measures models and writes results.json into ``out``.

    Sets that are ``missing``, each with the reason, are failures of no model. ``more`` is that of ``cloob.evaluate``.
    """
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.suite import evaluate, write_results

    with Progress(tenths=True) as progress:
        embeddings = Embeddings(models, options, progress=progress.update, tower=bool(more.get("training")))
        results = evaluate(embeddings, zeroshot, retrieval, **more)
    for what, (taken, asked) in embeddings.reused().items():
        print(f"cloob: features of {taken:,} of {asked:,} {what} are those that `train align` kept", file=sys.stderr)
    absent = [{"model": None, "set": name, "error": error} for name, error in (missing or {}).items()]
    if absent:
        results["failures"] = [*absent, *results.get("failures", ())]
    write_results(out / "results.json", results)
    return Comparison(models, zeroshot, retrieval, embeddings, results)


def embed_options(device: str, batch_size: int = 256, workers: int = 2) -> EmbedOptions:
    from cloob.cache import Cache
    from cloob.distributed import resolve_device
    from cloob.evaluation.embed import EmbedOptions

    return EmbedOptions(resolve_device(device), batch_size, workers, Cache())


def write_page(
    path: Path,
    comparison: Comparison,
    *,
    title: str,
    notes: Sequence[str] = (),
    searches: Sequence[ExampleQuery] = (),
) -> None:
    """Writes the report: searches, the numbers, curves of the runs and example queries."""
    from cloob.evaluation.examples import example_queries
    from cloob.evaluation.report import write_report
    from cloob.models.runs import curve

    embeddings, rows = comparison.embeddings, comparison.results["rows"]
    labelled = [data for data in comparison.zeroshot if all(data.name in row["zeroshot"] for row in rows)]
    captioned = [data for data in comparison.retrieval if all(data.name in row["retrieval"] for row in rows)]
    models = [row["model"] for row in rows]
    queries = example_queries(embeddings, labelled[0], n=8, models=models) if labelled else []
    queries += example_queries(embeddings, captioned[0], n=4, models=models) if captioned else []
    curves = {model: lines for model in models if (lines := curve(comparison.models[model]))}
    shown = comparison.results
    write_report(path, shown, title=title, notes=notes, curves=curves, queries=queries, searches=searches)


def check_writable(out: Path) -> None:
    """Refuses a folder for results that cannot be written, before the work."""
    place = next(path for path in (out, *out.parents) if path.exists())  # a folder made here would outlive an error
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"{out}: results cannot be written here")


def names(sources: Sequence[str]) -> dict[str, str]:
    """Models by the last parts of where they are: one, or as many as no other model's place ends in."""
    parts = {source: Path(source).parts or (source,) for source in sources}

    def name(source: str) -> str:
        others = [other for place, other in parts.items() if place != source]
        for n in range(1, len(parts[source]) + 1):
            tail = parts[source][-n:]
            if all(other[-n:] != tail for other in others):
                return Path(*tail).as_posix()
        return source  # one place, written in two ways

    return {name(source): source for source in sources}


def say_checkpoints(models: Iterable[str]) -> None:
    """Says on stderr which models are run folders that stand for their best checkpoint."""
    from cloob.models.runs import checkpoint_step, chosen_checkpoint, with_checkpoint

    for model in models:
        if with_checkpoint(model) == f"{model}:best":
            step = checkpoint_step(chosen_checkpoint(Path(model)))
            print(f"cloob: {model}: its best checkpoint, step {step:,} ({model}:last is the last)", file=sys.stderr)


def report_problems(results: Mapping[str, Any]) -> int:
    """Says on stderr what could not be read, loaded or measured; returns the exit code.

    Sets that are not there were named before the work.
    """
    from cloob.evaluation.report.numbers import problems

    faults = problems(results)
    lines = [f"{problem.set}: {problem.message}" for problem in faults["unreadable"]]
    lines += [f"{problem.model} could not be loaded: {problem.message}" for problem in faults["unloaded"]]
    lines += [f"{problem.model} on {problem.set}: {problem.message}" for problem in faults["failed"]]
    for line in lines:
        print(f"cloob: {line}", file=sys.stderr)
    return 1 if results.get("failures") else 0


_SECTIONS = {
    "zeroshot": {"acc1": "top-1 %", "acc5": "top-5 %", "mean_per_class_recall": "mean per class %"},
    "probe": {"acc1": "probe, top-1 %", "mean_per_class_recall": "probe, mean per class %"},
    "retrieval": {
        f"{direction}@{k}": f"{arrow} R@{k} %"
        for direction, arrow in (("image_to_text", "image→text"), ("text_to_image", "text→image"))
        for k in (1, 5, 10)
    },
    "geometry": {
        "effective_eigenvalues_image": "effective eigenvalues, images",
        "effective_eigenvalues_text": "effective eigenvalues, texts",
    },
    "vectors": {
        f"{way}@{k}": f"{arrow} R@{k} %" for way, arrow in (("a_to_b", "a→b"), ("b_to_a", "b→a")) for k in (1, 5, 10)
    }
    | {f"chance@{k}": f"chance, R@{k} %" for k in (1, 5, 10)},
}


def print_results(results: Mapping[str, Any]) -> None:
    """Prints a row per number and a column per model, intervals in brackets."""
    rows = results["rows"]
    sections = []
    for section, keys in _SECTIONS.items():
        for name in dict.fromkeys(name for row in rows for name in row.get(section, ())):
            numbers = [row.get(section, {}).get(name, {}) for row in rows]
            sections.append(
                [(f"{name}  {label}", *(_cell(each, key) for each in numbers)) for key, label in keys.items()]
            )
    if any(row["train_seconds"] is not None for row in rows):
        sections.append([("training, seconds", *(_whole(row["train_seconds"]) for row in rows))])
    print_table([row["model"] for row in rows], sections)


def print_differences(results: Mapping[str, Any]) -> None:
    """Prints a line for each two models and number: by how much the later one is ahead, with the interval."""
    for entry in results["differences"]:
        mean, low, high = (100 * entry[key] for key in ("difference", "low", "high"))
        print(f"{entry['model']} − {entry['baseline']}, {entry['metric']}: {mean:+.1f} ({low:+.1f} … {high:+.1f})")


def _cell(numbers: Mapping[str, Any], key: str) -> str:
    value = numbers.get(key)
    if value is None or key.startswith("effective"):
        return _whole(value)
    interval = numbers.get(f"{key}_interval")
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else "")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
