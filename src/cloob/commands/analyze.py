"""``cloob analyze``: geometry of the embeddings, over a run's checkpoints too; similar
pictures and duplicates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cloob.commands.console import (
    MeasureOptions,
    Positional,
    arg,
    as_words,
    check,
    progress,
    refuse,
    say,
    say_next,
)
from cloob.commands.eval import NO_MODEL, begin, print_results
from cloob.models.runs import curve

DEMO = "demo:val"


@dataclass(frozen=True)
class Options:
    """Geometry of models on image-caption pairs, effective eigenvalues by epoch,
    similar pictures and duplicates.
    """

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL …")]
    """Models; of a run, all checkpoints."""
    pairs: str = DEMO
    """Pairs to measure on: what `cloob eval --retrieval` reads (of several captions the
    first).
    """
    limit: int = 10_000
    """Pairs whose geometry is measured at most; similar pictures and duplicates come
    from all.
    """
    similar: int = 20
    """Most similar pictures to list per model."""
    out: Path = Path("runs/analyze")
    """Folder of analysis.json and report.html."""
    machine: MeasureOptions = field(default_factory=MeasureOptions)


def run(options: Options) -> int:
    """Analyses; 1 when a checkpoint could not be measured, with what there is
    written.
    """
    check(options, similar=(0, 10_000), limit=(2, 10**9))
    refuse({NO_MODEL: not options.models})
    from cloob.evaluation.sets.pictures import open_captioned

    source = open_captioned(options.pairs, **options.machine.columns)
    models = begin(options.models, options.out)

    from cloob.evaluation.analysis import analyze
    from cloob.evaluation.report.page import ShownPicture, write_report
    from cloob.evaluation.suite import write_results
    from cloob.search.alike import partition

    how: dict[str, Any] = {
        "similar": options.similar,
        "groups": partition,
        "limit": options.limit,
    }
    with progress() as update:
        analysis = analyze(
            models, source, options.machine.embedding(), progress=update, **how
        )
    rows, pairs = [], analysis["pairs"]
    similar: dict[str, Any] = {}
    for run in analysis["runs"]:
        more = {
            "groups_of_duplicates": len(run["duplicates"]),
            "unreadable": run.get("unreadable"),
        }
        rows.append(
            {"model": run["model"], "geometry": {pairs: {**run["geometry"], **more}}}
        )
        similar[run["model"]] = []
        for pair in run["similar"]:
            both = zip(pair["rows"], pair["captions"], strict=True)
            shown = [
                ShownPicture(source.read(row).image, text, False, pair["cosine"])
                for row, text in both
            ]
            similar[run["model"]].append(shown)
    failures = [{**failure, "set": pairs} for failure in analysis.get("failures", ())]
    results = {"rows": rows, "failures": failures}  # as in results.json
    write_results(options.out / "analysis.json", analysis)
    write_report(
        options.out / "report.html",
        results,
        title="Geometry of the embeddings",
        curves={
            name: lines for name, model in models.items() if (lines := curve(model))
        },
        checkpoints={run["model"]: run["checkpoints"] for run in analysis["runs"]},
        similar=similar,
    )
    print(f"{options.out / 'analysis.json'}\n{options.out / 'report.html'}")
    code = print_results(results, geometry=True)
    if options.pairs == DEMO:
        say(
            f"measured on {len(source):,} pairs of the demo, {DEMO}; --pairs names"
            " others"
        )
    measured = [models[run["model"]] for run in analysis["runs"]]
    columns = as_words(options, "image_column", "caption_column")
    say_next(
        [
            "eval",
            *measured,
            "--retrieval",
            options.pairs,
            *columns,
            "--out",
            options.out / "eval",
        ]
    )
    return code
