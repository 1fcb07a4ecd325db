"""Writes the report of an evaluation: one HTML file without network, readable on a
phone, in print and in the dark.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloob.errors import require
from cloob.evaluation.report import charts, tables
from cloob.evaluation.report.verdict import find_headline, find_verdict
from cloob.files import write_whole
from cloob.pictures import Unreadable, data_uri

_FOLDER = Path(__file__).parent
# pixels: a picture is at most 160 wide on the page, twice that on a dense screen
_SIDE = 320


@dataclass(frozen=True)
class ShownPicture:
    """One picture next to a query."""

    image: bytes  # encoded
    label: str  # its class or caption
    correct: bool  # whether it answers the query
    score: float  # the similarity that ranked it


@dataclass(frozen=True)
class ExampleQuery:
    """A text, and model -> the pictures nearest to it, best first."""

    query: str
    answers: dict[str, list[ShownPicture]]


def write_report(
    path: Path,
    results: Mapping[str, Any],
    *,
    title: str = "Report",
    notes: Sequence[str] = (),
    checkpoints: charts.Records | None = None,  # what was measured of each
    queries: Sequence[ExampleQuery] = (),
    searches: Sequence[
        ExampleQuery
    ] = (),  # without right answers; they come first, the first model's pictures large
) -> None:
    """Writes the report of what :func:`cloob.evaluate` returned; equal arguments give
    equal bytes.

    ``notes`` are paragraphs under the title; checkpoints and pictures are by model.
    """
    rows = results["rows"]
    checkpoints = checkpoints or {}
    names = [*(row["model"] for row in rows), *checkpoints]
    colours = {name: i for i, name in enumerate(dict.fromkeys(names))}
    headline = find_headline(rows)
    problems = tables.problems(results)
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    page = _template().render(
        css=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(
            hashlib.sha256(script.encode()).digest()
        ).decode(),
        title=title,
        notes=notes,
        colours=colours,
        rows=rows,
        verdict=find_verdict(results, headline),
        headline=headline,
        problems=[
            (tables.PROBLEMS[kind], found) for kind, found in problems.items() if found
        ],
        tables=tables.result_tables(results, colours),
        queries=queries,
        searches=searches,
        by_epoch=charts.checkpoint_charts(checkpoints, colours),
    )
    write_whole(path, page, f"{path}: the report cannot be written here")


def _template() -> Any:
    jinja2 = require("jinja2", "train")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": tables.count,
        "decimal": tables.decimal,
        "percent": tables.percent,
        "points": tables.points,
        "data_uri": _data_uri,
    }
    return environment.get_template("page.html.j2")


def _data_uri(picture: bytes) -> str | None:
    try:
        return data_uri(picture, _SIDE)
    except Unreadable:
        return None
