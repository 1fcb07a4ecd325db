"""``cloob analyze``: how the embeddings of runs lie on the sphere, at the end and over their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cloob.commands.compare import MeasureOptions, begin, check_models, print_results
from cloob.commands.options import as_words, tyro, within
from cloob.commands.terminal import Progress, say, say_next

if TYPE_CHECKING:
    from cloob.data.batch import Reader

DEMO = "demo:val"


@dataclass(frozen=True)
class Options:
    """Geometry of models on image-caption pairs, effective eigenvalues by epoch, similar pictures and duplicates."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (all their checkpoints count), checkpoint or model folders, open_clip NAME/TAG, hf-hub:…"""
    pairs: str = DEMO
    """Image-caption pairs to measure on: what `cloob eval --retrieval` reads (of several captions the first)."""
    limit: int = 10_000
    """Pairs whose geometry is measured at most; similar pictures and duplicates are sought among all of them."""
    similar: int = 20
    """Most similar pictures to list for each model."""
    duplicate: float = 0.999
    """Cosine from which two pictures count as one."""
    out: Path = Path("runs/analyze")
    """Folder of analysis.json and report.html."""
    machine: MeasureOptions = field(default_factory=MeasureOptions)


def check(options: Options) -> None:
    check_models(options.models)
    within(options, similar=(0, 10_000), limit=(2, 10**9), duplicate=(0.001, 1))


def run(options: Options) -> int:
    """Analyses; 1 when a checkpoint could not be measured, with what there is written."""
    from cloob.evaluation.sets.captioned import open_captioned

    source = open_captioned(options.pairs, **options.machine.columns)
    models = begin(options.models, options.out)

    from cloob.evaluation.analysis import analyze
    from cloob.evaluation.suite import write_results

    with Progress() as progress:
        analysis = analyze(
            models,
            source,
            options.machine.embedding(),
            similar=options.similar,
            duplicate=options.duplicate,
            limit=options.limit,
            progress=progress.update,
        )
    write_results(options.out / "analysis.json", analysis)
    _write_page(options.out / "report.html", analysis, models, source)
    print(f"{options.out / 'analysis.json'}\n{options.out / 'report.html'}")
    print_results(_rows(analysis), all_geometry=True)
    for failure in analysis.get("failures", ()):
        model, error = failure["model"], failure["error"]
        say(error if error.startswith((model, models.get(model, model))) else f"{model}: {error}")
    if options.pairs == DEMO:
        say(f"measured on {len(source):,} pairs of the demo, {DEMO}; --pairs names others")
    measured = [models[run["model"]] for run in analysis["runs"]]
    more = as_words(options, "image_column", "caption_column")
    say_next(["eval", *measured, "--retrieval", options.pairs, *more, "--out", options.out / "eval"])
    return 1 if analysis.get("failures") else 0


def _write_page(path: Path, analysis: dict[str, Any], models: Mapping[str, str], source: Reader) -> None:
    from cloob.data.batch import BadSample
    from cloob.evaluation.report import ShownPicture, write_report
    from cloob.models.runs import curve

    runs, pairs = analysis["runs"], analysis["pairs"]
    wanted = {key for run in runs for pair in run["similar"] for key in pair["keys"]}
    images = {}
    for index in range(len(source) if wanted else 0):
        try:
            sample = source.read(index)
        except BadSample:
            continue
        if sample.key in wanted:
            images[sample.key] = sample.image

    def similar_pictures(pair: Mapping[str, Any]) -> tuple[ShownPicture, ShownPicture]:
        (one, other), (caption, others) = pair["keys"], pair["captions"]
        shown = ShownPicture(images[one], caption, False, pair["cosine"])
        return shown, ShownPicture(images[other], others, False, pair["cosine"])

    failures = [{**failure, "set": pairs} for failure in analysis.get("failures", ())]
    write_report(
        path,
        {"rows": _rows(analysis), "failures": failures},
        title="Geometry of the embeddings",
        curves={name: lines for name, model in models.items() if (lines := curve(model))},
        checkpoints={run["model"]: run["checkpoints"] for run in runs},
        similar={run["model"]: [similar_pictures(pair) for pair in run["similar"]] for run in runs},
    )


def _rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs as rows of results.json."""
    rows = []
    for run in analysis["runs"]:
        more = {"groups_of_duplicates": len(run["duplicates"]), "unreadable": run.get("unreadable")}
        rows.append({"model": run["model"], "geometry": {analysis["pairs"]: {**run["geometry"], **more}}})
    return rows
