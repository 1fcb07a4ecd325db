"""The model card: use, training (from its run) and results (``results.json``)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
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

RESULTS_FILE = "results.json"
PIPELINE = "zero-shot-image-classification"
_WAYS = (("image_to_text", "image → text"), ("text_to_image", "text → image"))
_SECTIONS = {
    "zeroshot": (
        "zero-shot",
        {
            "acc1": "top-1 %",
            "acc5": "top-5 %",
            "mean_per_class_recall": "mean per class %",
        },
    ),
    "probe": (
        "linear probe",
        {"acc1": "top-1 %", "mean_per_class_recall": "mean per class %"},
    ),
    "retrieval": (
        "retrieval",
        {
            f"{way}@{k}": f"{arrow}, recall@{k} %"
            for way, arrow in _WAYS
            for k in (1, 5, 10)
        },
    ),
}
_SCALES = {"τ⁻¹": "inv_tau", "β": "beta", "bias": "bias", "scale": "scale"}


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
    # the training of its run, label to text; empty without a run
    training: Mapping[str, str]
    results: Mapping[str, Any]  # its row of a results.json; empty without
    level: float  # of the intervals in it


@dataclass(frozen=True)
class Result:
    """A number of ``results.json``, and how the card writes it."""

    section: str  # a key of _SECTIONS
    set_name: str
    measure: str
    value: float
    title: str
    label: str
    text: str
    n: str


def describe_model(
    source: str, encoder: DualEncoder, results: Path | None = None
) -> ModelDescription:
    """What a card says of a model, with the row of its weights in ``results``, else in
    a results.json in or above its run.
    """
    folder = find_model_folder(source)
    run = runs.run_of(folder)
    settings = encoder.objective_config
    objective = member_name(settings.get("contrast"), settings.get("hopfield"))
    training: dict[str, str] = {}
    files: list[Path] = []
    if run is not None and folder is not None:
        training = _training(run, folder)
        files = [run / RESULTS_FILE, run.parent / RESULTS_FILE]
    row, level = _find_row(
        [results] if results else [file for file in files if file.is_file()],
        fingerprint(encoder),
        takes_any=results is not None,
    )
    if results is not None and not row:
        raise InputError(
            f"{results}: has no row of the weights of {source}; measure them by `cloob"
            f" eval {source}`"
        )
    name = objective or settings.get("closed_form")
    return ModelDescription(encoder, name, training, row, level)


def _find_row(
    files: Sequence[Path], weights: str, *, takes_any: bool
) -> tuple[dict[str, Any], float]:
    """The row of these weights, and the level of its intervals; ``takes_any``: the only
    row need not name them.
    """
    for file in files:
        content = read_json(file)
        rows = [row for row in content.get("rows") or () if isinstance(row, dict)]
        unnamed = weights if takes_any and len(rows) == 1 else None
        for row in rows:
            if row.get("fingerprint", unnamed) == weights:
                return row, float(content.get("level", 0.95))
    return {}, 0.95


def write_card(
    folder: Path,
    model: ModelDescription,
    exported: Exported,
    name: str,
    license: str | None = None,
) -> None:
    """Writes the card of an export, called ``name`` where it will be."""
    template: Any = require("jinja2", "export")
    short = name.rpartition("/")[2]
    results = list(_results(model))
    page = template.Template(_TEMPLATE, keep_trailing_newline=True).render(
        head=_metadata(model, results, short, exported, license),
        name=short,
        summary=_summary(model),
        usage=exported.usage.replace("DIR", name).strip(),
        notes=exported.notes,
        training=_training_rows(model),
        results=results,
        level=f"{model.level:.0%}",
        license=license,
        citation=BIBTEX,
    )
    write_whole(folder / CARD_FILE, page)


def _metadata(
    model: ModelDescription,
    results: Sequence[Result],
    name: str,
    exported: Exported,
    license: str | None,
) -> str:
    """The YAML head of the card, as the hub reads it."""
    hub: Any = require("huggingface_hub", "export")
    tags = [model.objective, *exported.tags] if model.objective else exported.tags
    data = hub.ModelCardData(
        license=license,
        library_name=exported.library,
        pipeline_tag=PIPELINE,
        tags=list(dict.fromkeys(tags)),
    )
    data.eval_results = [
        hub.EvalResult(
            task_type=PIPELINE,
            dataset_type=re.sub(r"[^\w.-]+", "-", result.set_name),
            dataset_name=result.set_name,
            metric_type="accuracy",
            metric_name=f"zero-shot top-{result.measure.removeprefix('acc')}",
            metric_value=round(100 * result.value, 2),
        )
        for result in results
        if result.section == "zeroshot" and result.measure.startswith("acc")
    ]
    if data.eval_results:
        data.model_name = name
    else:
        data.eval_results = None
    return str(data.to_yaml(line_break="\n")).strip()


def _summary(model: ModelDescription) -> str:
    """One sentence on what the model is."""
    encoder = model.encoder
    objective = ""
    if model.objective == "cca":
        objective = (
            ", with heads solved for in closed form (canonical correlation analysis)"
        )
    elif model.objective:
        member = FAMILY[model.objective]
        title = CONTRASTS[member.contrast].title
        if member.hopfield:
            title += " on embeddings retrieved from modern Hopfield networks"
        objective = f", trained with {model.objective} ({title})"
    millions = sum(value.numel() for value in encoder.model.parameters()) / 1e6
    return (
        "An image tower and a text tower that share an embedding space"
        f" ({encoder.name}, {millions:.1f} million parameters, pictures of"
        f" {encoder.image_size} × {encoder.image_size} pixels, texts of up to"
        f" {encoder.context_length} tokens, embeddings of {encoder.embed_dim}"
        f" numbers){objective}."
    )


def _training_rows(model: ModelDescription) -> dict[str, str]:
    """Label to text of the table; empty where nothing is known."""
    rows = {**_objective_rows(model), **model.training}
    if rows and not model.training:
        rows["data"] = "not known here"
    return {label: _cell(value) for label, value in rows.items()}


def _objective_rows(model: ModelDescription) -> dict[str, str]:
    """The rows of the card's table on the objective and its scales."""
    if not model.objective:
        return {}
    settings = model.encoder.objective_config
    rows = {"objective": model.objective}
    for label, key in _SCALES.items():
        if key not in settings or (key == "beta" and not settings.get("hopfield")):
            continue
        rows[label] = str(settings[key])
        if key == "bias" or settings.get(f"learnable_{key}"):
            rows[label] = f"{settings[key]:.4g} (learned)"
    return rows


