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


@dataclass(frozen=True)
class Facts:
    encoder: DualEncoder
    objective: (
        str | None
    )  # the member of the family that it was trained with; None if unknown
    training: Mapping[
        str, str
    ]  # the training of its run, label to text; empty without a run
    results: Mapping[str, Any]  # its row of a results.json; empty without
    level: float  # of the intervals in it


def gather_facts(
    source: str, encoder: DualEncoder, results: Path | None = None
) -> Facts:
    """The facts of a model, with the row of its weights in ``results``, else in a
    results.json in or above its run.
    """
    folder = find_model_folder(source)
    run = runs.run_of(folder)
    objective = member_name(
        *(encoder.objective_config.get(key) for key in ("contrast", "hopfield"))
    )
    objective = objective or encoder.objective_config.get("closed_form")
    training = _training(run, folder) if run is not None and folder is not None else {}
    weights, nearby = (
        fingerprint(encoder),
        [place / RESULTS_FILE for place in (run, run.parent)] if run else [],
    )
    for place in [results] if results else filter(Path.is_file, nearby):
        content = read_json(place)
        rows = [row for row in content.get("rows") or () if isinstance(row, dict)]
        alone = results is not None and len(rows) == 1
        for row in rows:
            if row.get("fingerprint", weights if alone else None) == weights:
                return Facts(
                    encoder, objective, training, row, float(content.get("level", 0.95))
                )
    if results is not None:
        raise InputError(
            f"{results}: has no row of the weights of {source}; measure them by `cloob"
            f" eval {source}`"
        )
    return Facts(encoder, objective, training, {}, 0.95)


def write_card(
    folder: Path,
    facts: Facts,
    exported: Exported,
    name: str,
    license: str | None = None,
) -> None:
    """Writes the card of an export, called ``name`` where it will be."""
    short = name.rpartition("/")[2]
    usage = exported.usage.replace("DIR", name).strip()
    parts = [f"# {short}", _summary(facts), f"## How to use it\n\n{usage}"]
    if exported.notes:
        parts.append(
            "## What to know\n\n" + "\n".join(f"- {note}" for note in exported.notes)
        )
    parts += [
        f"## Training\n\n{_training_section(facts)}",
        f"## Results\n\n{_results_section(facts)}",
    ]
    given = (
        f"`{license}`."
        if license
        else "Not given; ask whoever published the model before you use it."
    )
    parts += [f"## Licence\n\n{given}", f"## Citation\n\n```bibtex\n{BIBTEX}```"]
    tags = [*dict.fromkeys(tag for tag in (facts.objective, *exported.tags) if tag)]
    head = _metadata(facts, short, exported.library, tags, license)
    write_whole(folder / CARD_FILE, f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n")


def _metadata(
    facts: Facts, name: str, library: str, tags: list[str], license: str | None
) -> str:
    hub: Any = require("huggingface_hub", "export")
    results = [
        hub.EvalResult(
            task_type=PIPELINE,
            dataset_type=re.sub(r"[^\w.-]+", "-", set_name),
            dataset_name=set_name,
            metric_type="accuracy",
            metric_name=f"zero-shot top-{key.removeprefix('acc')}",
            metric_value=round(100 * value, 2),
        )
        for section, set_name, key, value, _ in _numbers(facts)
        if section == "zeroshot" and key.startswith("acc")
    ]
    more = {"model_name": name, "eval_results": results} if results else {}
    data = hub.ModelCardData(
        license=license, library_name=library, pipeline_tag=PIPELINE, tags=tags, **more
    )
    return str(data.to_yaml(line_break="\n")).strip()


def _summary(facts: Facts) -> str:
    encoder, objective = facts.encoder, ""
    if facts.objective == "cca":
        objective = (
            ", with heads solved for in closed form (canonical correlation analysis)"
        )
    elif facts.objective:
        member = FAMILY[facts.objective]
        retrieved = (
            " on embeddings retrieved from modern Hopfield networks"
            if member.hopfield
            else ""
        )
        objective = (
            f", trained with {facts.objective}"
            f" ({CONTRASTS[member.contrast].title}{retrieved})"
        )
    millions = sum(value.numel() for value in encoder.model.parameters()) / 1e6
    return (
        "An image tower and a text tower that share an embedding space"
        f" ({encoder.name}, {millions:.1f} million parameters, pictures of"
        f" {encoder.image_size} × {encoder.image_size} pixels, texts of up to"
        f" {encoder.context_length} tokens, embeddings of {encoder.embed_dim}"
        f" numbers){objective}."
    )


def _training_section(facts: Facts) -> str:
    rows = {}
    if facts.objective:
        stored = facts.encoder.objective_config
        rows["objective"] = facts.objective
        for label, key in _SCALES.items():
            if key in stored and (key != "beta" or stored.get("hopfield")):
                learned = key == "bias" or stored.get(f"learnable_{key}")
                rows[label] = (
                    f"{stored[key]:.4g} (learned)" if learned else str(stored[key])
                )
    rows |= facts.training
    if not rows:
        return "What the model was trained on, and how, is not known here."
    if not facts.training:
        rows["data"] = "not known here"
    return _table(["", ""], [[label, _cell(value)] for label, value in rows.items()])


def _results_section(facts: Facts) -> str:
    rows = []
    for section, set_name, key, value, numbers in _numbers(facts):
        kind, labels = _SECTIONS[section]
        ends = numbers.get(f"{key}_interval")
        around = f" ({100 * ends[0]:.1f}–{100 * ends[1]:.1f})" if ends else ""
        measured = f"{100 * value:.1f}{around}"
        rows.append(
            [
                f"{kind}, {_cell(set_name)}",
                labels[key],
                measured,
                f"{numbers.get('n', '–')}",
            ]
        )
    if not rows:
        return (
            "Not measured: `cloob eval` measures, and writes a results.json that a card"
            " takes up."
        )
    table = _table(["", "", f"({facts.level:.0%} interval)", "n"], rows)
    return f"{table}\n\nMeasured by `cloob eval`; intervals by bootstrap."


def _numbers(facts: Facts) -> Iterator[tuple[str, str, str, float, Mapping[str, Any]]]:
    """Section, set, measure and value of every finite result, and all numbers of the
    set.
    """
    for section, (_, labels) in _SECTIONS.items():
        for set_name, numbers in (facts.results.get(section) or {}).items():
            for key in labels:
                if (value := numbers.get(key)) is not None and math.isfinite(value):
                    yield section, set_name, key, value, numbers


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: object) -> str:
    """Text that stays inside a cell and is no markup."""
    return re.sub(r"([|\\`*_\[\]<>])", r"\\\1", " ".join(str(text).split()))


