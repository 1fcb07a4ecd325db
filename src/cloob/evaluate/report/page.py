"""Writes the report: one HTML file that needs no network, readable on a phone, in print and in the dark.

The numbers come from results.json (DESIGN.md's form) with optional extras, each left out freely:

- a row's zero-shot, retrieval or geometry set: ``"<key>_interval": [low, high]`` beside any ``"<key>"``;
- a zero-shot set: ``"n_classes": int`` (draws the level of guessing), ``"per_class": {class name: recall}``;
- a retrieval set: ``"image_to_text_median_rank"``, ``"text_to_image_median_rank"``, ``"n"``;
- a geometry set: ``"spectrum_image"``, ``"spectrum_text"`` (descending eigenvalues), ``"ajne_image"``,
  ``"ajne_text"``, ``"modality_gap"``, ``"alignment"``, ``"uniformity_image"``, ``"uniformity_text"``,
  ``"saturation"``; any other scalar becomes a column of its own;
- a row: ``"settings": {…}`` (flat: ``inv_tau``, ``beta``, ``steps``, ``seed``, …) and ``"train_seconds"``;
- the top level: ``"differences": [{"metric": "acc1", "set": name, or None for the mean over the sets,
  "model": …, "baseline": …, "difference": …, "low": …, "high": …}]`` (model − baseline, as fractions), and
  ``"level": 0.95``, the level of all intervals.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloob.errors import InputError, require
from cloob.evaluate.report import figures, headline, numbers

HERE = Path(__file__).parent

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
class Found:
    """One image that a model found for a query.

    Attributes:
        image: The encoded picture (WebP, PNG, JPEG or GIF).
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
        target: What would be right, when that is not the query itself.
        found: Model name -> its best images, best first.
    """

    query: str
    target: str | None
    found: Mapping[str, Sequence[Found]]


def write_report(
    path: str | Path,
    *,
    results: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    queries: Sequence[ExampleQuery] = (),
    title: str = "Report",
    notes: str | Sequence[str] = (),
) -> None:
    """Writes the report as one self-contained HTML file; the same arguments give the same bytes.

    Args:
        path: The file to write; its folder is created. It appears complete or not at all.
        results: The content of results.json; see the module's docstring for the optional extras.
        curves: Model name -> the objects of its metrics.jsonl (``step``, ``loss``, and where they were logged
            ``effective_eigenvalues_image`` / ``_text``).
        queries: Example queries, shown in the order given.
        title: The page's title.
        notes: Paragraphs under the title: what was trained on what.

    Raises:
        InputError: ``results`` is not in the form of results.json, or ``path`` cannot be written.
    """
    page = render_report(results=results, curves=curves, queries=queries, title=title, notes=notes)
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink()
        raise InputError(f"{path}: the report cannot be written here ({error.strerror or error})") from error


def render_report(
    *,
    results: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    queries: Sequence[ExampleQuery] = (),
    title: str = "Report",
    notes: str | Sequence[str] = (),
) -> str:
    """The report's HTML as a string; arguments as in ``write_report``."""
    jinja2 = require("jinja2", "train")
    curves = curves or {}
    rows = _rows(results)
    colours = _colours(rows, curves, queries)
    what = headline.measure(rows)
    verdict = headline.verdict(results, what)
    picture = headline.forest(results, what, colours, verdict) if what else None
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    markup = require("markupsafe", "train").Markup
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = environment.get_template("page.html.j2").render(
        title=title,
        notes=[notes] if isinstance(notes, str) else list(notes),
        css=markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=markup(script),
        script_digest=digest,
        colours=colours,
        models=[str(row["model"]) for row in rows],
        verdict=verdict,
        tiles=_tiles(rows, what, colours),
        measure=what,
        forest=picture,
        tables=numbers.tables(rows, colours),
        queries=[_query(query, colours) for query in queries],
        losses=[_with_markup(figure, markup) for figure in figures.losses(curves, colours)],
        training=[_with_markup(figure, markup) for figure in figures.training_geometry(curves, colours)],
        spectra=[
            (name, [_with_markup(figure, markup) for figure in drawn]) for name, drawn in figures.spectra(rows, colours)
        ],
        classes=figures.classes(rows, colours),
        settings=_settings(rows),
    )
    return page


def _rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of results.json, checked."""
    rows = results.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "model" in row for row in rows):
        raise InputError('results: expected {"rows": [{"model": …}, …]} as in results.json')
    names = [str(row["model"]) for row in rows]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f'results: model "{twice[0]}" has more than one row; give each row a name of its own')
    return rows


def _colours(
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Any],
    queries: Sequence[ExampleQuery],
) -> dict[str, int]:
    """A colour index for every model that occurs anywhere, in order of appearance."""
    names = [str(row["model"]) for row in rows]
    names += [*curves, *(name for query in queries for name in query.found)]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _tiles(
    rows: Sequence[Mapping[str, Any]], what: headline.Measure | None, colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One tile per model with its headline number; none where there are too many to take in at a glance."""
    if len(rows) > 4:
        return []
    tiles = []
    for row in rows:
        model = str(row["model"])
        has = what is not None and model in what.values
        geometry = next(iter(numbers.part(row, "geometry").values()), {})
        eigenvalues = numbers.number(geometry.get("effective_eigenvalues_image"))
        seconds = numbers.number(row.get("train_seconds"))
        facts = [str(row["objective"])] if row.get("objective") not in (None, model) else []
        if eigenvalues is not None:
            facts.append(f"{numbers.count(eigenvalues)} effective eigenvalues (image)")
        if seconds is not None:
            facts.append(f"trained in {numbers.duration(seconds)}")
        tiles.append(
            {
                "model": model,
                "colour": colours[model],
                "value": numbers.percent(what.mean(model) if what and has else None),
                "facts": facts,
            }
        )
    return tiles


def _settings(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings as (name, value per model), the known ones first; those that no model has are left out."""
    per_model = [{"objective": row.get("objective"), **(row.get("settings") or {})} for row in rows]
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


def _with_markup(figure: figures.Figure, markup: type[str]) -> dict[str, Any]:
    """A figure for the template; its SVG was escaped where it was made."""
    return {**vars(figure), "svg": markup(figure.svg)}


def _query(query: ExampleQuery, colours: Mapping[str, int]) -> dict[str, Any]:
    models = []
    for name, found in query.found.items():
        images = [
            {
                "uri": _data_uri(item.image),
                "label": item.label,
                "correct": item.correct,
                "score": numbers.decimal(numbers.number(item.score)),
            }
            for item in found
        ]
        right = sum(item.correct for item in found)
        models.append({"name": name, "colour": colours[name], "images": images, "right": right})
    return {"text": query.query, "target": query.target, "models": models}


def _data_uri(image: bytes) -> str | None:
    """The picture as a data: URI; None when the bytes are of no kind that every browser shows."""
    kinds = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
    kind = next((kind for magic, kind in kinds.items() if image.startswith(magic)), None)
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        kind = "webp"
    return kind and f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
