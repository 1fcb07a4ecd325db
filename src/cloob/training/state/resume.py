"""Where a run goes on: a checkpoint found, read, compared with the configuration and loaded into what was built."""

from __future__ import annotations

import contextlib
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cloob.data.fingerprint import Fingerprint
from cloob.distributed import rank, world_size
from cloob.errors import InputError, one_line
from cloob.models.load import load_model
from cloob.models.runs import (
    MODEL_FOLDER,
    TRAINER_FILE,
    list_checkpoints,
)
from cloob.models.untrusted import check_folder
from cloob.models.weights.containers import check_zip
from cloob.scales import FixedScaleWarning
from cloob.training.callbacks import RunResult
from cloob.training.config import TrainConfig
from cloob.training.course import is_whole
from cloob.training.ranks import on_rank_zero
from cloob.training.state.checkpoint import FORMAT, Checkpoint, Progress
from cloob.training.state.compare import check_same_architecture, check_same_objective, judged_otherwise
from cloob.training.state.rng import set_rng_state
from cloob.training.towers import fsdp as sharding
from cloob.training.towers.average import WeightAverage

logger = logging.getLogger(__name__)


class AlreadyFinished(Exception):  # noqa: N818 - an end, not an error
    """The run that was to go on has reached its end; raised on all ranks, before anything is written."""

    def __init__(self, checkpoint: Path, progress: Progress, *, out_of_patience: bool) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint
        self.progress = progress
        self.out_of_patience = out_of_patience

    def result(self) -> RunResult:
        """What the run had come to."""
        progress = self.progress
        return RunResult(
            run=self.checkpoint.parent.parent,
            steps=progress.step,
            epochs=progress.epoch,
            samples_seen=progress.samples_seen,
            seconds=progress.seconds,
            loss=None,
            checkpoint=self.checkpoint,
            already_finished=True,
            out_of_patience=self.out_of_patience,
        )


def stop_if_finished(
    checkpoint: Checkpoint,
    config: TrainConfig,
    data: Mapping[str, Fingerprint],
    steps_per_epoch: int,
    encoder: nn.Module,
    objective: nn.Module,
) -> None:
    """Looks whether a checkpoint leaves anything to do; if not, whether it is what the configuration asks for.

    Raises:
        InputError: It is not: the architecture or the objective is another.
        AlreadyFinished: The run has its whole length, or the patience was used up by looks that this run's can be
            compared with.
    """
    progress = checkpoint.progress
    whole = is_whole(config.run, progress, steps_per_epoch)
    stale = 0 < config.run.patience <= progress.stale and judged_otherwise(checkpoint, config, data) is None
    if not whole and not stale:
        return
    check_same_architecture(checkpoint, encoder)
    check_same_objective(checkpoint, config)
    _load_objective(checkpoint, objective)
    raise AlreadyFinished(checkpoint.path, progress, out_of_patience=not whole)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder; InputError for a file that is missing, cut short or of another format."""
    file = path / TRAINER_FILE
    if not file.is_file():
        raise InputError(f"{path}: holds no trainer.pt; resuming needs a checkpoint folder such as step-00000100")
    check_folder(path / MODEL_FOLDER)
    check_zip(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        Progress(**state["progress"])
        same_format = state["format"] == FORMAT
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{file}: cannot be read ({one_line(error, 200)}); use an earlier checkpoint") from error
    if not same_format:
        raise InputError(f"{file}: is not of format {FORMAT}, which this version reads")
    try:
        encoder = load_model(str(path / MODEL_FOLDER), device="cpu")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path / 'model'}: cannot be read ({one_line(error, 200)})") from error
    return Checkpoint(path, encoder, state)


def find_checkpoint(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to resume from, None to start afresh.

    ``resume`` is ``"none"``, ``"auto"`` (the newest readable checkpoint of ``run``, if any; unreadable ones are passed
    over with a warning), or the path of a checkpoint or a run folder.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            raise InputError(f"resume is {resume!r}: no such folder; give none, auto, a checkpoint or a run")
        if (path / TRAINER_FILE).is_file():
            return read_checkpoint(path)
        run = path
        if not list_checkpoints(run):
            raise InputError(f"{path}: holds no whole checkpoint; resuming needs a checkpoint or a run folder")
    checkpoints = list_checkpoints(run)
    reasons: list[InputError] = []
    for path in reversed(checkpoints):
        try:
            return read_checkpoint(path)
        except InputError as error:
            reasons.append(error)
            logger.warning("%s; trying the checkpoint before it", error)
    if reasons:
        raise InputError(
            f"{run}: none of its {len(checkpoints)} checkpoints can be used; the newest: {reasons[0]}; another --out "
            "starts anew"
        )
    return None


def find_checkpoint_on_every_rank(run: Path, resume: str) -> Checkpoint | None:
    """As ``find_checkpoint``, with rank 0's choice on all ranks: they must read the same one."""
    if resume != "none" and world_size() > 1:

        def choose() -> str:
            checkpoint = find_checkpoint(run, resume)
            return "none" if checkpoint is None else str(checkpoint.path)

        resume = str(on_rank_zero(choose))
    return find_checkpoint(run, resume)


def restore(
    checkpoint: Checkpoint,
    *,
    encoder: nn.Module,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> None:
    """Loads weights, optimiser and objective of a checkpoint into freshly built ones.

    An average goes on from the checkpoint's, or starts from its weights when it has none.

    Raises:
        InputError: The checkpoint is of another architecture or objective.
    """
    check_same_architecture(checkpoint, encoder)
    sharded = sharding.is_sharded(encoder)
    with _other_parameters(checkpoint):
        (sharding.load_whole if sharded else type(encoder).load_state_dict)(encoder, checkpoint.weights)
    if average is not None:
        averaged = checkpoint.state.get("average")
        average.restore(checkpoint.encoder.state_dict(), averaged["updates"] if averaged else 0)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    _load_objective(checkpoint, objective)
    with _other_parameters(checkpoint):
        sharding.load_whole_optimizer(optimizer, checkpoint.state["optimizer"])
        _check_moments(optimizer)
    for group, configured in zip(optimizer.param_groups, options, strict=True):
        group.update(configured)  # the moments are the checkpoint's, weight decay and betas the configuration's


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Looks whether what was loaded is a step and two moments of each parameter; torch does not."""
    for parameter, entry in optimizer.state.items():
        shapes = {name: getattr(value, "shape", None) for name, value in entry.items()}
        if shapes != {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
            raise ValueError(f"moments {shapes}, parameter {tuple(parameter.shape)}")


def _load_objective(checkpoint: Checkpoint, objective: nn.Module) -> None:
    try:
        with _other_parameters(checkpoint), warnings.catch_warnings():
            warnings.simplefilter("error", FixedScaleWarning)
            objective.load_state_dict(checkpoint.state["objective"])
    except FixedScaleWarning as error:
        raise InputError(f"{checkpoint.path}: is of another objective ({error}); resume with the same one") from None


@contextlib.contextmanager
def _other_parameters(checkpoint: Checkpoint) -> Iterator[None]:
    """The error of a state that does not go into what was built."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint.path}: was trained with other parameters, or is damaged ({one_line(error, 200)})"
        ) from error


def seed_generators(seed: int, states: list[dict[str, Any]], device: torch.device) -> None:
    """Sets this rank's generators to its checkpoint's ``states``, or freshly to ``seed`` + rank if there are none."""
    seed += rank()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (whatever a tower may draw from)
    if rank() < len(states):
        set_rng_state(states[rank()], device)
