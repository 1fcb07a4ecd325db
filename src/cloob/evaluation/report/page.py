"""Writes the report: one HTML file that needs no network, readable on a phone, in print and in the dark.

The numbers are those that ``evaluate()`` returns.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.evaluation.report import confusion, figures, headline, numbers
from cloob.evaluation.report.confusion import Confusion
from cloob.evaluation.report.pictures import data_uri
from cloob.evaluation.report.problems import problems
from cloob.evaluation.report.tables import differences, result_tables
from cloob.evaluation.report.template import HERE, markup, render
from cloob.files import write_whole

_SETTINGS = {  # how a setting is called on the page, in the order in which they are listed
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
    """A text query and what each model finds for it.

    Attributes:
        query: The text.
        answers: Model name -> its best images, best first.
    """

    query: str
    answers: Mapping[str, Sequence[ShownPicture]]


@dataclass(frozen=True)
class ReportExtras:
    """What a report shows beside the numbers; each may be left out.

    Attributes:
        curves: Model name -> the objects of its metrics.jsonl (``step``, ``loss``, and where they were logged
            ``effective_eigenvalues_image`` / ``_text``).
        checkpoints: Model name -> what was measured of each checkpoint (``step``, ``epoch``, and
            ``effective_eigenvalues_image`` / ``_text``).
        queries: Example queries, shown in the order given.
        confusions: Of labelled sets.
        similar: Model name -> pairs of pictures that it takes for much the same, the most similar first.
        searches: Texts that a person would type and what each model finds for them; shown first, the first model's
            pictures large. Whether they are right is not said: nobody has labelled them.
    """

    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    checkpoints: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
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
    """Writes the report as one self-contained HTML file; the same arguments give the same bytes.

    Args:
        path: The file to write; its folder is created. It appears complete or not at all.
        results: What :func:`cloob.evaluate` returned.
        extras: What else to show.
        title: The page's title.
        notes: Paragraphs under the title: what was trained on what.

    Raises:
        InputError: ``path`` cannot be written.
    """
    page = render_report(results, extras, title=title, notes=notes)
    path = Path(path)
    write_whole(path, page, f"{path}: the report cannot be written here")


def render_report(
    results: Mapping[str, Any],
    extras: ReportExtras | None = None,
    *,
    title: str = "Report",
    notes: str | Sequence[str] = (),
) -> str:
    """The report's HTML as a string; arguments as in ``write_report``."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return render(
        "page.html.j2",
        title=title,
        notes=[notes] if isinstance(notes, str) else list(notes),
        script=markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **_content(results, extras or ReportExtras()),
    )


def _content(results: Mapping[str, Any], extras: ReportExtras) -> dict[str, Any]:
    """What the template shows."""
    rows = results["rows"]
    colours = _colours(rows, extras)
    what = headline.measure(rows)
    verdict = headline.verdict(results, what)
    tables = result_tables(rows, colours)
    if compared := differences(results, colours):
        tables.append(compared)

    def drawn(shown: Sequence[figures.Figure]) -> list[dict[str, Any]]:
        return [{**vars(figure), "svg": markup(figure.svg)} for figure in shown]  # escaped where it was made

    return {
        "colours": colours,
        "models": [row["model"] for row in rows],
        "verdict": verdict,
        "tiles": _tiles(rows, what, colours),
        "measure": what,
        "forest": headline.forest(results, what, colours, verdict) if what else None,
        "problems": problems(results),
        "tables": tables,
        "queries": [_query(query, colours) for query in extras.queries],
        "searches": [_query(query, colours) for query in extras.searches],
        "by_epoch": drawn(figures.by_epoch(extras.checkpoints, colours)),
        "losses": drawn(figures.losses(extras.curves, colours)),
        "training": drawn(figures.training_geometry(extras.curves, colours)),
        "spectra": [(name, drawn(shown)) for name, shown in figures.spectra(rows, colours)],
        "classes": figures.classes(rows, colours),
        "confusions": confusion.panels(extras.confusions, colours),
        "similar": _similar(extras.similar, colours),
        "settings": _settings(rows),
    }


def _colours(rows: Sequence[Mapping[str, Any]], extras: ReportExtras) -> dict[str, int]:
    """A colour index for every model that occurs anywhere, in order of appearance."""
    names = [row["model"] for row in rows]
    names += [*extras.curves, *extras.checkpoints, *extras.similar, *(item.model for item in extras.confusions)]
    names += [name for query in (*extras.queries, *extras.searches) for name in query.answers]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _tiles(
    rows: Sequence[Mapping[str, Any]], what: headline.Measure | None, colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One tile per model with its headline number; none where there are too many to take in at a glance."""
    if len(rows) > 4:
        return []
    tiles = []
    for row in rows:
        model = row["model"]
        geometry = next(iter(numbers.part(row, "geometry").values()), {})
        eigenvalues = numbers.number(geometry.get("effective_eigenvalues_image"))
        seconds = numbers.number(row.get("train_seconds"))
        # By itself an objective's name would read like that of another model.
        facts = [f"objective: {row['objective']}"] if row.get("objective") not in (None, model) else []
        if eigenvalues is not None:
            facts.append(f"{numbers.count(eigenvalues)} effective eigenvalues (image)")
        if seconds is not None:
            facts.append(f"trained in {numbers.duration(seconds)}")
        tiles.append(
            {
                "model": model,
                "colour": colours[model],
                "value": numbers.percent(what.mean(model) if model in what.values else None) if what else "",
                "facts": facts,
            }
        )
    return tiles


def _settings(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings as (name, value per model), the known ones first; those that no model has are left out."""
    per_model = [{"objective": row.get("objective"), **(row.get("settings") or {})} for row in rows]
    for settings in per_model:
        if settings.get("hopfield") is False:  # β is without effect
            settings |= {"beta": None, "learnable_beta": None}
    keys = list(dict.fromkeys([*_SETTINGS, *(key for settings in per_model for key in settings)]))
    return [
        (
            _SETTINGS.get(key, key.replace("_", " ").capitalize()),
            [_setting_text(s.get(key)) for s in per_model],
        )
        for key in keys
        if any(s.get(key) is not None for s in per_model)
    ]


def _setting_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else numbers.MISSING
    return numbers.MISSING if value is None else str(value)


def _query(query: ExampleQuery, colours: Mapping[str, int]) -> dict[str, Any]:
    models = []
    for name, answers in query.answers.items():
        images = [
            {
                "uri": data_uri(item.image),
                "label": numbers.shortened(item.label),
                "correct": item.correct,
                "score": numbers.decimal(numbers.number(item.score)),
            }
            for item in answers
        ]
        right = sum(item.correct for item in answers)
        models.append({"name": name, "colour": colours[name], "images": images, "right": right})
    return {"text": query.query, "shown": numbers.shortened(query.query), "models": models}


def _similar(
    similar: Mapping[str, Sequence[tuple[ShownPicture, ShownPicture]]], colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    models = []
    for model, pairs in similar.items():
        items = [
            {
                "cosine": numbers.decimal(numbers.number(first.score)),
                "images": [
                    {"uri": data_uri(item.image), "label": numbers.shortened(item.label)} for item in (first, second)
                ],
            }
            for first, second in pairs
        ]
        if items:
            models.append({"model": model, "colour": colours[model], "pairs": items})
    return models