def _results(model: ModelDescription) -> Iterator[Result]:
    """Every finite number that a card shows."""
    for section, (kind, labels) in _SECTIONS.items():
        for set_name, numbers in (model.results.get(section) or {}).items():
            for measure, label in labels.items():
                value = numbers.get(measure)
                if value is None or not math.isfinite(value):
                    continue
                ends = numbers.get(f"{measure}_interval")
                around = f" ({100 * ends[0]:.1f}–{100 * ends[1]:.1f})" if ends else ""
                yield Result(
                    section,
                    set_name,
                    measure,
                    value,
                    title=f"{kind}, {_cell(set_name)}",
                    label=label,
                    text=f"{100 * value:.1f}{around}",
                    n=str(numbers.get("n", "–")),
                )


def _cell(text: object) -> str:
    """Text that stays inside a cell and is no markup."""
    return re.sub(r"([|\\`*_\[\]<>])", r"\\\1", " ".join(str(text).split()))


def _training(run: Path, folder: Path) -> dict[str, str]:
    """The training of a run up to the checkpoint of a model folder."""
    config = read_json(run / runs.RUN_CONFIG_FILE)
    values: dict[str, object] = {
        "data": ", ".join(data_name(source) for source in config.get("data") or ())
    }
    checkpoint = folder.resolve().parent
    step: int | None = None
    if checkpoint.name.startswith("step-"):
        step = runs.checkpoint_step(checkpoint)
        values["steps"] = f"{step:,}"
    for line in runs.read_lines(run / runs.EPOCHS_FILE):
        if step in (None, line.get("step")):
            values["steps"] = f"{line['step']:,}"
            values["pairs seen"] = f"{line['samples_seen']:,}"
    values |= {label: config.get(key) for label, key in _TRAINING.items()}
    init = config.get("init")
    joins = config.get("retrieval_from")
    if init:
        values["starts from"] = model_name(str(init))
    if joins:
        values["retrieval joins"] = f"after {joins:.0%}"
    return {
        label: str(value) for label, value in values.items() if value not in (None, "")
    }


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
    if source.startswith("pipe:"):
        return "a pipe"
    if source.startswith("demo"):
        return source
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source):
        place = source.partition("://" if "://" in source else ":")[2]
        return (
            PurePosixPath(re.split(r"[?#]", place.partition("/")[2])[0]).name.lstrip(
                "~."
            )
            or "an address"
        )
    path = Path(source)
    if (
        source
        and not path.is_absolute()
        and ".." not in path.parts
        and not source.startswith("~")
    ):
        return source
    return path.name.lstrip("~.") or "a folder"
