"""Checkpoints: complete or absent, with everything that the next step depends on.

``checkpoints/step-00000100/`` holds

- ``model/``: an open_clip ``local-dir:`` folder with the exact float32 weights;
- ``ema/``: another, with the moving average of the weights, where the configuration has
  ``ema``;
- ``trainer.pt``: all else that is resumed (tensors and plain types, read with
  ``weights_only=True``);
- ``shards/``: with FSDP weights and moments in the safetensors files of
  ``torch.distributed.checkpoint``;
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

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
from cloob.training.progress import Progress, rng_state
from cloob.training.step import Stepper

logger = logging.getLogger(__name__)

TRAINING, HELD_OUT = (
    "training pairs",
    "held-out pairs",
)  # whose fingerprints a checkpoint stores


def measured(config: TrainConfig, data: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """What validations are comparable by: the size of the batches, and the held-out
    pairs if there are any.
    """
    held_out = (
        digest([json.dumps(data[HELD_OUT], sort_keys=True)])
        if HELD_OUT in data
        else None
    )
    return {"batch_size": config.batch_size, "held_out": held_out}


def weights_digest(checkpoint: Path) -> str:
    """A digest of the weights files, by which a resumed run notices damage: a
    safetensors file has no checksum.
    """
    files = [
        runs.weights_file(checkpoint / folder)
        for folder in (runs.MODEL_FOLDER, runs.EMA_FOLDER)
    ]
    contents = hashlib.blake2b()
    for path in filter(
        None, (*files, *sorted((checkpoint / runs.SHARDS_FOLDER).glob("*")))
    ):
        with path.open("rb") as file:
            contents.update(hashlib.file_digest(file, "blake2b").digest())
    return contents.hexdigest()


@dataclass
class Snapshot:
    """All that a checkpoint consists of but for shards."""

    encoder: Any
    weights: dict[str, Tensor] | None  # of the encoder, where it is sharded
    average: Any  # the encoder of averaged weights
    settings: dict[str, Any]  # of the objective
    state: dict[str, Any]  # of ``trainer.pt``
    validation: dict[str, Any] | None

    def read_weights(self, shards: Path, group: dist.ProcessGroup | None) -> None:
        """Fills the weights from the shards of all ranks."""
        targets = {f"weights.{name}": to for name, to in (self.weights or {}).items()}
        sharding.read_shards(shards, targets, group)

    def write(self, folder: Path) -> None:
        """Writes the files of a checkpoint folder."""
        model = folder / runs.MODEL_FOLDER
        save_model(model, self.encoder, self.settings, self.weights)
        if self.average is not None:
            save_model(folder / runs.EMA_FOLDER, self.average, self.settings)
        self.state["weights"] = weights_digest(folder)
        if self.validation is not None:
            text = json.dumps(self.validation, indent=2) + "\n"
            (folder / runs.VALIDATION_FILE).write_text(text, encoding="utf-8")
        # torch's writer of a path reports no reason of the disk
        with (folder / runs.TRAINER_FILE).open("wb") as file:
            torch.save(self.state, file)


class Saver:
    """Writes the checkpoints of one run, shards during the training; ``notify`` gets
    the path of every one.
    """

    def __init__(
        self,
        config: TrainConfig,
        stepper: Stepper,
        data: Mapping[str, Fingerprint],
        resumed: Path | None,
    ) -> None:
        self.config, self.stepper, self.data = config, stepper, data
        self.last = resumed
        self.notify: Callable[[Path], object] = lambda path: None
        self._saved: tuple[int, int] | None = None
        self._measured = measured(config, data)
        self._validation: tuple[int, dict[str, float | None]] | None = None
        self.pending: Future[Path] | None = None  # one that is being written
        if sharding.is_sharded(stepper.module.encoder):
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            self._ranks, self._alone = (
                dist.new_group(backend="gloo"),
                dist.new_group([0], backend="gloo"),
            )

    def judged(self, step: int, metrics: dict[str, float | None]) -> bool:
        """Whether the weights after ``step`` are better than those of every
        checkpoint.
        """
        self.finish()
        self._validation = step, metrics
        run, metric = self.config.out, self.config.best
        best, value = (
            on_rank_zero(lambda: runs.find_best(run, metric, self._measured)),
            metrics.get(metric),
        )
        return value is not None and (
            best is None or runs.is_better(metric, value, best[1])
        )

    def save(self, progress: Progress, order: Any, *, hopfield: bool) -> None:
        """Writes a checkpoint of this step, unless there is one; every rank calls it.

        ``order``: what the epoch's order depends on beside the seed.

        Weights after a loss that was not finite must not push the good checkpoints out.
        """
        if (progress.step, progress.epoch) == self._saved or progress.nonfinite:
            return
        self.finish()
        name = runs.CHECKPOINT.format(progress.step)
        final = self.config.out / runs.CHECKPOINTS_FOLDER / name
        folder = final.with_name(f".tmp-{final.name}")
        shards = self._begin_shards(final, folder)
        snapshot = self._snapshot(progress, order, hopfield, sharded=shards is not None)
        self._saved = progress.step, progress.epoch

        def write() -> None:
            if shards is not None:
                shards.result()
                snapshot.read_weights(folder / runs.SHARDS_FOLDER, self._alone)
            snapshot.write(folder)

        complete = partial(_complete, final, folder, write, self.config.keep)
        if shards is None:
            self.last = on_rank_zero(complete)
            self.notify(self.last)
        else:
            self.pending = self._thread.submit(complete) if rank() == 0 else shards

    def _begin_shards(self, final: Path, folder: Path) -> Future[Any] | None:
        """Begins to write this rank's shards into the temporary folder, if the towers
        are sharded.
        """
        encoder = self.stepper.module.encoder
        if not sharding.is_sharded(encoder):
            return None
        with _written(final):
            on_rank_zero(partial(folder.mkdir, parents=True, exist_ok=True))
        return sharding.write_shards(
            folder / runs.SHARDS_FOLDER, encoder, self.stepper.optimizer, self._ranks
        )

    def _snapshot(
        self, progress: Progress, order: Any, hopfield: bool, *, sharded: bool
    ) -> Snapshot:
        """What a checkpoint of this moment consists of; called on every rank."""
        stepper, average = self.stepper, self.stepper.average
        encoder: Any = stepper.module.encoder
        objective = stepper.module.objective
        moments = stepper.optimizer.state_dict()
        weights: dict[str, Tensor] | None = None
        if sharded:
            moments["state"] = {}
            # Shapes alone, read here: towers that compute at the same time must not
            # give their state.
            weights = {
                name: torch.empty(value.shape, dtype=value.dtype)
                for name, value in encoder.state_dict().items()
            }
        state = {
            "optimizer": moments,
            "options": stepper.options,
            "scaler": stepper.scaler.state_dict(),
            "objective": copy.deepcopy(objective.state_dict()),
            "progress": dict(vars(progress)),
            "order": order,
            "rng": gather_objects(rng_state(stepper.device)),
            "batch_size": self.config.batch_size,
            "data": dict(self.data),
        }
        settings = objective.config()  # none of a caller's loss
        if settings:
            settings["hopfield"] = hopfield
        averaged: Any = None if average is None else average.encoder
        validation = self._validation_of(progress.step)
        return Snapshot(encoder, weights, averaged, settings, state, validation)

    def _validation_of(self, step: int) -> dict[str, Any] | None:
        """What ``validation.json`` of this step says, if its weights were judged."""
        if self._validation is None or self._validation[0] != step:
            return None
        found = {"step": step, "metric": self.config.best, **self._validation[1]}
        return found | self._measured

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if there is one; InputError
        where that failed.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.exception()  # of another rank, which rank 0 knows
            self.last = on_rank_zero(pending.result)
            self.notify(self.last)


@contextlib.contextmanager
def _written(final: Path) -> Iterator[None]:
    """Turns an error of the disk into an InputError that names the last complete
    checkpoint.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        cause: BaseException = (
            error if isinstance(error, OSError) else error.__context__ or error
        )  # torch hides it
        if isinstance(error, CheckpointException):  # the first rank's
            cause = next(iter(error.failures.values()))[0]
        reason = (
            cause.strerror
            if isinstance(cause, OSError) and cause.strerror
            else one_line(cause)
        )
        before = runs.list_checkpoints(final.parent.parent)
        kept = (
            f"the last complete checkpoint is {before[-1]}"
            if before
            else "there is no earlier checkpoint"
        )
        raise InputError(
            f"{final}: checkpoint cannot be written ({reason}); {kept}"
        ) from error


