"""The layout of a run folder, spelled once, down to the files of the model folder in
every checkpoint.

::

    RUN/          config.json  metrics.jsonl  epochs.jsonl  skipped.jsonl
                  of heads also decisions.json  suspects.csv  state/
    checkpoint    RUN/checkpoints/step-00000100/
                  trainer.pt  validation.json  model/  ema/ (another model)

A model folder has ``objective.json``, and is told by its configuration::

    open_clip_config.json    open_clip_model.safetensors, as ``local-dir:`` takes it
    towers.json              model.safetensors of towers that open_clip does not have
    aligned.json             heads.safetensors on frozen encoders
    vectors.json             heads.safetensors for vectors
    onnx.json                onnx/*.onnx for onnxruntime; tokenizer.json
    module.json              model.safetensors of a module that was given to ``train``
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models.importing import read_json
from cloob.models.settings import JsonObject

RUN_CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
EPOCHS_FILE = "epochs.jsonl"
SKIPPED_FILE = "skipped.jsonl"
RESULTS_FILE = "results.json"
SUSPECTS_FILE = "suspects.csv"
CHECKPOINTS_FOLDER = "checkpoints"
CHECKPOINT = "step-{:08d}"
MODEL_FOLDER = "model"
EMA_FOLDER = "ema"
TRAINER_FILE = "trainer.pt"
VALIDATION_FILE = "validation.json"
DECISIONS_FILE = "decisions.json"
STATE_FOLDER = "state"

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TOWERS_FILE = "towers.json"
TOWERS_WEIGHTS_FILE = "model.safetensors"
ALIGNED_FILE = "aligned.json"
HEADS_FILE = "heads.safetensors"
VECTORS_FILE = "vectors.json"
ONNX_FILE = "onnx.json"
MODULE_FILE = "module.json"
OBJECTIVE_FILE = "objective.json"
HUB_WEIGHTS_FILES = (
    WEIGHTS_FILE,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""The weights that open_clip fetches from a hub: the first of these that is there."""

# All that a run owns: what else lies in its folders is somebody else's.
_WRITTEN = (
    METRICS_FILE,
    EPOCHS_FILE,
    SKIPPED_FILE,
    SUSPECTS_FILE,
    f"{CHECKPOINTS_FOLDER}/*step-*",
    f"{STATE_FOLDER}/*.pt",
    RUN_CONFIG_FILE,
)
_STEP = re.compile(r"step-\d+")
_PREFERRED = (
    *HUB_WEIGHTS_FILES,
    "open_clip_pytorch_model.pth",
    TOWERS_WEIGHTS_FILE,
    "pytorch_model.bin",
)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def config_file(folder: Path) -> Path:
    """The configuration file of a model folder, whether it is there or not."""
    for name in (ALIGNED_FILE, VECTORS_FILE, TOWERS_FILE, ONNX_FILE, MODULE_FILE):
        if (folder / name).is_file():
            return folder / name
    return folder / CONFIG_FILE


def is_run(folder: Path) -> bool:
    """Whether a folder has checkpoints, and is no model folder."""
    return (folder / CHECKPOINTS_FOLDER).is_dir() and not config_file(folder).is_file()


def weights_file(folder: Path) -> Path | None:
    """The weights file of a model folder that open_clip's ``local-dir:`` would read;
    None without any.
    """
    names: list[str] = []
    for ending in ("safetensors", "bin", "pth"):
        names += sorted(path.name for path in folder.glob(f"[!.]*.{ending}"))
    for name in (*_PREFERRED, *names):
        if name in names and (folder / name).is_file():
            return folder / name
    return None


def check_objective(settings: Any, where: str) -> dict[str, object]:
    for key in settings.keys() & {"inv_tau", "beta", "bias"}:
        value = settings[key]
        is_positive = _is_number(value) and value > 0
        if isinstance(value, bool) or not (is_positive or key == "bias"):
            raise InputError(f"{where}: {key} is {value!r}, which it cannot be")
    return dict(settings)


def run_of(folder: Path | None) -> Path | None:
    """The run folder in whose checkpoints a model folder lies; None if in none."""
    if folder is None:
        return None
    checkpoint = folder.resolve().parent
    run = checkpoint.parent.parent
    is_checkpoint = (
        checkpoint.parent.name == CHECKPOINTS_FOLDER
        and _STEP.fullmatch(checkpoint.name) is not None
    )
    return run if is_checkpoint and (run / RUN_CONFIG_FILE).is_file() else None


def run_files(out: Path) -> list[Path]:
    """The files and checkpoints of the run that a folder holds, none without a run;
    InputError where it holds files of these names that no run of ours wrote.
    """
    patterns = (DECISIONS_FILE, *_WRITTEN)
    files = [path for pattern in patterns for path in sorted(out.glob(pattern))]
    holds_run = (
        (out / DECISIONS_FILE).is_file()
        or _mentions(out / RUN_CONFIG_FILE, "overwrite")
        or list_checkpoints(out)
    )
    if files and not holds_run:
        name = files[0].relative_to(out)
        raise InputError(f"{out}: holds {name}, but no run; give another --out")
    return files


