"""Checkpoints: complete or absent, with everything that the next step depends on.

``checkpoints/step-00000100/`` holds

- ``model/``: an open_clip ``local-dir:`` folder with the exact float32 weights;
- ``ema/``: another, with the moving average of the weights, where the configuration has
  ``ema``;
- ``trainer.pt``: all else that is resumed (tensors and plain types, read with
  ``weights_only=True``);
- ``validation.json``: how good ``model/`` is on held-out pairs.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from cloob.data.source import Fingerprint, digest
from cloob.distributed import gather_objects, on_rank_zero, rank
from cloob.errors import InputError, one_line
from cloob.files import flush
from cloob.models import runs
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.weights.containers import check_zip, read_safetensors
from cloob.scales import FixedScaleWarning
from cloob.training import sharding
from cloob.training.config import TrainConfig
from cloob.training.generators import RngState, rng_state
from cloob.training.progress import Progress
from cloob.training.sharding import OptimizerState
from cloob.training.step import Stepper

logger = logging.getLogger(__name__)
# whose fingerprints a checkpoint stores
TRAINING = "training pairs"
HELD_OUT = "held-out pairs"


class TrainerState(TypedDict):
    """What ``trainer.pt`` holds."""

    optimizer: OptimizerState
    options: list[dict[str, object]]  # of the optimiser's groups, as configured
    objective: dict[str, Tensor]
    progress: dict[str, int | float | dict[str, int]]
    order: object  # what the epoch's order depends on beside the seed
    rng: list[RngState]  # of every rank
    data: dict[str, Fingerprint]
    weights: str  # the digest of the weights files


def weights_digest(checkpoint: Path) -> str:
    """A digest of the weights files, by which a resumed run notices damage: a
    safetensors file has no checksum.
    """
    folders = (checkpoint / runs.MODEL_FOLDER, checkpoint / runs.EMA_FOLDER)
    files = [file for file in map(runs.weights_file, folders) if file is not None]
    contents = hashlib.blake2b()
    for path in files:
        with path.open("rb") as file:
            contents.update(hashlib.file_digest(file, "blake2b").digest())
    return contents.hexdigest()


class Saver:
    """Writes the checkpoints of one run; every rank has one."""

    def __init__(
        self,
        config: TrainConfig,
        stepper: Stepper,
        data: Mapping[str, Fingerprint],
    ) -> None:
        self.config, self.stepper, self.data = config, stepper, data
        self.last: Path | None = None  # the newest checkpoint
        self._saved: tuple[int, int] | None = None
        # validations are comparable by the size of batches and the held-out pairs
        self._measured: dict[str, object] = {"batch_size": config.batch_size}
        if HELD_OUT in data:
            fingerprint = json.dumps(data[HELD_OUT], sort_keys=True)
            self._measured["held_out"] = digest([fingerprint])
        self._validation: dict[str, object] = {}  # of the step that it names
        self._options: list[dict[str, object]] = [  # as configured
            {key: value for key, value in group.items() if key != "params"}
            for group in stepper.optimizer.param_groups
        ]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Loads weights, objective and optimiser of a checkpoint into the freshly built
        stepper.
        """
        stepper, state = self.stepper, checkpoint.state
        encoder, optimizer = stepper.module.encoder, stepper.optimizer
        self.last = checkpoint.path
        load_objective(checkpoint, stepper.module.objective)
        with _other_parameters(checkpoint):
            sharding.load_whole(encoder, checkpoint.weights)
            sharding.load_whole_optimizer(optimizer, state["optimizer"])
            if stepper.average is not None and checkpoint.average is not None:
                stepper.average.encoder.load_state_dict(checkpoint.average)
                stepper.average.begun = True
        # An option is the configuration's where that changed; all else is the
        # checkpoint's: some optimisers count in there.
        options = zip(self._options, state["options"], strict=True)
        for group, (now, then) in zip(optimizer.param_groups, options, strict=True):
            for key, value in now.items():
                if key not in then or then[key] != value:
                    group[key] = value

    def is_best(self, step: int, metrics: Mapping[str, float | None]) -> bool:
        """Whether the weights after ``step`` are better than those of every
        checkpoint.
        """
        run, metric = self.config.out, self.config.best
        self._validation = {
            "step": step,
            "metric": metric,
            **metrics,
            **self._measured,
        }
        value = metrics.get(metric)
        best = on_rank_zero(lambda: runs.find_best(run, metric, self._measured))
        if value is None or best is None:
            return value is not None
        return runs.is_better(metric, value, best[1])

    def save(self, progress: Progress, order: object, *, hopfield: bool) -> bool:
        """Writes a checkpoint of this step, and says so, unless there is one; every
        rank calls it.

        ``order``: what the epoch's order depends on beside the seed.

        Weights after a loss that was not finite must not push the good checkpoints out.
        """
        if (progress.step, progress.epoch) == self._saved or progress.nonfinite:
            return False
        self._saved = progress.step, progress.epoch
        run = self.config.out
        name = runs.CHECKPOINT.format(progress.step)
        final = run / runs.CHECKPOINTS_FOLDER / name
        folder = final.with_name(f".tmp-{name}")
        with _written(final):
            state = self._state(progress, order)
            weights = sharding.whole(self.stepper.module.encoder.state_dict())
            on_rank_zero(lambda: self._write(folder, state, weights, hopfield))
            on_rank_zero(lambda: _publish(folder, final, self.config.keep))
        self.last = final
        return True

    def _state(self, progress: Progress, order: object) -> TrainerState:
        """Called on every rank."""
        stepper = self.stepper
        return {
            "optimizer": sharding.whole_optimizer(stepper.optimizer),
            "options": self._options,
            "objective": copy.deepcopy(stepper.module.objective.state_dict()),
            "progress": dict(vars(progress)),
            "order": order,
            "rng": gather_objects(rng_state(stepper.device)),
            "data": dict(self.data),
            "weights": "",  # they are written first
        }

    def _write(
        self,
        folder: Path,
        state: TrainerState,
        weights: dict[str, Tensor],
        hopfield: bool,
    ) -> None:
        """Writes the files of a checkpoint folder."""
        module, average = self.stepper.module, self.stepper.average
        settings = module.objective.config()  # none of a caller's loss
        if settings:
            settings["hopfield"] = hopfield
        save_model(folder / runs.MODEL_FOLDER, module.encoder, settings, weights)
        if average is not None:
            save_model(folder / runs.EMA_FOLDER, average.encoder, settings)
        if self._validation.get("step") == state["progress"]["step"]:
            text = json.dumps(self._validation, indent=2) + "\n"
            (folder / runs.VALIDATION_FILE).write_text(text, encoding="utf-8")
        state["weights"] = weights_digest(folder)
        # torch's writer of a path reports no reason of the disk
        with (folder / runs.TRAINER_FILE).open("wb") as file:
            torch.save(state, file)


