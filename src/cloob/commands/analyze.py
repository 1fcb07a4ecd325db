"""``cloob analyze``: how the embeddings of runs lie on the sphere, at the end and over their checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cloob.commands.compare import check_writable, embed_options, names, say_checkpoints
from cloob.commands.options import CacheOptions, as_words, at_least, tyro
from cloob.commands.terminal import Progress, print_table, say_next
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.data.content import Reader


@dataclass(frozen=True)
class Options:
    """Geometry of models on image-caption pairs, effective eigenvalues by epoch, similar pictures and duplicates."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (all their checkpoints count), checkpoint or model folders, open_clip NAME/TAG, hf-hub:…"""
    pairs: str = "demo:val"
    """Image-caption pairs to measure on: what `cloob eval --retrieval` reads (of several captions the first)."""
    image_column: str = "filepath"
    """Column of a table with the path of the picture."""
    caption_column: str = "title"
    """Column of a table with the caption."""
    limit: int = 10_000
    """Pairs whose geometry is measured at most; similar pictures and duplicates are sought among all of them, in time
    that grows with their square."""
    similar: int = 20
    """Most similar pictures to list for each model."""
    duplicate: float = 0.999
    """Cosine from which two pictures count as one."""
    out: Path = Path("runs/analyze")
    """Folder of analysis.json and report.html."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    batch_size: int = 256
    """Images or texts a forward pass."""
    workers: int = 2
    """Decoding threads."""
    cache: CacheOptions = field(default_factory=CacheOptions)


def check(options: Options) -> None:
    if not options.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob analyze --help)")
    if not 0 < options.duplicate <= 1:
        raise InputError(f"--duplicate is {options.duplicate}; a cosine above 0 and up to 1 is wanted")
    at_least(options, {"similar": 0, "limit": 2})


def run(options: Options) -> int:
    """Analyses; 1 when a checkpoint could not be measured, with what there is written."""
    from cloob.evaluation.sets.captioned import open_captioned

    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    source = open_captioned(options.pairs, **columns)
    check_writable(options.out)
    say_checkpoints(options.models)
    models = names(options.models)

    from cloob.evaluation.analysis import analyze
    from cloob.evaluation.suite import write_results

    with Progress() as progress:
        analysis = analyze(
            models,
            source,
            embed_options(options.device, options.batch_size, options.workers),
            similar=options.similar,
            duplicate=options.duplicate,
            limit=options.limit,
            progress=progress.update,
        )
    write_results(options.out / "analysis.json", analysis)
    _write_page(options.out / "report.html", analysis, models, source)
    print(f"{options.out / 'analysis.json'}\n{options.out / 'report.html'}")
    _print(analysis)
    for failure in analysis.get("failures", ()):
        model, error = failure["model"], failure["error"]
        named = error.startswith((model, models.get(model, model)))
        print(f"cloob: {error if named else f'{model}: {error}'}", file=sys.stderr)
    measured = [models[run["model"]] for run in analysis["runs"]]
    more = as_words(options, "image_column", "caption_column")
    say_next(["eval", *measured, "--retrieval", options.pairs, *more, "--out", options.out / "eval"])
    return 1 if analysis.get("failures") else 0


def _write_page(path: Path, analysis: dict[str, Any], models: Mapping[str, str], source: Reader) -> None:
    from cloob.data.batch import BadSample
    from cloob.evaluation.report import ShownPicture, write_report
    from cloob.models.runs import curve

    images = {}  # of the source, by key
    wanted = {key for run in analysis["runs"] for pair in run["similar"] for key in pair["keys"]}
    for index in range(len(source) if wanted else 0):
        try:
            sample = source.read(index)
        except BadSample:
            continue
        if sample.key in wanted:
            images[sample.key] = sample.image

    def similar_pictures(pair: Mapping[str, Any]) -> tuple[ShownPicture, ShownPicture]:
        first, second = (
            ShownPicture(images[key], caption, False, pair["cosine"])
            for key, caption in zip(pair["keys"], pair["captions"], strict=True)
        )
        return first, second

    runs, pairs = analysis["runs"], analysis["pairs"]
    rows = [
        {"model": run["model"], "geometry": {pairs: {**run["geometry"], "unreadable": run.get("unreadable")}}}
        for run in runs
    ]
    write_report(
        path,
        {"rows": rows, "failures": [{**failure, "set": pairs} for failure in analysis.get("failures", ())]},
        title="Geometry of the embeddings",
        curves={name: lines for name, model in models.items() if (lines := curve(model))},
        checkpoints={run["model"]: run["checkpoints"] for run in runs},
        similar={run["model"]: [similar_pictures(pair) for pair in run["similar"]] for run in runs},
    )


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


def _print(analysis: dict[str, Any]) -> None:
    runs = analysis["runs"]
    rows = []
    for key, label in _ROWS.items():
        values = (run["geometry"].get(key) for run in runs)
        rows.append((label, *("–" if v is None else f"{v:,d}" if isinstance(v, int) else f"{v:.3f}" for v in values)))
    rows.append(("groups of duplicates", *(f"{len(run['duplicates'])}" for run in runs)))
    print_table([run["model"] for run in runs], [rows], title=analysis["pairs"])
