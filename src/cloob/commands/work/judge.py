"""Measures models side by side and writes what came out; for ``eval`` and ``demo``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.commands.work.console import EmbeddingProgress
from cloob.data.content import Reader
from cloob.errors import InputError
from cloob.evaluation.embed import EmbedOptions
from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.examples import example_queries
from cloob.evaluation.measures.probe import ProbeOptions
from cloob.evaluation.measures.zeroshot import confusion_matrix
from cloob.evaluation.report import Confusion, ExampleQuery, ReportExtras, write_report
from cloob.evaluation.sets.labelled import LabelledSet
from cloob.evaluation.suite import evaluate, write_results
from cloob.models.runs import curve


@dataclass(frozen=True)
class Comparison:
    """Models, what they are measured on, and what results say of them beside the numbers.

    Attributes:
        models: Where each model is, by the name it has in results.
        zeroshot: Labelled sets.
        retrieval: Pictures and their captions.
        training: Name of a labelled set -> its training images; these sets get a linear probe too.
        probe: How probes are fitted.
        missing: Name of a set -> why it is not among the sets; listed under ``failures`` with ``model`` None.
        train_seconds: Model name -> seconds that its training took.
        settings: Model name -> more settings for its row, beside its objective's.
    """

    models: Mapping[str, str | Path]
    zeroshot: Sequence[LabelledSet] = ()
    retrieval: Sequence[Reader] = ()
    training: Mapping[str, LabelledSet] = field(default_factory=dict)
    probe: ProbeOptions | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    train_seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def measure(comparison: Comparison, options: EmbedOptions, out: Path) -> tuple[Embeddings, dict[str, Any]]:
    """Measures the models and writes results.json.

    Args:
        comparison: What is measured.
        options: How pictures and texts are embedded.
        out: Folder of results.json.

    Returns:
        The embeddings, for whatever else is made of them, and the content of results.json.

    Raises:
        InputError: No model that can be loaded, two sets of one name, or ``out`` that cannot be written.
    """
    with EmbeddingProgress() as progress:
        embeddings = Embeddings(
            comparison.models,
            options,
            progress=progress.update,
            tower=bool(comparison.training),
        )
        results = evaluate(
            embeddings,
            comparison.zeroshot,
            comparison.retrieval,
            training=comparison.training,
            probe=comparison.probe,
            train_seconds=comparison.train_seconds,
            settings=comparison.settings,
        )
    for what, (taken, asked) in embeddings.reused().items():
        print(f"cloob: features of {taken:,} of {asked:,} {what} are those that `train align` kept", file=sys.stderr)
    absent = [{"model": None, "set": name, "error": error} for name, error in comparison.missing.items()]
    if absent:
        results["failures"] = [*absent, *results.get("failures", ())]
    write_results(out / "results.json", results)
    return embeddings, results


def write_page(
    path: Path,
    comparison: Comparison,
    embeddings: Embeddings,
    results: Mapping[str, Any],
    *,
    title: str,
    notes: Sequence[str] = (),
    searches: Sequence[ExampleQuery] = (),
) -> None:
    """Writes the report: the numbers, curves of the runs, example queries and confusion pictures.

    Args:
        path: The page.
        comparison: What was measured.
        embeddings: As :func:`measure` returned them.
        results: Likewise.
        title: Headline of the page.
        notes: Paragraphs under it.
        searches: What the page begins with, see :func:`cloob.evaluation.examples.searches`.

    Raises:
        InputError: The page cannot be written.
    """
    rows = results["rows"]
    labelled = [data for data in comparison.zeroshot if all(data.name in row["zeroshot"] for row in rows)]
    captioned = [data for data in comparison.retrieval if all(data.name in row["retrieval"] for row in rows)]
    models = [row["model"] for row in rows]
    queries = example_queries(embeddings, labelled[0], n=8, models=models) if labelled else []
    queries += example_queries(embeddings, captioned[0], n=4, models=models) if captioned else []
    confusions = []
    for data in labelled:
        for model in models:
            images, labels, classes = embeddings.labelled(model, data)
            matrix = confusion_matrix(images.features, labels, classes)
            confusions.append(Confusion(data.name, model, data.classnames, matrix))
    curves = {model: curve(comparison.models[model]) for model in models}
    curves = {model: lines for model, lines in curves.items() if lines}
    extras = ReportExtras(curves, {}, queries, confusions, searches=searches)
    write_report(path, results, extras, title=title, notes=notes)


def check_writable(out: Path) -> None:
    """Finds out before the work that results cannot be written to ``out``: InputError with the folder's name."""
    place = next(path for path in (out, *out.parents) if path.exists())  # an empty folder would be left by an error
    try:
        probe = place / ".tmp-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out}: results cannot be written here ({error.strerror})") from None
