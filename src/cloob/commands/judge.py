"""Evaluates models side by side, writes results.json and report.html, prints the table; for ``eval`` and ``demo``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.data.captioned import CaptionedSet
    from cloob.data.labelled import LabelledSet
    from cloob.data.sources import Source
    from cloob.evaluate.report import ReportExtras
    from cloob.evaluate.store import Embeddings


def judge(
    models: Mapping[str, str | Path],
    zeroshot: Sequence[LabelledSet],
    retrieval: Sequence[Source | CaptionedSet],
    out: Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    embedding: Mapping[str, Any] | None = None,
    training: Mapping[str, LabelledSet] | None = None,
    missing: Mapping[str, str] | None = None,
    set_files: bool = False,
    **evaluation: Any,
) -> dict[str, Any]:
    """Evaluates and reports.

    Args:
        models: Where each model is, by the name it has in results.
        zeroshot: Labelled sets.
        retrieval: Sources of pairs, or pictures with several captions each.
        out: Folder of results.json and report.html.
        title: Headline of the report.
        notes: Paragraphs under it.
        embedding: ``device``, ``batch_size``, ``workers``, ``cache`` of :class:`cloob.evaluate.store.Embeddings`.
        training: Set name -> its training images; these sets get a linear probe too.
        missing: Set name -> why it is not among the sets; listed under ``failures`` with ``model`` None.
        set_files: Whether to write CLIP_benchmark's JSON and the classes' CSV as well.
        **evaluation: ``probe``, ``train_seconds``, ``settings`` of :func:`cloob.evaluate.suite.evaluate`.

    Returns:
        What was written to results.json.

    Raises:
        InputError: No model that can be loaded, two sets of one name, or ``out`` that cannot be written.
    """
    from cloob.evaluate.files import write_set_files
    from cloob.evaluate.report import write_report
    from cloob.evaluate.store import Embeddings
    from cloob.evaluate.suite import evaluate, write_results

    with EmbeddingProgress() as progress:
        embeddings = Embeddings(
            models, progress=progress.update, tower=bool(training), **{"workers": 2, **(embedding or {})}
        )
        results = evaluate(embeddings, zeroshot, retrieval, training=training, **evaluation)
        absent = [{"model": None, "set": name, "error": error} for name, error in (missing or {}).items()]
        if absent:
            results["failures"] = [*absent, *results.get("failures", ())]
        # First of all the numbers: whatever happens to pictures and pages, the work is not lost.
        write_results(out / "results.json", results)
        extras = _extras(embeddings, results, zeroshot, retrieval)
    if set_files:
        write_set_files(out, results, embeddings, zeroshot)
    write_report(out / "report.html", results, extras, title=title, notes=notes)
    print_table(results)
    return results


def _extras(
    embeddings: Embeddings,
    results: Mapping[str, Any],
    zeroshot: Sequence[LabelledSet],
    retrieval: Sequence[Source | CaptionedSet],
) -> ReportExtras:
    """Curves of the runs, example queries on the first set of each kind that all models have, confusion pictures."""
    from cloob.evaluate.examples import example_queries
    from cloob.evaluate.facts import short_name
    from cloob.evaluate.files import confusion_matrix
    from cloob.evaluate.report import Confusion, ReportExtras

    rows = results["rows"]
    measured = [data for data in zeroshot if all(short_name(data) in row["zeroshot"] for row in rows)]
    pairs = [source for source in retrieval if all(short_name(source) in row["retrieval"] for row in rows)]
    models = [row["model"] for row in rows]
    queries = example_queries(embeddings, measured[0], n=8, models=models) if measured else []
    queries += example_queries(embeddings, pairs[0], n=4, models=models) if pairs else []
    confusions = []
    for data in measured:
        for model in models:
            images, labels, classes = embeddings.labelled(model, data)
            matrix = confusion_matrix(images.features, labels, classes)
            confusions.append(Confusion(short_name(data), model, data.classnames, matrix))
    sources = {name: embeddings.models[name] for name in models}
    curves = {name: curve(source) for name, source in sources.items() if isinstance(source, str | Path)}
    return ReportExtras({name: lines for name, lines in curves.items() if lines}, {}, queries, confusions)


def curve(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if the model is not a run, or of a line that a crash has cut off."""
    file = Path(run) / "metrics.jsonl"
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def tell(results: Mapping[str, Any]) -> int:
    """Says on stderr what could not be read, loaded or measured; sets that are not there were named before the work.

    Returns:
        The exit code: 1 if something is missing from the results, else 0.
    """
    from cloob.evaluate.report.problems import problems

    found = problems(results)
    for problem in found.unreadable:
        print(f"cloob: {problem.set}: {problem.said}", file=sys.stderr)
    for problem in found.unloaded:
        print(f"cloob: {problem.model} could not be loaded: {problem.said}", file=sys.stderr)
    for problem in found.failed:
        print(f"cloob: {problem.model} on {problem.set}: {problem.said}", file=sys.stderr)
    return 1 if results.get("failures") else 0


class EmbeddingProgress:
    """One bar for whatever is being embedded."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> EmbeddingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Moves the bar of ``what`` to ``done`` of ``total``."""
        if not self._bar.live.is_started and sys.stderr.isatty():
            self._bar.start()
        if what not in self._tasks:
            from rich.markup import escape

            self._tasks[what] = self._bar.add_task(escape(f"embed {what}"), total=total)
        self._bar.update(self._tasks[what], completed=done, visible=done < total)


def print_table(results: Mapping[str, Any]) -> None:
    """Prints a row per number and a column per model, intervals in brackets."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = results["rows"]
    table = Table(title=None, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(escape(row["model"]), justify="right")
    for section, keys in _SECTIONS.items():
        for name in dict.fromkeys(name for row in rows for name in row.get(section, ())):
            table.add_section()
            for key, label in keys.items():
                cells = [_cell(row.get(section, {}).get(name, {}), key) for row in rows]
                table.add_row(escape(f"{name}  {label}"), *cells)
    if any(row["train_seconds"] is not None for row in rows):
        table.add_section()
        table.add_row("training, seconds", *(_number(row["train_seconds"]) for row in rows))
    Console().print(table)


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
}


def _cell(numbers: Mapping[str, Any], key: str) -> str:
    value = numbers.get(key)
    if value is None or key.startswith("effective"):
        return _number(value)
    interval = numbers.get(f"{key}_interval")
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def check_writable(out: Path) -> None:
    """Finds out before the work, not after it, whether results can be written to ``out``.

    Raises:
        InputError: They cannot; the message names the folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".tmp-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out}: results cannot be written here ({error.strerror})") from None
