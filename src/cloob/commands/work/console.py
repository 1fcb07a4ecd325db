"""What an evaluation shows on a terminal: progress while it embeds, the table of results, and what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cloob.evaluation.report.numbers import problems
from cloob.models.runs import checkpoint_step, chosen_checkpoint, with_checkpoint


def say_checkpoints(models: Iterable[str]) -> None:
    """Says on stderr which models are run folders that stand for their best checkpoint."""
    for model in models:
        if with_checkpoint(model) == f"{model}:best":
            step = checkpoint_step(chosen_checkpoint(Path(model)))
            print(f"cloob: {model}: its best checkpoint, step {step:,} ({model}:last is the last)", file=sys.stderr)


def tell(results: Mapping[str, Any]) -> int:
    """Says on stderr what could not be read, loaded or measured; sets that are not there were named before the work.

    Returns:
        The exit code: 1 if something is missing from the results, else 0.
    """
    faults = problems(results)
    for problem in faults.unreadable:
        print(f"cloob: {problem.set}: {problem.message}", file=sys.stderr)
    for problem in faults.unloaded:
        print(f"cloob: {problem.model} could not be loaded: {problem.message}", file=sys.stderr)
    for problem in faults.failed:
        print(f"cloob: {problem.model} on {problem.set}: {problem.message}", file=sys.stderr)
    return 1 if results.get("failures") else 0


class EmbeddingProgress:
    """One bar for whatever is being embedded; without a terminal a line at each tenth."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> EmbeddingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Moves the bar of ``what`` to ``done`` of ``total``."""
        if not sys.stderr.isatty():
            if (tenth := done * 10 // total) > self._tenths.get(what, 0) and done < total:
                self._tenths[what] = tenth
                print(f"cloob: embed {what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
            return
        if not self._bar.live.is_started:
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(escape(f"embed {what}"), total=total)
        self._bar.update(self._tasks[what], completed=done, visible=done < total)


def print_table(results: Mapping[str, Any]) -> None:
    """Prints a row per number and a column per model, intervals in brackets; nothing where there is no number."""
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
    if table.row_count:
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
