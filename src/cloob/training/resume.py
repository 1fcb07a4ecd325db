"""Where a run goes on: a checkpoint found, read, compared with the configuration and loaded into what was built."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloob.data.fingerprint import Fingerprint, differences
from cloob.distributed import on_rank_zero, rank, world_size
from cloob.errors import InputError, one_line
from cloob.models.encoder import DualEncoder
from cloob.models.load import load_model
from cloob.models.runs import MODEL_FOLDER, RUN_CONFIG_FILE, TRAINER_FILE, find_best, list_checkpoints, weights_file
from cloob.models.weights.containers import check_zip
from cloob.scales import FixedScaleWarning
from cloob.training import sharding
from cloob.training.callbacks import Ended, RunResult
from cloob.training.checkpoint import TRAINING, measured, weights_digest
from cloob.training.config import TrainConfig
from cloob.training.config.checks import refuse
from cloob.training.progress import Progress, is_whole
from cloob.training.step import Stepper

logger = logging.getLogger(__name__)
# Changing these between a run and its resumption changes no number of the training; batch_size has a line of its own.
_FREE_PARTS = ("save", "log")
_FREE = """workers val_data val_a val_b val_ids val_every cache_dir cache_gb device max_nonfinite patience
average_with_start batch_size"""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: ``encoder`` holds the weights of ``model/``, ``state`` what ``trainer.pt`` holds."""

    path: Path
    encoder: DualEncoder
    state: dict[str, Any]
    progress: Progress  # as it was written


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder; InputError for a file that is missing, cut short or of another format."""
    file = path / TRAINER_FILE
    try:
        check_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        encoder = load_model(str(path / MODEL_FOLDER), device="cpu")
        if state["weights"] != weights_digest(path):
            raise InputError(f"{weights_file(path / MODEL_FOLDER)}: damaged, its digest is not the one in {file.name}")
        return Checkpoint(path, encoder, state, Progress(**state["progress"]))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: cannot be read ({one_line(error)}); use an earlier checkpoint") from error


def find_checkpoint(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to resume from, None to start afresh; every rank calls this and reads the same.

    ``resume`` is ``"none"``, ``"auto"`` (the newest readable checkpoint of ``run``, if any; unreadable ones are passed
    over with a warning), or the path of a checkpoint or a run folder.
    """
    if resume == "none":
        return None
    held: list[Checkpoint] = []  # on rank 0

    def choose() -> Path | None:
        held.extend(checkpoint for checkpoint in [_newest(run, resume)] if checkpoint is not None)
        return held[0].path if held else None

    chosen = on_rank_zero(choose)
    if chosen is None:
        return None
    return held[0] if held else read_checkpoint(chosen)


def _newest(run: Path, resume: str) -> Checkpoint | None:
    run = run if resume == "auto" else Path(resume)
    if resume != "auto" and (run / TRAINER_FILE).is_file():
        return read_checkpoint(run)
    errors: list[InputError] = []
    for path in reversed(list_checkpoints(run)):
        try:
            return read_checkpoint(path)
        except InputError as error:
            errors.append(error)
            logger.warning("%s; trying the checkpoint before it", error)
    if errors or resume != "auto":
        newest = f" (the newest: {errors[0]})" if errors else "; none, auto, a checkpoint or a run is wanted"
        raise InputError(f"resume is {resume!r}: {run} holds no whole checkpoint{newest}; another --out starts anew")
    return None


