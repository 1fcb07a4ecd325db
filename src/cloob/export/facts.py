"""What a model card says of a model: its towers, how it was trained, and how good it is; read from its run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cloob.errors import InputError
from cloob.evaluate.facts import ModelFacts, model_facts
from cloob.models.encoder import DualEncoder
from cloob.models.load import find_model_folder
from cloob.models.runs import (
    EPOCHS_FILE,
    RUN_CONFIG_FILE,
    checkpoint_step,
    read_lines,
    run_of,
    split_checkpoint,
)
from cloob.models.untrusted import read_json

RESULTS_FILE = "results.json"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_HUB_MODEL = re.compile(r"hf-hub:[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Facts:
    """What is known of a model.

    Attributes:
        towers: Name of the towers' configuration.
        kind: Of the model folder, as ``EncoderConfig.kind``.
        embed_dim: D.
        image_size: Side of the input in pixels.
        context_length: L.
        parameters: How many numbers the towers have.
        objective: Member of the family that it was trained with; None if unknown.
        settings: Its ``objective.json``; empty if unknown.
        training: What its run says of the training, label to text; empty without a run.
        results: Its row of a ``results.json``; empty without.
        level: Of the intervals in it.
    """

    towers: str
    kind: str
    embed_dim: int
    image_size: int
    context_length: int
    parameters: int
    objective: str | None
    settings: Mapping[str, Any]
    training: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    level: float = 0.95


def gather_facts(source: str, encoder: DualEncoder, results: Path | None = None) -> Facts:
    """Facts of a model that was loaded.

    Args:
        source: What ``load_model`` took.
        encoder: What it gave.
        results: A ``results.json``; None: the one in the run's folder, or beside it if that has a row of its weights.

    Raises:
        InputError: ``results`` is none, or has no row of the model, or one of other weights.
    """
    folder = find_model_folder(source)
    run = run_of(folder)
    objective = model_facts(encoder)
    row, level = _results(source, run, results, objective)
    return Facts(
        towers=encoder.name,
        kind=encoder.config.kind,
        embed_dim=encoder.embed_dim,
        image_size=encoder.image_size,
        context_length=encoder.context_length,
        parameters=sum(value.numel() for value in encoder.model.parameters()),
        objective=objective.objective,
        settings=objective.settings,
        training=_training(run, folder) if run is not None and folder is not None else {},
        results=row,
        level=level,
    )


def _training(run: Path, folder: Path) -> dict[str, str]:
    config = read_json(run / RUN_CONFIG_FILE)

    def said(section: str, key: str) -> Any:
        part = config.get(section)
        return part.get(key) if isinstance(part, dict) else None

    checkpoint = folder.resolve().parent
    step = checkpoint_step(checkpoint) if checkpoint.name.startswith("step-") else None
    done = _progress(run, step)
    data = said("pairs", "data")
    rows = {
        "data": ", ".join(data_name(str(name)) for name in data) if isinstance(data, list) else None,
        "steps": f"{step:,}" if step is not None else done.get("step"),
        "pairs seen": done.get("samples_seen"),
        "batch size": said("run", "batch_size"),
        "precision": said("run", "precision"),
        "learning rate": said("optim", "lr"),
        "schedule": said("optim", "schedule"),
        "weight decay": said("optim", "weight_decay"),
        "starts from": model_name(str(said("towers", "init"))) if said("towers", "init") else None,
        "image tower from": model_name(str(said("towers", "init_image"))) if said("towers", "init_image") else None,
        "retrieval joins": f"after {said('loss', 'retrieval_from'):.0%}" if said("loss", "retrieval_from") else None,
        "averaged weights": f"decay {said('optim', 'ema')}" if said("optim", "ema") else None,
        "seed": said("run", "seed"),
    }
    return {label: f"{value}" for label, value in rows.items() if value is not None}


def _progress(run: Path, step: int | None) -> dict[str, str]:
    """Steps and pairs of the epochs that a checkpoint has behind it, as far as the run says."""
    try:
        ends = [line for line in read_lines(run / EPOCHS_FILE) if step is None or line.get("step") == step]
        return {key: f"{ends[-1][key]:,}" for key in ("step", "samples_seen")} if ends else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def model_name(source: str) -> str:
    """A model as a card names it: one of the hub with its owner, any other as ``data_name`` does.

    Args:
        source: As ``--init`` took it.
    """
    if _HUB_MODEL.fullmatch(source):
        return source
    return data_name(split_checkpoint(source.removeprefix("local-dir:"))[0].removesuffix(":port"))


def data_name(source: str) -> str:
    """A data source as a card names it: no folder of a machine, no host, no key of an address.

    Args:
        source: As ``--data`` took it.

    Returns:
        A relative path and a set that comes along as they are, else the last part of the place.
    """
    if source.startswith("pipe:"):
        return "a pipe"
    if source.startswith("demo"):
        return source
    if _ADDRESS.match(source):
        place = source.partition("://" if "://" in source else ":")[2]
        return PurePosixPath(re.split(r"[?#]", place.partition("/")[2])[0]).name or "an address"
    path = Path(source)
    if source and not path.is_absolute() and ".." not in path.parts and not source.startswith("~"):
        return source
    return path.name.lstrip("~.") or "a folder"


def _results(source: str, run: Path | None, given: Path | None, model: ModelFacts) -> tuple[Mapping[str, Any], float]:
    """The model's row and the level of its intervals: of its weights, whatever it is called there.

    Rows that were written by hand, or by cloob before it wrote fingerprints, count when they are ``given``.
    """
    if given is not None:
        content = read_json(given)
        rows = _rows(content)
        fitting = _of_weights(rows, model) or _of_name(rows, Path(source.removeprefix("local-dir:")))
        if len(fitting) != 1:
            models = ", ".join(str(row["model"]) for row in rows) or "none"
            raise InputError(f"{given}: which of its models ({models}) is {source}?")
        row = fitting[0]
        if row.get("fingerprint") not in (None, model.fingerprint):
            raise InputError(f"{given}: its model {row['model']} has other weights than {source} has now")
        if not _same_objective(row, model.settings):
            raise InputError(f"{given}: its model {row['model']} has another objective than {source}")
        return row, _level(content)
    for place in (run, run.parent) if run is not None else ():
        if (place / RESULTS_FILE).is_file():
            content = read_json(place / RESULTS_FILE)
            if fitting := _of_weights(_rows(content), model):
                return fitting[0], _level(content)
    return {}, 0.95


def _of_weights(rows: list[dict[str, Any]], model: ModelFacts) -> list[dict[str, Any]]:
    """At most one: a model that is there under two names has the same numbers under both."""
    known = model.fingerprint
    return [row for row in rows if known is not None and row.get("fingerprint") == known][:1]


def _of_name(rows: list[dict[str, Any]], place: Path) -> list[dict[str, Any]]:
    """The rows that call their model by the last parts of a place, else the only one."""
    named = [row for row in rows if _is_tail(str(row["model"]), place)]
    return named or (rows if len(rows) == 1 else [])


def _rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = content.get("rows")
    return [row for row in rows if isinstance(row, dict) and "model" in row] if isinstance(rows, list) else []


def _level(content: Mapping[str, Any]) -> float:
    level = content.get("level")
    return float(level) if isinstance(level, int | float) else 0.95


def _is_tail(name: str, place: Path) -> bool:
    """Whether results call the model at a place so: by the last parts of its path."""
    parts = Path(name).parts
    return bool(parts) and place.parts[-len(parts) :] == parts


def _same_objective(row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    theirs = row.get("settings")
    known = theirs if isinstance(theirs, Mapping) else {}
    return all(key not in known or key not in settings or known[key] == settings[key] for key in _IDENTITY)


_IDENTITY = ("contrast", "hopfield", "scale")