def _training(run: Path, folder: Path) -> dict[str, str]:
    """The training of a run up to the checkpoint of a model folder."""
    config = read_json(run / runs.RUN_CONFIG_FILE)
    checkpoint = folder.resolve().parent
    step = (
        runs.checkpoint_step(checkpoint)
        if checkpoint.name.startswith("step-")
        else None
    )
    ends = [
        line
        for line in runs.read_lines(run / runs.EPOCHS_FILE)
        if step in (None, line.get("step"))
    ]
    done = (
        {key: f"{ends[-1][key]:,}" for key in ("step", "samples_seen")} if ends else {}
    )
    data, init = config.get("data"), config.get("init")
    joins = config.get("retrieval_from")
    rows = {
        "data": ", ".join(map(data_name, data)) if data else None,
        "steps": f"{step:,}" if step is not None else done.get("step"),
        "pairs seen": done.get("samples_seen"),
        "batch size": config.get("batch_size"),
        "precision": config.get("precision"),
        "learning rate": config.get("lr"),
        "schedule": config.get("schedule"),
        "weight decay": config.get("weight_decay"),
        "starts from": model_name(str(init)) if init else None,
        "retrieval joins": f"after {joins:.0%}" if joins else None,
        "seed": config.get("seed"),
    }
    return {label: f"{value}" for label, value in rows.items() if value is not None}


def model_name(source: str) -> str:
    """A model as a card names it: one of the hub with its owner, any other as
    ``data_name`` does.
    """
    if re.fullmatch(r"hf-hub:[\w-][\w.-]*/[\w.-]+", source):
        return source
    return data_name(
        runs.split_checkpoint(source.removeprefix("local-dir:"))[0].removesuffix(
            ":port"
        )
    )


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
