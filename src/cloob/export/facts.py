"""What a model card says of a model: how it was trained, and how good it is; read from its run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cloob.errors import InputError
from cloob.evaluation.embeddings import model_facts
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
        encoder: The model.
        objective: Member of the family that it was trained with; None if unknown.
        training: What its run says of the training, label to text; empty without a run.
        results: Its row of a ``results.json``; empty without.
        level: Of the intervals in it.
    """

    encoder: DualEncoder
    objective: str | None
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
        InputError: ``results`` is none, or has no row of these weights.
    """
    folder = find_model_folder(source)
    run = run_of(folder)
    known = model_facts(encoder)
    row, level = _results(source, run, results, known.fingerprint)
    training = _training(run, folder) if run is not None and folder is not None else {}
    return Facts(encoder, known.objective, training, row, level)


def _training(run: Path, folder: Path) -> dict[str, str]:
    config = read_json(run / RUN_CONFIG_FILE)

    def setting(section: str, key: str) -> Any:
        part = config.get(section)
        return part.get(key) if isinstance(part, dict) else None

    checkpoint = folder.resolve().parent
    step = checkpoint_step(checkpoint) if checkpoint.name.startswith("step-") else None
    done = _progress(run, step)
    data, init, init_image = setting("pairs", "data"), setting("towers", "init"), setting("towers", "init_image")
    joins, ema = setting("loss", "retrieval_from"), setting("optim", "ema")
    rows = {
        "data": ", ".join(data_name(str(name)) for name in data) if isinstance(data, list) else None,
        "steps": f"{step:,}" if step is not None else done.get("step"),
        "pairs seen": done.get("samples_seen"),
        "batch size": setting("run", "batch_size"),
        "precision": setting("run", "precision"),
        "learning rate": setting("optim", "lr"),
        "schedule": setting("optim", "schedule"),
        "weight decay": setting("optim", "weight_decay"),
        "starts from": model_name(str(init)) if init else None,
        "image tower from": model_name(str(init_image)) if init_image else None,
        "retrieval joins": f"after {joins:.0%}" if joins else None,
        "averaged weights": f"decay {ema}" if ema else None,
        "seed": setting("run", "seed"),
    }
    return {label: f"{value}" for label, value in rows.items() if value is not None}


def _progress(run: Path, step: int | None) -> dict[str, str]:
    """Steps and pairs up to a checkpoint, as far as the run has a line for it."""
    try:
        ends = [line for line in read_lines(run / EPOCHS_FILE) if step is None or line.get("step") == step]
        return {key: f"{ends[-1][key]:,}" for key in ("step", "samples_seen")} if ends else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def model_name(source: str) -> str:
    """A model as a card names it: one of the hub with its owner, any other as ``data_name`` does."""
    if _HUB_MODEL.fullmatch(source):
        return source
    return data_name(split_checkpoint(source.removeprefix("local-dir:"))[0].removesuffix(":port"))


def data_name(source: str) -> str:
    """A data source as a card names it: no folder of a machine, no host, no key of an address.

    A relative path and a set that comes with the package stay; of any other place the last part.
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


def _results(source: str, run: Path | None, given: Path | None, weights: str | None) -> tuple[Mapping[str, Any], float]:
    """The row of the model's weights, whatever it is called there, and the level of its intervals.

    A row without a fingerprint counts where it is the only one of a file that was ``given``.
    """
    places = [given] if given else [place / RESULTS_FILE for place in (run, run.parent)] if run else []
    for place in places:
        if given is None and not place.is_file():
            continue
        content = read_json(place)
        rows = content.get("rows")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        fitting = [row for row in rows if weights is not None and row.get("fingerprint") == weights]
        if given is not None and len(rows) == 1 and "fingerprint" not in rows[0]:
            fitting = rows
        if fitting:
            level = content.get("level")
            return fitting[0], float(level) if isinstance(level, int | float) else 0.95
    if given is not None:
        raise InputError(f"{given}: has no row of the weights of {source}; measure them by `cloob eval {source}`")
    return {}, 0.95
