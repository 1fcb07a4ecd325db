"""Writes the pages: the report of an evaluation, and the contact sheet of a set of pairs.

Each is one HTML file that needs no network, readable on a phone, in print and in the dark.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.data.batch import BadSample, RawSample
from cloob.data.source import Source
from cloob.data.survey import Survey
from cloob.errors import require
from cloob.evaluation.report import figures, headline, numbers
from cloob.evaluation.report.pictures import Confusion, confusion_panels, data_uri
from cloob.evaluation.report.tables import difference_table, result_tables
from cloob.files import write_whole

_FOLDER = Path(__file__).parent
_SETTINGS = {  # what the page calls a setting, in the order in which they are listed
    "objective": "Objective",
    "inv_tau": "τ⁻¹",
    "learnable_inv_tau": "τ⁻¹ learnable",
    "beta": "β",
    "learnable_beta": "β learnable",
    "epochs": "Epochs",
    "steps": "Steps",
    "batch_size": "Batch size",
    "lr": "Learning rate",
    "seed": "Seed",
}


@dataclass(frozen=True)
class ShownPicture:
    """One picture beside a query or another picture.

    Attributes:
        image: The encoded picture.
        label: Its class or caption.
        correct: Whether it answers the query.
        score: The similarity that ranked it.
    """

    image: bytes
    label: str
    correct: bool
    score: float


@dataclass(frozen=True)
class ExampleQuery:
    """A text, and model -> the pictures nearest to it, best first."""

    query: str
    answers: Mapping[str, Sequence[ShownPicture]]


@dataclass(frozen=True)
class ReportExtras:
    """What a report shows beside the numbers; each may be left out.

    Attributes:
        curves: Model -> the lines of its metrics.jsonl.
        checkpoints: Model -> what was measured of each checkpoint, see :func:`cloob.evaluation.analysis.analyze`.
        queries: Example queries.
        confusions: Of labelled sets.
        similar: Model -> pairs of pictures that it hardly tells apart, the most similar first.
        searches: Queries without right answers. They come first, the first model's pictures large.
    """

    curves: figures.Lines = field(default_factory=dict)
    checkpoints: figures.Lines = field(default_factory=dict)
    queries: Sequence[ExampleQuery] = ()
    confusions: Sequence[Confusion] = ()
    similar: Mapping[str, Sequence[tuple[ShownPicture, ShownPicture]]] = field(default_factory=dict)
    searches: Sequence[ExampleQuery] = ()


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    extras: ReportExtras | None = None,
    *,
    title: str = "Report",
    notes: str | Sequence[str] = (),
) -> None:
    """Writes the report of what :func:`cloob.evaluate` returned; equal arguments give equal bytes."""
    page = render_report(results, extras, title=title, notes=notes)
    write_whole(Path(path), page, f"{path}: the report cannot be written here")


def render_report(
    results: Mapping[str, Any],
    extras: ReportExtras | None = None,
    *,
    title: str = "Report",
    notes: str | Sequence[str] = (),
) -> str:
    """The report as HTML; ``notes`` are paragraphs under the title."""
    extras = extras or ReportExtras()
    rows = results["rows"]
    colours = _colours(rows, extras)
    what = headline.measure(rows)
    verdict = headline.verdict(results, what)
    compared = difference_table(results, colours)
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    return _render(
        "page.html.j2",
        title=title,
        notes=[notes] if isinstance(notes, str) else list(notes),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours=colours,
        models=[row["model"] for row in rows],
        verdict=verdict,
        tiles=_tiles(rows, what, colours),
        measure=what,
        forest=headline.forest(results, what, colours, verdict) if what else None,
        problems=numbers.problems(results),
        tables=result_tables(rows, colours) + ([compared] if compared else []),
        queries=extras.queries,
        searches=extras.searches,
        similar={model: pairs for model, pairs in extras.similar.items() if pairs},
        by_epoch=figures.by_epoch(extras.checkpoints, colours),
        losses=figures.losses(extras.curves, colours),
        training=figures.training_geometry(extras.curves, colours),
        spectra=figures.spectra(rows, colours),
        classes=figures.classes(rows),
        confusions=confusion_panels(extras.confusions, colours),
        settings=_settings(rows),
    )


def write_sheet(
    path: Path, source: Source, survey: Survey, facts: Sequence[tuple[str, str]], pictures: int = 60
) -> None:
    """Writes the contact sheet of a set of pairs: some pictures with captions, and what was seen of all of them."""
    rows = survey.usable
    count = min(pictures, len(rows))
    shown = [rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count)]
    page = _render(
        "sheet.html.j2",
        title=survey.name,
        facts=facts,
        pairs=list(_sheet_pairs(source, shown)),
        bad=[(reason, n, examples) for reason, (n, examples) in sorted(survey.bad.items())],
        pictures=[(each.count, pair) for each in survey.pictures.most() for pair in _sheet_pairs(source, [each.row])],
        captions=survey.captions.most(),
    )
    write_whole(path, page, f"{path}: the contact sheet cannot be written here")


def _render(template: str, **content: Any) -> str:
    """A template of this folder with its content, which is escaped unless the template says it is safe."""
    jinja2 = require("jinja2", "train")
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), **options)
    environment.filters |= {"data_uri": data_uri, "decimal": numbers.decimal, "shortened": numbers.shortened}
    css = (_FOLDER / "page.css").read_text(encoding="utf-8")
    page: str = environment.get_template(template).render(css=css, **content)
    return page


def _sheet_pairs(source: Source, rows: Sequence[int]) -> Iterator[RawSample]:
    for row in rows:
        try:
            sample = source.read(row)
        except BadSample:  # gone since the survey
            continue
        yield sample


def _colours(rows: Sequence[numbers.Row], extras: ReportExtras) -> dict[str, int]:
    """A colour for every model, in order of appearance."""
    names = [row["model"] for row in rows]
    names += [*extras.curves, *extras.checkpoints, *extras.similar, *(item.model for item in extras.confusions)]
    names += [name for query in (*extras.queries, *extras.searches) for name in query.answers]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _tiles(
    rows: Sequence[numbers.Row], what: headline.Measure | None, colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One tile per model with its headline number; none if there are too many to take in at a glance."""
    tiles = []
    for row in rows if len(rows) <= 4 else ():
        model = row["model"]
        # By itself an objective's name would read like that of another model.
        facts = [f"objective: {row['objective']}"] if row.get("objective") not in (None, model) else []
        if geometry := next(iter(numbers.part(row, "geometry").values()), None):
            facts.append(f"{numbers.count(geometry['effective_eigenvalues_image'])} effective eigenvalues (image)")
        if row.get("train_seconds") is not None:
            facts.append(f"trained in {numbers.duration(row['train_seconds'])}")
        value = numbers.percent(what.mean(model) if model in what.values else None) if what else ""
        tiles.append({"model": model, "colour": colours[model], "value": value, "facts": facts})
    return tiles


def _settings(rows: Sequence[numbers.Row]) -> list[tuple[str, list[str]]]:
    """(name, value per model) of the settings that any model has, the known ones first."""
    per_model = [{"objective": row.get("objective"), **row.get("settings", {})} for row in rows]
    for settings in per_model:
        if settings.get("hopfield") is False:  # β is without effect
            settings |= {"beta": None, "learnable_beta": None}
    keys = list(dict.fromkeys([*_SETTINGS, *(key for settings in per_model for key in settings)]))
    return [
        (_SETTINGS.get(key, key.replace("_", " ").capitalize()), [_setting(s.get(key)) for s in per_model])
        for key in keys
        if any(s.get(key) is not None for s in per_model)
    ]


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else numbers.MISSING
    return numbers.MISSING if value is None else str(value)