def _complete(final: Path, folder: Path, write: Callable[[], None], keep: int) -> Path:
    """Writes into a temporary folder, flushes it, then renames it; keeps the last
    ``keep`` checkpoints and the best.
    """
    run = final.parent.parent
    try:
        with _written(final):
            folder.mkdir(parents=True, exist_ok=True)
            write()
            flush(*folder.rglob("*"), folder)
            # of a run that was stopped while it validated, or one that could not be
            # read
            if final.exists():
                final.rename(_hidden(final))
            folder.rename(final)
            flush(folder.parent)
    finally:
        remove_leftovers(run)
    best = runs.find_best(run)
    for old in runs.list_checkpoints(run)[:-keep] if keep else ():
        if (
            best is None or old != best[0]
        ):  # renamed first: a folder with a final name is always complete
            shutil.rmtree(old.rename(_hidden(old)), ignore_errors=True)
    return final


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".tmp-old-{checkpoint.name}-{os.getpid()}")


def remove_leftovers(run: Path) -> None:
    for path in (run / runs.CHECKPOINTS_FOLDER).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    weights: (
        dict[str, Tensor] | None
    )  # of the encoder, from ``model/``; None: they are in shards
    average: dict[str, Tensor] | None  # from ``ema/``
    state: dict[str, Any]  # what ``trainer.pt`` holds
    progress: Progress  # as it was written


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder; InputError for a file that is missing, cut short or of
    another format.
    """
    file = path / runs.TRAINER_FILE
    try:
        check_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights = (
            None
            if (path / runs.SHARDS_FOLDER).is_dir()
            else _read_weights(path / runs.MODEL_FOLDER)
        )
        if state["weights"] != weights_digest(path):
            damaged = (
                path / runs.SHARDS_FOLDER
                if weights is None
                else runs.weights_file(path / runs.MODEL_FOLDER)
            )
            raise InputError(
                f"{damaged}: damaged, its digest is not the one in {file.name}"
            )
        average = (
            _read_weights(path / runs.EMA_FOLDER)
            if (path / runs.EMA_FOLDER).is_dir()
            else None
        )
        return Checkpoint(path, weights, average, state, Progress(**state["progress"]))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); use an earlier checkpoint"
        ) from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (
        runs.config_file(folder).name == runs.MODULE_FILE
    ):  # a caller's, which nobody can build from its file
        return {
            f"model.{name}": value
            for name, value in read_safetensors(
                folder / runs.TOWERS_WEIGHTS_FILE
            ).items()
        }
    return dict(load_model(str(folder), device="cpu").state_dict())


def find_checkpoint(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint of a run or of a path to resume from, None to start afresh; the
    same on every rank.
    """
    if resume == "none":
        return None
    read: list[Checkpoint] = []  # on rank 0

    def choose() -> Path | None:
        found = _resumable(run, resume)
        if found is not None:
            read.append(found)
        return None if found is None else found.path

    chosen = on_rank_zero(choose)
    if chosen is None:
        return None
    return read[0] if read else read_checkpoint(chosen)