@contextlib.contextmanager
def _written(final: Path) -> Iterator[None]:
    """Turns an error of the disk into an InputError that names the last complete
    checkpoint.
    """
    run = final.parent.parent
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # torch hides the disk's behind its own
        reason = getattr(cause, "strerror", None) or one_line(cause)
        earlier = runs.list_checkpoints(run)
        kept = "there is no earlier checkpoint"
        if earlier:
            kept = f"the last complete checkpoint is {earlier[-1]}"
        raise InputError(
            f"{final}: checkpoint cannot be written ({reason}); {kept}"
        ) from error
    finally:
        if rank() == 0:
            remove_leftovers(run)


def _publish(folder: Path, final: Path, keep: int) -> None:
    """Flushes a folder and gives it its name; keeps the last ``keep`` checkpoints and
    the best.

    What goes is renamed first: a folder with a final name is always complete.
    """
    run = final.parent.parent
    flush(*folder.rglob("*"), folder)
    if final.exists():  # of a run that was stopped while it validated, or unreadable
        final.rename(_hidden(final))
    folder.rename(final)
    flush(final.parent)
    best = runs.find_best(run)
    for old in runs.list_checkpoints(run)[:-keep] if keep else ():
        if best is None or old != best[0]:
            old.rename(_hidden(old))


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".tmp-old-{checkpoint.name}-{os.getpid()}")


def remove_leftovers(run: Path) -> None:
    for path in (run / runs.CHECKPOINTS_FOLDER).glob(".tmp-*step-*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    weights: dict[str, Tensor]  # of the encoder, from ``model/``
    average: dict[str, Tensor] | None  # from ``ema/``
    state: TrainerState
    progress: Progress  # as it was written


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder; InputError for a file that is missing, cut short or of
    another format.
    """
    file, model = path / runs.TRAINER_FILE, path / runs.MODEL_FOLDER
    ema = path / runs.EMA_FOLDER
    try:
        check_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights = _read_weights(model)
        if state["weights"] != weights_digest(path):
            raise InputError(
                f"{runs.weights_file(model)}: damaged, its digest is not the one in"
                f" {file.name}"
            )
        average = _read_weights(ema) if ema.is_dir() else None
        return Checkpoint(path, weights, average, state, Progress(**state["progress"]))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); use an earlier checkpoint"
        ) from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if runs.config_file(folder).name != runs.MODULE_FILE:
        return dict(load_model(str(folder), device="cpu").state_dict())
    # a caller's module, which nobody can build from its file
    weights = read_safetensors(folder / runs.TOWERS_WEIGHTS_FILE)
    return {f"model.{name}": value for name, value in weights.items()}


def find_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint to go on from, None to start afresh; the same on every rank."""
    if config.resume == "none":
        return None
    chosen = on_rank_zero(lambda: _newest_whole(config.out))
    return None if chosen is None else read_checkpoint(chosen)


def _newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that can be read; None where there are none at all."""
    first: InputError | None = None
    for path in reversed(runs.list_checkpoints(run)):
        try:
            return read_checkpoint(path).path
        except InputError as error:
            first = first or error
            logger.warning("%s; trying the checkpoint before it", error)
    if first is None:
        return None
    raise InputError(
        f"{run}: has no complete checkpoint (the newest: {first}); another --out starts"
        " anew"
    )


def load_objective(checkpoint: Checkpoint, objective: nn.Module) -> None:
    with _other_parameters(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("error", FixedScaleWarning)
        objective.load_state_dict(checkpoint.state["objective"])


@contextlib.contextmanager
def _other_parameters(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns the error of a state that does not fit into an InputError."""
    try:
        yield
    except Exception as error:  # torch and a caller's parts raise many kinds
        raise InputError(
            f"{checkpoint.path}: was trained with other parameters, or is damaged"
            f" ({one_line(error, 200)})"
        ) from error
