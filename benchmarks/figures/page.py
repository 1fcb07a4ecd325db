"""The sections of ``docs/speed.md``: each one's command, its record with the machine, and its tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import objective, programs
from benchmarks.figures.numbers import machines
from benchmarks.pictograms.tables import replaced

PAGE = "docs/speed.md"
RESULTS = Path(__file__).parents[1] / "results"
Record = dict[str, Any]


class Section(NamedTuple):
    """A command, and what makes tables of the record that it writes."""

    command: str
    tables: Callable[[Record], str]


_DATA = "--data DIR/pictograms/train"
SECTIONS = {
    "objective": Section("python benchmarks/objective.py", objective.objective),
    "ranks": Section("python benchmarks/ranks.py", objective.ranks),
    "gradient_cache": Section("python benchmarks/gradient_cache.py", objective.gradient_cache),
    "precision": Section("python benchmarks/precision.py", objective.precision),
    "data": Section(f"python benchmarks/data.py {_DATA}", programs.data),
    "train_step": Section(f"python benchmarks/train_step.py {_DATA}", programs.train_step),
    "text_padding": Section(f"python benchmarks/text_padding.py {_DATA}", programs.text_padding),
    "evaluate": Section("python benchmarks/evaluate.py --data DIR/zeroshot", programs.evaluate),
    "retrieval": Section("python benchmarks/retrieval.py", programs.retrieval),
    "start": Section("python benchmarks/start.py", programs.start),
}
"""By the folder of the record, in the order of the page."""


def markers(name: str) -> tuple[str, str]:
    """The lines between which a section's tables stand."""
    return f"<!-- figures-{name}:begin -->", f"<!-- figures-{name}:end -->"


def render(name: str, results: Path = RESULTS) -> str:
    """A section's command, record, machine and tables as Markdown; without a record, that it has not been run."""
    section, file = SECTIONS[name], results / name / "results.json"
    if not file.is_file():
        return f"`{section.command}`. Not run yet."
    record = json.loads(file.read_text(encoding="utf-8"))
    link = f"[record](../benchmarks/results/{name}/results.json)"
    return f"`{section.command}` ({link}): {where(record)}.\n\n{section.tables(record)}"


def where(record: Record) -> str:
    """The machine or machines that a record names, or what it says instead."""
    found = [about for about in (record.get("machine"), *(r.get("machine") for r in record.get("rows", ()))) if about]
    return machines(found) if found else f"machine not recorded, torch {record['torch']}"


def filled(text: str, results: Path = RESULTS) -> str:
    """The page's text with all tables as the records give them."""
    for name in SECTIONS:
        text = replaced(text, f"\n{render(name, results)}\n", *markers(name))
    return text


def write(root: Path) -> None:
    """Puts the tables between the page's markers."""
    page = root / PAGE
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
