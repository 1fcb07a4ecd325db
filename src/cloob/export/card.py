"""The model card: use, training (from its run) and results (``results.json``)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cloob.citation import BIBTEX
from cloob.errors import InputError, require
from cloob.export.exported import CARD_FILE, Exported
from cloob.family import CONTRASTS, FAMILY, member_name
from cloob.files import write_whole
from cloob.models import runs
from cloob.models.encoder import DualEncoder
from cloob.models.importing import read_json
from cloob.models.load import find_model_folder, fingerprint
from cloob.models.source import PORT

_RECALLS = {
    f"{way}_to_{other}@{k}": f"{way} → {other}, recall@{k} %"
    for way, other in (("image", "text"), ("text", "image"))
    for k in (1, 5, 10)
}
_CLASSES = {"acc1": "top-1 %", "mean_per_class_recall": "mean per class %"}
_SECTIONS = (
    ("zeroshot", "zero-shot", {"acc1": "top-1 %", "acc5": "top-5 %", **_CLASSES}),
    ("probe", "linear probe", _CLASSES),
    ("retrieval", "retrieval", _RECALLS),
)
"""Of results.json: a section, its title, and what a card shows of it."""
_TRAINING = {
    "batch size": "batch_size",
    "precision": "precision",
    "learning rate": "lr",
    "schedule": "schedule",
    "weight decay": "weight_decay",
    "seed": "seed",
}
_TEMPLATE = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class ModelDescription:
    """What a card says of a model, before it is text."""

    encoder: DualEncoder
    # the member of the family that it was trained with; None if unknown
    objective: str | None
    # the training of its run, label to value; empty without a run
    training: Mapping[str, object]
    results: Mapping[str, Any]  # its row of a results.json; empty without
    level: float  # of the intervals in it


def describe_model(
    source: str, encoder: DualEncoder, results: Path | None = None
) -> ModelDescription:
    """What a card says of a model, with the row of its weights in ``results``."""
    folder = find_model_folder(source)
    run = runs.run_of(folder)
    settings = encoder.objective_config
    objective = member_name(settings.get("contrast"), settings.get("hopfield"))
    training: dict[str, object] = {}
    if run is not None and folder is not None:
        training = _training(run, folder)
    row: dict[str, Any] = {}
    level = 0.95
    if results is not None:
        content = read_json(results)
        level = float(content.get("level", level))
        row = _find_row(content, fingerprint(encoder))
        if not row:
            raise InputError(
                f"{results}: has no row of the weights of {source}; measure them by"
                f" `cloob eval {source}`"
            )
    name = objective or settings.get("closed_form")
    return ModelDescription(encoder, name, training, row, level)


def _find_row(content: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """The row of these weights in a results.json; empty without one."""
    for row in content.get("rows") or ():
        if isinstance(row, dict) and row.get("fingerprint") == weights:
            return row
    return {}


def write_card(
    folder: Path,
    model: ModelDescription,
    exported: Exported,
    name: str,
    license: str | None = None,
) -> None:
    """Writes the card of an export, called ``name`` where it will be."""
    jinja: Any = require("jinja2", "export")
    environment = jinja.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": _cell, "slug": _slug}
    environment.tests["finite"] = _is_finite
    parameters = model.encoder.model.parameters()
    page = environment.from_string(_TEMPLATE).render(
        vars(model),
        exported=exported,
        tags=dict.fromkeys(filter(None, [model.objective, *exported.tags])),
        name=name.rpartition("/")[2],
        place=name,
        license=license,
        millions=sum(value.numel() for value in parameters) / 1e6,
        member=FAMILY.get(str(model.objective)),
        contrasts=CONTRASTS,
        sections=_SECTIONS,
        citation=BIBTEX,
    )
    write_whole(folder / CARD_FILE, page)


def _cell(text: object) -> str:
    """Text that stays inside a cell and is no markup."""
    return re.sub(r"([|\\`*_\[\]<>])", r"\\\1", " ".join(str(text).split()))


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _training(run: Path, folder: Path) -> dict[str, object]:
    """The training of a run up to the checkpoint of a model folder."""
    config = read_json(run / runs.RUN_CONFIG_FILE)
    sources = [data_name(source) for source in config.get("data") or ()]
    step = runs.checkpoint_step(folder.resolve().parent)
    rows: dict[str, object] = {"data": ", ".join(sources), "steps": f"{step:,}"}
    for line in runs.read_lines(run / runs.EPOCHS_FILE):
        if line.get("step") == step:
            rows["pairs seen"] = f"{line['samples_seen']:,}"
    for label, key in _TRAINING.items():
        rows[label] = config.get(key)
    if config.get("init"):
        rows["starts from"] = model_name(str(config["init"]))
    if config.get("retrieval_from"):
        rows["retrieval joins"] = f"after {config['retrieval_from']:.0%}"
    return rows


def model_name(source: str) -> str:
    """A model as a card names it: one of the hub with its owner, any other as
    ``data_name`` does.
    """
    if re.fullmatch(r"hf-hub:[\w-][\w.-]*/[\w.-]+", source):
        return source
    path, _ = runs.split_checkpoint(source.removeprefix("local-dir:"))
    return data_name(path.removesuffix(PORT))


def data_name(source: str) -> str:
    """A data source as a card names it: a relative path or packaged set, else the last
    part: no host, no key.
    """
    if source.startswith("demo"):
        return source
    address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?://[^/]*)?", source)
    place = source
    if address:
        place = re.split(r"[?#]", source[address.end() :])[0]
    path = PurePosixPath(place)
    is_elsewhere = address or path.is_absolute() or ".." in path.parts
    if source and not is_elsewhere and not source.startswith("~"):
        return source
    return path.name.lstrip("~.") or "a folder"