def _resumable(run: Path, resume: str) -> Checkpoint | None:
    """The named checkpoint, else the newest of a run that can be read; None where
    ``auto`` finds none.
    """
    place = run if resume == "auto" else Path(resume)
    if resume != "auto" and (place / runs.TRAINER_FILE).is_file():
        return read_checkpoint(place)
    first: InputError | None = None
    for path in reversed(runs.list_checkpoints(place)):
        try:
            return read_checkpoint(path)
        except InputError as error:
            first = first or error
            logger.warning("%s; trying the checkpoint before it", error)
    if first is None and resume == "auto":
        return None
    newest = "; expected: none, auto, a checkpoint or a run"
    if first is not None:
        newest = f" (the newest: {first})"
    raise InputError(
        f"resume is {resume!r}: {place} has no complete checkpoint{newest}; another"
        " --out starts anew"
    )


def restore(checkpoint: Checkpoint, stepper: Stepper) -> None:
    """Loads weights, objective, optimiser and loss scale of a checkpoint into a freshly
    built stepper.
    """
    encoder, optimizer, scaler = (
        stepper.module.encoder,
        stepper.optimizer,
        stepper.scaler,
    )
    load_objective(checkpoint, stepper.module.objective)
    with _other_parameters(checkpoint):
        if checkpoint.weights is None:
            groups = checkpoint.state["optimizer"]["param_groups"]
            sharding.load_shards(
                checkpoint.path / runs.SHARDS_FOLDER, encoder, optimizer, groups
            )
        else:
            sharding.load_whole(encoder, checkpoint.weights)
            sharding.load_whole_optimizer(optimizer, checkpoint.state["optimizer"])
        if stepper.average is not None and checkpoint.average is not None:
            stepper.average.encoder.load_state_dict(checkpoint.average)
            stepper.average.begun = True
    # An option is the configuration's where that changed; all else is the checkpoint's:
    # some optimisers count in there.
    for group, now, then in zip(
        optimizer.param_groups,
        stepper.options,
        checkpoint.state["options"],
        strict=True,
    ):
        group.update(
            {
                key: value
                for key, value in now.items()
                if key not in then or then[key] != value
            }
        )
    if scaler.is_enabled() and checkpoint.state["scaler"]:  # precision may have changed
        scaler.load_state_dict(checkpoint.state["scaler"])


def load_objective(checkpoint: Checkpoint, objective: nn.Module) -> None:
    with _other_parameters(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("error", FixedScaleWarning)
        objective.load_state_dict(checkpoint.state["objective"])


@contextlib.contextmanager
def _other_parameters(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns the error of a state that does not fit into an InputError."""
    try:
        yield
    except (
        Exception
    ) as error:  # torch, its checkpoints and a caller's parts raise many kinds
        reason = (
            next(iter(error.failures.values()))[0]
            if isinstance(error, CheckpointException)
            else error
        )
        message = (
            "was trained with other parameters, or is damaged"
            f" ({one_line(reason, 200)})"
        )
        raise InputError(f"{checkpoint.path}: {message}") from error
