"""Measures the geometry of runs as ``cloob analyze`` was asked to, and writes numbers and the report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloob.cache import Cache
from cloob.commands.measuring import AnalyzeArguments
from cloob.commands.steps import columns, say_next
from cloob.commands.work.console import EmbeddingProgress, say_checkpoints
from cloob.commands.work.evaluate import named
from cloob.commands.work.judge import check_writable
from cloob.data.batch import BadSample
from cloob.data.content import Reader
from cloob.distributed import resolve_device
from cloob.evaluation.analysis import analyze
from cloob.evaluation.embed import EmbedOptions
from cloob.evaluation.report import ReportExtras, ShownPicture, write_report
from cloob.evaluation.sets.captioned import open_captioned
from cloob.evaluation.suite import write_results
from cloob.models.runs import curve


def run(arguments: AnalyzeArguments) -> int:
    """Analyses; returns the exit code."""
    source = open_captioned(
        arguments.pairs, image_column=arguments.image_column, caption_column=arguments.caption_column
    )
    check_writable(arguments.out)
    say_checkpoints(arguments.models)
    models = named(arguments.models)
    options = EmbedOptions(
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        cache=Cache(),
    )
    with EmbeddingProgress() as progress:
        analysis = analyze(
            models,
            source,
            options,
            similar=arguments.similar,
            duplicate=arguments.duplicate,
            limit=arguments.limit,
            progress=progress.update,
        )
    write_results(arguments.out / "analysis.json", analysis)
    _write_page(arguments.out / "report.html", analysis, models, source)
    print(f"{arguments.out / 'analysis.json'}\n{arguments.out / 'report.html'}")
    _print_table(analysis)
    for failure in analysis.get("failures", ()):
        model, error = failure["model"], failure["error"]
        named_in_it = error.startswith((model, models.get(model, model)))
        print(f"cloob: {error if named_in_it else f'{model}: {error}'}", file=sys.stderr)
    measured = [models[run["model"]] for run in analysis["runs"]]
    named_columns = columns(arguments.image_column, arguments.caption_column)
    say_next(["eval", *measured, "--retrieval", arguments.pairs, *named_columns, "--out", arguments.out / "eval"])
    return 1 if analysis.get("failures") else 0


def _write_page(path: Path, analysis: dict[str, Any], models: Mapping[str, str], source: Reader) -> None:
    place = {}  # of a picture in the source, by its key
    wanted = {key for run in analysis["runs"] for pair in run["similar"] for key in pair["keys"]}
    for index in range(len(source) if wanted else 0):
        try:
            sample = source.read(index)
        except BadSample:
            continue
        if sample.key in wanted:
            place[sample.key] = sample.image

    def similar_pictures(pair: Mapping[str, Any]) -> tuple[ShownPicture, ShownPicture]:
        first, second = (
            ShownPicture(place[key], caption, False, pair["cosine"])
            for key, caption in zip(pair["keys"], pair["captions"], strict=True)
        )
        return first, second

    curves = {name: curve(model) for name, model in models.items()}
    extras = ReportExtras(
        {name: lines for name, lines in curves.items() if lines},
        {run["model"]: run["checkpoints"] for run in analysis["runs"]},
        similar={run["model"]: [similar_pictures(pair) for pair in run["similar"]] for run in analysis["runs"]},
    )
    rows = [
        {
            "model": run["model"],
            "geometry": {analysis["pairs"]: {**run["geometry"], "unreadable": run.get("unreadable")}},
        }
        for run in analysis["runs"]
    ]
    failures = [{**failure, "set": analysis["pairs"]} for failure in analysis.get("failures", ())]
    write_report(path, {"rows": rows, "failures": failures}, extras, title="Geometry of the embeddings")


_ROWS = {
    "effective_eigenvalues_image": "effective eigenvalues, images",
    "effective_eigenvalues_text": "effective eigenvalues, texts",
    "effective_eigenvalues_image_retrieved": "… images, retrieved",
    "effective_eigenvalues_text_retrieved": "… texts, retrieved",
    "ajne_image": "Ajne, images",
    "ajne_text": "Ajne, texts",
    "alignment": "alignment",
    "uniformity_image": "uniformity, images",
    "uniformity_text": "uniformity, texts",
    "modality_gap": "modality gap",
    "saturation": "InfoNCE saturation",
    "n": "pairs",
}


def _print_table(analysis: dict[str, Any]) -> None:
    names = [escape(run["model"]) for run in analysis["runs"]]
    table = Table("", *names, title=escape(analysis["pairs"]), title_justify="left")
    for key, label in _ROWS.items():
        values = (run["geometry"].get(key) for run in analysis["runs"])
        table.add_row(label, *("–" if v is None else f"{v:,d}" if isinstance(v, int) else f"{v:.3f}" for v in values))
    table.add_row("groups of duplicates", *(f"{len(run['duplicates'])}" for run in analysis["runs"]))
    Console().print(table)
