"""Checkpoints: written whole or not at all, and holding everything that the next step depends on.

``checkpoints/step-00000100/`` holds

- ``model/``: an open_clip ``local-dir:`` folder, what people load: the exact float32 weights;
- ``trainer.pt``: all else that is resumed (tensors and plain types only, read with ``weights_only=True``);
- ``validation.json``: how good ``model/`` is, when it was judged on held-out pairs.

The newest ``keep`` stay, and the best one by its validation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cloob.data.fingerprint import Fingerprint, digest
from cloob.distributed import gather_objects, on_rank_zero, rank
from cloob.errors import InputError, one_line
from cloob.files import flush
from cloob.models.folder import save_model
from cloob.models.runs import (
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    TRAINER_FILE,
    VALIDATION_FILE,
    checkpoint_name,
    find_best,
    is_better,
    list_checkpoints,
    weights_file,
)
from cloob.training import sharding
from cloob.training.config import TrainConfig
from cloob.training.progress import Progress
from cloob.training.step import Stepper

TRAINING, HELD_OUT = "training pairs", "held-out pairs"
"""The two sets of pairs whose fingerprints a checkpoint keeps."""


def measured(config: TrainConfig, data: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """What validations are comparable by: the size of the batches, and the held-out pairs if there are any."""
    held_out = digest([json.dumps(data[HELD_OUT], sort_keys=True)]) if HELD_OUT in data else None
    return {"batch_size": config.run.batch_size, "held_out": held_out}


def weights_digest(checkpoint: Path) -> str:
    """A digest of the weights file, by which a resumed run notices damage: a safetensors file has no checksum."""
    path = weights_file(checkpoint / MODEL_FOLDER)
    assert path is not None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


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
        best, value = on_rank_zero(lambda: find_best(run, metric, self._measured)), metrics[metric]
        return value is not None and (best is None or is_better(metric, value, best[1]))

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
            save_model(folder / MODEL_FOLDER, encoder, towers.objective.config() | {"hopfield": hopfield}, weights)
            state["weights"] = weights_digest(folder)
            if validation is not None:
                (folder / VALIDATION_FILE).write_text(json.dumps(validation, indent=2) + "\n", encoding="utf-8")
            with (folder / TRAINER_FILE).open("wb") as file:  # torch's own writer says no reason of the disk's
                torch.save(state, file)

        save = self.config.save
        self.last = on_rank_zero(lambda: _write(save.out, progress.step, write, keep=save.keep))
        self._saved = progress.step, progress.epoch
        return self.last


def _write(run: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Writes a checkpoint under a temporary name, flushes it, then renames it; keeps the last ``keep`` and the best."""
    folder = run / CHECKPOINTS_FOLDER
    final = folder / checkpoint_name(step)
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
        before = list_checkpoints(run)
        kept = f"the last whole checkpoint is {before[-1]}" if before else "there is no earlier checkpoint"
        raise InputError(f"{final}: checkpoint cannot be written ({reason}); {kept}") from error
    finally:
        remove_leftovers(run)
    if keep:
        best = find_best(run)
        for old in list_checkpoints(run)[:-keep]:
            if best is None or old != best[0]:
                # Renamed first: a folder with its final name is always whole.
                shutil.rmtree(old.rename(_hidden(old)), ignore_errors=True)
    return final


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".tmp-old-{checkpoint.name}-{os.getpid()}")


def remove_leftovers(run: Path) -> None:
    """Removes what an interrupted write left behind."""
    for path in (run / CHECKPOINTS_FOLDER).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of python's, numpy's and torch's generators, as tensors and plain types."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (towers may use the global one)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Keeps what runs inside (loaders, callbacks) from moving the generators that training depends on."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


def seed_generators(seed: int, states: list[dict[str, Any]], device: torch.device) -> None:
    """Sets this rank's generators to its checkpoint's ``states``, or freshly to ``seed`` + rank if there are none."""
    seed += rank()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (whatever a tower may draw from)
    if rank() < len(states):
        set_rng_state(states[rank()], device)
