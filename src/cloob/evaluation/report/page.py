"""Writes the report of an evaluation: one HTML file without network, readable on a
phone, in print and in the dark.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloob.errors import needs
from cloob.evaluation.report import charts, tables
from cloob.evaluation.report.verdict import find_headline, find_verdict
from cloob.evaluation.results import Results
from cloob.files import write_whole
from cloob.pictures import Unreadable, data_uri

with needs("train"):
    import jinja2

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
    results: Results,
    *,
    title: str = "Report",
    notes: Sequence[str] = (),
    queries: Sequence[ExampleQuery] = (),
) -> None:
    """Writes the report of what :func:`cloob.evaluate` returned; equal arguments give
    equal bytes.

    ``notes`` are paragraphs under the title.
    """
    rows = results["rows"]
    checkpoints = results["checkpoints"]["models"] if "checkpoints" in results else {}
    names = [*(row["model"] for row in rows), *checkpoints]
    colours = {name: i for i, name in enumerate(dict.fromkeys(names))}
    headline = find_headline(rows)
    problems = tables.problems(results)
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    page = _template().render(
        css=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(digest).decode(),
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
        by_epoch=charts.checkpoint_charts(checkpoints, colours),
    )
    write_whole(path, page, f"{path}: the report cannot be written here")


def _template() -> jinja2.Template:
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
