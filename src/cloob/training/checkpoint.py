"""Checkpoints: written whole or not at all, and holding everything that the next step depends on.

``checkpoints/step-00000100/`` holds

- ``model/``: an open_clip ``local-dir:`` folder, what people load: the exact float32 weights;
- ``ema/``: another, with the moving average of the weights, where the configuration has ``ema``;
- ``trainer.pt``: all else that is resumed (tensors and plain types only, read with ``weights_only=True``);
- ``validation.json``: how good ``model/`` is, when it was judged on held-out pairs.

The newest ``keep`` stay, and the best one by its validation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.data.source import Fingerprint, digest
from cloob.distributed import gather_objects, on_rank_zero
from cloob.errors import InputError, one_line
from cloob.files import flush
from cloob.models import runs
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.weights.containers import check_zip, read_safetensors
from cloob.scales import FixedScaleWarning
from cloob.training import sharding
from cloob.training.config import TrainConfig
from cloob.training.progress import Progress, rng_state
from cloob.training.step import Stepper

logger = logging.getLogger(__name__)

TRAINING, HELD_OUT = "training pairs", "held-out pairs"
"""The two sets of pairs whose fingerprints a checkpoint keeps."""


def measured(config: TrainConfig, data: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """What validations are comparable by: the size of the batches, and the held-out pairs if there are any."""
    held_out = digest([json.dumps(data[HELD_OUT], sort_keys=True)]) if HELD_OUT in data else None
    return {"batch_size": config.run.batch_size, "held_out": held_out}


def weights_digest(checkpoint: Path) -> str:
    """A digest of the weights files, by which a resumed run notices damage: a safetensors file has no checksum."""
    files = [runs.weights_file(checkpoint / folder) for folder in (runs.MODEL_FOLDER, runs.EMA_FOLDER)]
    contents = hashlib.blake2b()
    for path in filter(None, files):
        with path.open("rb") as file:
            contents.update(hashlib.file_digest(file, "blake2b").digest())
    return contents.hexdigest()


class Saver:
    """Writes the checkpoints of one run, and knows the last (or the one it was resumed from) and the best."""

    def __init__(
        self, config: TrainConfig, stepper: Stepper, data: Mapping[str, Fingerprint], resumed: Path | None
    ) -> None:
        self.config, self.stepper, self.data = config, stepper, data
        self.last = resumed
        self._saved: tuple[int, int] | None = None
        self._measured = measured(config, data)
        self._validation: tuple[int, dict[str, float | None]] | None = None

    def judged(self, step: int, metrics: dict[str, float | None]) -> bool:
        """Whether the weights after ``step`` are better than those of every checkpoint."""
        self._validation = step, metrics
        run, metric = self.config.save.out, self.config.save.best
        best, value = on_rank_zero(lambda: runs.find_best(run, metric, self._measured)), metrics[metric]
        return value is not None and (best is None or runs.is_better(metric, value, best[1]))

    def save(self, progress: Progress, *, hopfield: bool) -> Path | None:
        """Writes a checkpoint of this step, unless there is one or the loss is not finite just now.

        If it stays so, the weights may be at fault: they must not push the good checkpoints out. One that was written
        at the end of an epoch before it was validated is written again. Every rank calls this, as each holds a part of
        the state; ``hopfield``: whether the objective retrieved at the last step.
        """
        if (progress.step, progress.epoch) == self._saved or progress.nonfinite:
            return None
        towers = self.stepper.module
        encoder: Any = towers.encoder
        average = self.stepper.average
        weights, moments = sharding.whole_state(encoder, self.stepper.optimizer)
        state = {
            "optimizer": moments,
            "options": self.stepper.options,
            "scaler": self.stepper.scaler.state_dict(),
            "objective": towers.objective.state_dict(),
            "progress": dict(vars(progress)),
            "rng": gather_objects(rng_state(self.stepper.device)),  # of every rank
            "batch_size": self.config.run.batch_size,
            "data": dict(self.data),
        }
        validation: dict[str, Any] | None = None
        if self._validation is not None and self._validation[0] == progress.step:
            metric = self.config.save.best
            validation = {"step": progress.step, "metric": metric, **self._validation[1], **self._measured}

        def write(folder: Path) -> None:
            settings = towers.objective.config()  # none of a caller's loss
            settings |= {"hopfield": hopfield} if settings else {}
            save_model(folder / runs.MODEL_FOLDER, encoder, settings, weights)
            if average is not None:
                save_model(folder / runs.EMA_FOLDER, average.encoder, settings)
            state["weights"] = weights_digest(folder)
            if validation is not None:
                (folder / runs.VALIDATION_FILE).write_text(json.dumps(validation, indent=2) + "\n", encoding="utf-8")
            with (folder / runs.TRAINER_FILE).open("wb") as file:  # torch's own writer says no reason of the disk's
                torch.save(state, file)

        save = self.config.save
        self.last = on_rank_zero(lambda: _write(save.out, progress.step, write, keep=save.keep))
        self._saved = progress.step, progress.epoch
        return self.last


def _write(run: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Writes a checkpoint under a temporary name, flushes it, then renames it; keeps the last ``keep`` and the best."""
    folder = run / runs.CHECKPOINTS_FOLDER
    final = folder / runs.checkpoint_name(step)
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        flush(*temporary.rglob("*"), temporary)
        if final.exists():  # of a run that was stopped while it validated, or one that could not be read
            final.rename(_hidden(final))
        temporary.rename(final)
        flush(folder)
    except (OSError, RuntimeError) as error:
        # torch's writer hides the disk's own error.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else one_line(cause)
        before = runs.list_checkpoints(run)
        kept = f"the last whole checkpoint is {before[-1]}" if before else "there is no earlier checkpoint"
        raise InputError(f"{final}: checkpoint cannot be written ({reason}); {kept}") from error
    finally:
        remove_leftovers(run)
    if keep:
        best = runs.find_best(run)
        for old in runs.list_checkpoints(run)[:-keep]:
            if best is None or old != best[0]:
                # Renamed first: a folder with its final name is always whole.
                shutil.rmtree(old.rename(_hidden(old)), ignore_errors=True)
    return final


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".tmp-old-{checkpoint.name}-{os.getpid()}")


