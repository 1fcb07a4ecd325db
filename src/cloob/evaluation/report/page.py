"""Writes the report of an evaluation: one HTML file without network, readable on a phone, in print and in the dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloob.errors import require
from cloob.evaluation.report import charts, headline, tables
from cloob.evaluation.report.tables import METRICS, MISSING, Row, count, decimal, duration, percent
from cloob.files import write_whole
from cloob.pictures import Unreadable, data_uri

_FOLDER = Path(__file__).parent
_SIDE = 320  # pixels: a picture is at most 160 wide on the page, twice that on a dense screen
_SETTINGS = {"inv_tau": "τ⁻¹", "learnable_inv_tau": "τ⁻¹ learnable", "lr": "Learning rate"}
_SETTINGS |= {"beta": "β", "learnable_beta": "β learnable"}
_PROBLEMS = {  # heading, and what is counted at the head of the page: one, several
    "missing": ("Sets that are not there", "set is not there", "sets are not there"),
    "unloaded": ("Models that could not be loaded", "model could not be loaded", "models could not be loaded"),
    "failed": ("Could not be measured", "measurement failed", "measurements failed"),
    "unreadable": ("Could not be read", "set could not be read in full", "sets could not be read in full"),
}


@dataclass(frozen=True)
class ShownPicture:
    """One picture next to a query or another picture."""

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
    curves: charts.Lines | None = None,  # the lines of metrics.jsonl
    checkpoints: charts.Lines | None = None,  # what ``analyze`` measured of each
    queries: Sequence[ExampleQuery] = (),
    similar: Mapping[str, Sequence[tuple[ShownPicture, ShownPicture]]] | None = None,  # the most similar first
    searches: Sequence[ExampleQuery] = (),  # without right answers; they come first, the first model's pictures large
) -> None:
    """Writes the report of what :func:`cloob.evaluate` returned; equal arguments give equal bytes.

    ``notes`` are paragraphs under the title; what is of several models is by model.
    """
    rows, curves, checkpoints, similar = results["rows"], curves or {}, checkpoints or {}, similar or {}
    names = [*(row["model"] for row in rows), *curves, *checkpoints, *similar]
    colours = {name: i for i, name in enumerate(dict.fromkeys(names))}
    what = headline.measure(rows)
    gaps = headline.differences(results, what.key) if what else {}
    verdict = headline.verdict(results, what, gaps)
    tiles = []
    for row in rows if len(rows) <= 4 else ():
        model = row["model"]
        values: Mapping[str, Any] = next(iter(row.get("geometry", {}).values()), {})
        # By itself an objective's name would read like that of another model.
        facts = [f"objective: {row['objective']}"] if row.get("objective") not in (None, model) else []
        counts = {side: values.get(f"effective_eigenvalues_{side}") for side in ("image", "a")}
        facts += [f"{count(n)} effective eigenvalues ({side})" for side, n in counts.items() if n is not None]
        if row.get("train_seconds") is not None:
            facts.append(f"trained in {duration(row['train_seconds'])}")
        value = percent(what.mean(model)) if what and model in what.values else MISSING
        tiles.append({"model": model, "colour": colours[model], "value": value, "facts": facts})
    result = {kind: some for kind, some in tables.problems(results).items() if some}
    jinja2 = require("jinja2", "train")
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), **options)
    environment.filters |= {"data_uri": _data_uri, "decimal": decimal}
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html.j2").render(
        css=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=title,
        notes=notes,
        colours=colours,
        models=[row["model"] for row in rows],
        verdict=verdict,
        tiles=tiles,
        measure=what,
        metric=METRICS[what.key] if what else None,
        forest=headline.forest(what, gaps, colours, verdict) if what else None,
        problems=[(_PROBLEMS[kind][0], some) for kind, some in result.items()],
        summary="; ".join(
            f"{len(some)} {_PROBLEMS[kind][1 if len(some) == 1 else 2]}" for kind, some in result.items()
        ),
        tables=tables.result_tables(results, colours),
        queries=queries,
        searches=searches,
        similar={model: pairs for model, pairs in similar.items() if pairs},
        by_epoch=charts.by_epoch(checkpoints, colours),
        losses=charts.losses(curves, colours),
        training=charts.training_geometry(curves, colours),
        spectra=charts.spectra(rows, colours),
        settings=_settings(rows),
    )
    write_whole(path, page, f"{path}: the report cannot be written here")


def _data_uri(picture: bytes) -> str | None:
    try:
        return data_uri(picture, _SIDE)
    except Unreadable:
        return None


def _settings(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(name, value per model) of the settings that any model has."""
    per_model = [{"objective": row.get("objective"), **row.get("settings", {})} for row in rows]
    for settings in per_model:
        if settings.get("hopfield") is False:  # β is without effect
            settings |= {"beta": None, "learnable_beta": None}
    keys = dict.fromkeys(key for settings in per_model for key in settings)

    def shown(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return MISSING if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    return [
        (_SETTINGS.get(key, key.replace("_", " ").capitalize()), [shown(s.get(key)) for s in per_model])
        for key in keys
        if any(s.get(key) is not None for s in per_model)
    ]