def progress_of(
    checkpoint: Checkpoint, config: TrainConfig, data: Mapping[str, Fingerprint], objective: nn.Module
) -> Progress:
    """Where a run goes on; rank 0 warns of what changes the course of the training.

    InputError for other training pairs, another objective or model; Ended where nothing is left to do.
    """
    state, progress = checkpoint.state, checkpoint.progress
    changed = differences(state["data"][TRAINING], data[TRAINING])
    others = f"the training pairs are not those of this checkpoint's run ({'; '.join(changed)})"
    refuse([(changed, f"{checkpoint.path}: {others}; start from its weights with --init {checkpoint.path}")])
    said = list(_changes(checkpoint, config))
    # A validation that later ones can be compared with: by the same pairs in the same batches.
    has_best = progress.stale and find_best(config.save.out, config.save.best, measured(config, data)) is not None
    whole = is_whole(config.run, progress)
    if whole or (has_best and 0 < config.run.patience <= progress.stale):
        _load_objective(checkpoint, objective)
        raise Ended(
            RunResult(
                run=checkpoint.path.parent.parent,
                steps=progress.step,
                epochs=progress.epoch,
                samples_seen=progress.samples_seen,
                seconds=progress.seconds,
                loss=None,
                checkpoint=checkpoint.path,
                already_finished=True,
                out_of_patience=not whole,
            )
        )
    processes, size = len(state["rng"]), state["batch_size"]
    if processes != world_size():
        goes_on = "the data go on where they were, sums may round differently"
        said.append(f"{world_size()} processes instead of {processes}: {goes_on}")
    if size != config.run.batch_size:
        goes_on = "the data go on where they were, the learning rate where a run of that batch size would be"
        said.append(f"batch size {config.run.batch_size} instead of {size}: {goes_on}")
    if progress.stale and not has_best:
        said.append("held-out pairs that none of its validations was made with: --patience begins anew")
        progress = replace(progress, stale=0)
    if rank() != 0:  # the counts of bad samples are summed over ranks, so one rank keeps them
        return replace(progress, reasons={})
    for line in said:
        logger.warning("resumed with %s", line)
    return progress


def _changes(checkpoint: Checkpoint, config: TrainConfig) -> Iterator[str]:
    """What differs from the checkpoint's run and changes the course of the training."""
    file = checkpoint.path.parent.parent / RUN_CONFIG_FILE
    if not file.is_file():
        return
    before = TrainConfig.from_json(file).to_dict()
    for part, leaves in config.to_dict().items():
        for leaf, now in leaves.items():
            then = before[part][leaf]
            # A temperature is kept as its logarithm: read back, it may differ in the last digit.
            floats = isinstance(then, float) and isinstance(now, float)
            same = math.isclose(then, now, rel_tol=1e-6) if floats else then == now
            if part in _FREE_PARTS or leaf in _FREE.split() or same:
                continue
            other = part in ("loss", "align") or leaf in ("model", "image_size")
            advice = f"resume with the same, or start from the weights with --init {checkpoint.path}"
            refuse([(other, f"{checkpoint.path}: was trained with {part}.{leaf} = {then!r}, not {now!r}; {advice}")])
            yield f"another {part}.{leaf}: {now!r} instead of {then!r}"


def restore(checkpoint: Checkpoint, stepper: Stepper) -> None:
    """Loads weights, objective, optimiser and loss scale of a checkpoint into a freshly built stepper."""
    encoder, optimizer, scaler = stepper.module.encoder, stepper.optimizer, stepper.scaler
    _load_objective(checkpoint, stepper.module.objective)
    with _other_parameters(checkpoint):
        sharding.load_whole(encoder, checkpoint.encoder.state_dict())
        sharding.load_whole_optimizer(optimizer, checkpoint.state["optimizer"])
    # An option is the configuration's where that changed; all else is the checkpoint's: some optimisers count in there.
    for group, now, then in zip(optimizer.param_groups, stepper.options, checkpoint.state["options"], strict=True):
        group.update({key: value for key, value in now.items() if key not in then or then[key] != value})
    if scaler.is_enabled() and checkpoint.state["scaler"]:  # precision may have changed
        scaler.load_state_dict(checkpoint.state["scaler"])


def _load_objective(checkpoint: Checkpoint, objective: nn.Module) -> None:
    with _other_parameters(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("error", FixedScaleWarning)
        objective.load_state_dict(checkpoint.state["objective"])


@contextlib.contextmanager
def _other_parameters(checkpoint: Checkpoint) -> Iterator[None]:
    """The error of a state that does not go into what was built."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, FixedScaleWarning) as error:
        said = f"was trained with other parameters, or is damaged ({one_line(error, 200)})"
        raise InputError(f"{checkpoint.path}: {said}") from error