def remove_run(out: Path) -> None:
    """Removes the run that a folder holds, last what shows that it is one; what a run
    did not write stays.
    """
    files = run_files(out)
    if _mentions(out / RESULTS_FILE, "differences"):
        files = [out / RESULTS_FILE, *files]
    for path in files:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in (CHECKPOINTS_FOLDER, STATE_FOLDER):
        with contextlib.suppress(OSError):  # not there, or not empty
            (out / name).rmdir()


def _mentions(file: Path, key: str) -> bool:
    """Whether a JSON file, which may be cut short, has this key."""
    with contextlib.suppress(OSError):
        return f'"{key}":' in file.read_text(encoding="utf-8", errors="replace")
    return False


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, by ascending step: ``step-N`` with a
    configuration and weights.
    """
    complete = []
    for path in (run / CHECKPOINTS_FOLDER).glob("step-*"):
        model = path / MODEL_FOLDER
        has_config = config_file(model).is_file()
        if _STEP.fullmatch(path.name) and has_config and weights_file(model):
            complete.append(path)
    return sorted(complete, key=checkpoint_step)


def latest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run folder."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise InputError(
            f"{run}: no complete checkpoint found in {run / CHECKPOINTS_FOLDER}"
            f" (step-N/model/{CONFIG_FILE} and weights)"
        )
    return checkpoints[-1]


def read_validation(checkpoint: Path) -> JsonObject | None:
    """A checkpoint's ``validation.json``; None without, or where it was cut short."""
    with contextlib.suppress(InputError):
        return dict(read_json(checkpoint / VALIDATION_FILE))
    return None


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a validation is better by a metric: by all but the loss the higher."""
    return value < than if metric == "val_loss" else value > than


def find_best(
    run: Path, metric: str | None = None, measured: Mapping[str, object] | None = None
) -> tuple[Path, float] | None:
    """The best checkpoint by a metric, among those measured like the newest, and its
    value.
    """
    validations = {}
    newest: Mapping[str, object] = {}
    for path in list_checkpoints(run):
        values = read_validation(path)
        if values is not None:
            validations[path] = newest = values
    metric = metric or str(newest.get("metric"))
    reference = newest if measured is None else measured
    scores = [
        (path, float(values[metric]))
        for path, values in validations.items()
        if _is_number(values.get(metric)) and _comparable(metric, values, reference)
    ]
    choose = min if metric == "val_loss" else max
    return choose(scores, key=operator.itemgetter(1), default=None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _comparable(metric: str, a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    """Whether two validations are of the same pairs, and losses of equal batches; what
    one of them does not say counts as equal.
    """
    keys = ("held_out", "batch_size") if metric == "val_loss" else ("held_out",)
    return all(a[key] == b[key] for key in keys if key in a and key in b)


def split_checkpoint(source: str) -> tuple[str, str]:
    """A source of ``load_model`` without ``:best`` or ``:last``, and which of the two
    it ends in ("" for neither).
    """
    folder, _, which = source.rpartition(":")
    if which in ("best", "last") and not Path(source).exists():
        return folder, which
    return source, ""


def chosen_checkpoint(run: Path, which: str = "") -> Path:
    """The checkpoint that a run folder stands for: ``which``, or the best if one was
    validated, else the last.
    """
    if which == "last":
        return latest_checkpoint(run)
    best = find_best(run)
    if best is not None:
        return best[0]
    if which != "best":
        return latest_checkpoint(run)
    if not run.is_dir():
        raise InputError(f"{run}: no such folder")
    raise InputError(
        f"{run}: no checkpoint with a {VALIDATION_FILE} found; training with --val-data"
        " writes it"
    )


def with_checkpoint(source: str) -> str:
    """A source of ``load_model`` that names its checkpoint: ``RUN:best`` or
    ``RUN:last`` for ``RUN``, others as is.
    """
    folder = Path(source.removeprefix("local-dir:")).expanduser()
    if not is_run(folder):
        return source
    which = "last" if find_best(folder) is None else "best"
    return f"{source}:{which}"


def read_lines(file: Path) -> list[JsonObject]:
    """The objects of a log, none without the file; a line that is no object, as a crash
    leaves one, is passed over.
    """
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def epoch_of(run: Path, step: int) -> float | None:
    """Epochs done at a step, by the run's epochs.jsonl (a line at every epoch's end),
    in between by proportion.
    """
    try:
        first = read_lines(run / EPOCHS_FILE)[0]
        return round(float(step * first["epoch"] / first["step"]), 3)
    except (OSError, IndexError, KeyError, TypeError, ZeroDivisionError):
        return None
