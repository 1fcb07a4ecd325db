"""``cloob analyze``: how the embeddings of runs lie on the sphere, at the end and over their checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cloob.commands.arguments import check_amounts, parse
from cloob.errors import InputError, require

if TYPE_CHECKING:
    import tyro

    from cloob.evaluate.sets.captioned import CaptionedSet
else:  # the annotations below are read when the words are parsed
    tyro = require("tyro", "train")


@dataclass(frozen=True)
class AnalyzeArguments:
    """Geometry of models on image-caption pairs, effective eigenvalues by epoch, similar pictures and duplicates."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (all their checkpoints count), checkpoint or model folders, open_clip NAME/TAG, hf-hub:…"""
    pairs: str = "demo:val"
    """Image-caption pairs to measure on: what `cloob eval --retrieval` reads (of several captions the first)."""
    limit: int = 10_000
    """Pairs whose geometry is measured at most; similar pictures and duplicates are sought among all of them, in time
    that grows with their square."""
    similar: int = 20
    """Most similar pictures to list for each model."""
    duplicate: float = 0.999
    """Cosine from which two pictures count as one."""
    out: Path = Path("runs/analyze")
    """Folder of analysis.json and report.html."""
    cache: Path | None = None
    """Folder of embeddings for later runs; OUT/cache when left out."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    batch_size: int = 256
    """Images or texts a forward pass."""
    workers: int = 2
    """Decoding threads."""


def main(words: Sequence[str]) -> int:
    """Analyses; exit code 1 when a checkpoint could not be measured, with what there is written."""
    arguments = parse(AnalyzeArguments, words, "cloob analyze")
    if not arguments.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob analyze --help)")
    if not 0 < arguments.duplicate <= 1:
        raise InputError(f"duplicate is {arguments.duplicate}; a cosine above 0 and up to 1 is wanted")
    if arguments.similar < 0 or arguments.limit < 2:
        raise InputError("similar must be 0 or more, and limit 2 or more")
    check_amounts(arguments.batch_size, arguments.workers)

    from cloob.commands.console import EmbeddingProgress
    from cloob.commands.eval import named
    from cloob.commands.judge import check_writable
    from cloob.distributed import resolve_device
    from cloob.evaluate.analysis import analyze
    from cloob.evaluate.embeddings import EmbedOptions
    from cloob.evaluate.sets.captioned import open_captioned
    from cloob.evaluate.suite import write_results

    source = open_captioned(arguments.pairs)
    check_writable(arguments.out)
    models = named(arguments.models)
    options = EmbedOptions(
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        cache=arguments.cache or arguments.out / "cache",
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
        print(f"cloob: {failure['model']}: {failure['error']}", file=sys.stderr)
    return 1 if analysis.get("failures") else 0


def _write_page(path: Path, analysis: dict[str, Any], models: Mapping[str, str], source: CaptionedSet) -> None:
    from cloob.commands.judge import curve
    from cloob.data.batch import BadSample
    from cloob.evaluate.report import Found, ReportExtras, write_report

    place = {}  # of a picture in the source, by its key
    wanted = {key for run in analysis["runs"] for pair in run["similar"] for key in pair["keys"]}
    for index in range(len(source) if wanted else 0):
        try:
            sample = source.read(index)
        except BadSample:
            continue
        if sample.key in wanted:
            place[sample.key] = sample.image

    def twins(pair: Mapping[str, Any]) -> tuple[Found, Found]:
        first, second = (
            Found(place[key], caption, False, pair["cosine"])
            for key, caption in zip(pair["keys"], pair["captions"], strict=True)
        )
        return first, second

    curves = {name: curve(model) for name, model in models.items()}
    extras = ReportExtras(
        {name: lines for name, lines in curves.items() if lines},
        {run["model"]: run["checkpoints"] for run in analysis["runs"]},
        similar={run["model"]: [twins(pair) for pair in run["similar"]] for run in analysis["runs"]},
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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    names = [escape(run["model"]) for run in analysis["runs"]]
    table = Table("", *names, title=escape(analysis["pairs"]), title_justify="left")
    for key, label in _ROWS.items():
        values = (run["geometry"].get(key) for run in analysis["runs"])
        table.add_row(label, *("–" if v is None else f"{v:,d}" if isinstance(v, int) else f"{v:.3f}" for v in values))
    table.add_row("groups of duplicates", *(f"{len(run['duplicates'])}" for run in analysis["runs"]))
    Console().print(table)