def remove_leftovers(run: Path) -> None:
    """Removes what an interrupted write left behind."""
    for path in (run / runs.CHECKPOINTS_FOLDER).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    path: Path
    weights: dict[str, Tensor]  # of the encoder, from ``model/``
    average: dict[str, Tensor] | None  # from ``ema/``
    state: dict[str, Any]  # what ``trainer.pt`` holds
    progress: Progress  # as it was written


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder; InputError for a file that is missing, cut short or of another format."""
    file = path / runs.TRAINER_FILE
    try:
        check_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights = _read_weights(path / runs.MODEL_FOLDER)
        if state["weights"] != weights_digest(path):
            damaged = runs.weights_file(path / runs.MODEL_FOLDER)
            raise InputError(f"{damaged}: damaged, its digest is not the one in {file.name}")
        average = _read_weights(path / runs.EMA_FOLDER) if (path / runs.EMA_FOLDER).is_dir() else None
        return Checkpoint(path, weights, average, state, Progress(**state["progress"]))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: cannot be read ({one_line(error)}); use an earlier checkpoint") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if runs.config_file(folder).name == runs.MODULE_FILE:  # a caller's, which nobody can build from its file
        return {f"model.{name}": value for name, value in read_safetensors(folder / runs.TOWERS_WEIGHTS_FILE).items()}
    return dict(load_model(str(folder), device="cpu").state_dict())


def find_checkpoint(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint of a run or of a path to resume from, None to start afresh; the same on every rank."""
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
    if resume != "auto" and (run / runs.TRAINER_FILE).is_file():
        return read_checkpoint(run)
    errors: list[InputError] = []
    for path in reversed(runs.list_checkpoints(run)):
        if (path / runs.JOINED_FILE).is_file():
            continue
        try:
            return read_checkpoint(path)
        except InputError as error:
            errors.append(error)
            logger.warning("%s; trying the checkpoint before it", error)
    if errors or resume != "auto":
        newest = f" (the newest: {errors[0]})" if errors else "; none, auto, a checkpoint or a run is wanted"
        raise InputError(f"resume is {resume!r}: {run} holds no whole checkpoint{newest}; another --out starts anew")
    return None


def restore(checkpoint: Checkpoint, stepper: Stepper) -> None:
    """Loads weights, objective, optimiser and loss scale of a checkpoint into a freshly built stepper."""
    encoder, optimizer, scaler = stepper.module.encoder, stepper.optimizer, stepper.scaler
    load_objective(checkpoint, stepper.module.objective)
    with _other_parameters(checkpoint):
        sharding.load_whole(encoder, checkpoint.weights)
        sharding.load_whole_optimizer(optimizer, checkpoint.state["optimizer"])
        if stepper.average is not None and checkpoint.average is not None:
            stepper.average.load(checkpoint.average)
    # An option is the configuration's where that changed; all else is the checkpoint's: some optimisers count in there.
    for group, now, then in zip(optimizer.param_groups, stepper.options, checkpoint.state["options"], strict=True):
        group.update({key: value for key, value in now.items() if key not in then or then[key] != value})
    if scaler.is_enabled() and checkpoint.state["scaler"]:  # precision may have changed
        scaler.load_state_dict(checkpoint.state["scaler"])


def load_objective(checkpoint: Checkpoint, objective: nn.Module) -> None:
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
