"""Where a run goes on: a checkpoint found, read, compared with the configuration and loaded into what was built."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.data.fingerprint import Fingerprint, differences
from cloob.distributed import rank, world_size
from cloob.errors import InputError, one_line
from cloob.models.encoder import DualEncoder
from cloob.models.load import load_model
from cloob.models.runs import MODEL_FOLDER, RUN_CONFIG_FILE, TRAINER_FILE, list_checkpoints
from cloob.models.untrusted import check_folder
from cloob.models.weights.containers import check_zip
from cloob.scales import FixedScaleWarning
from cloob.training import sharding
from cloob.training.callbacks import RunResult
from cloob.training.config import TrainConfig
from cloob.training.course import Progress, is_whole
from cloob.training.finetune import first_difference
from cloob.training.optim import WeightAverage
from cloob.training.ranks import on_rank_zero
from cloob.training.state.checkpoint import FORMAT, HELD_OUT

logger = logging.getLogger(__name__)
# Changing these between a run and its resumption changes no number of the training; batch_size has a line of its own.
_FREE_PARTS = ("save", "log")
_FREE = "workers val_data val_every cache_dir cache_gb device max_nonfinite patience average_with_start batch_size"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: ``encoder`` holds the weights of ``model/``, ``state`` what ``trainer.pt`` holds."""

    path: Path
    encoder: DualEncoder
    state: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return Progress(**self.state["progress"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to go on from: those of ``model/``, unless these are an average."""
        weights: dict[str, Tensor] = self.state["weights"] if "weights" in self.state else self.encoder.state_dict()
        return weights


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
        chosen = on_rank_zero(lambda: getattr(find_checkpoint(run, resume), "path", None))
        return None if chosen is None else read_checkpoint(chosen)
    return find_checkpoint(run, resume)


def check_same_data(checkpoint: Checkpoint, data: Mapping[str, Fingerprint], *, accept: bool) -> None:
    """Refuses other training or held-out pairs than those of the checkpoint's run, unless they are accepted.

    Held-out pairs that one of the two runs has not got are no change of the data.
    """
    before: Mapping[str, Fingerprint] = checkpoint.state["data"]
    for kind in (kind for kind in data if kind in before):
        changed = differences(before[kind], data[kind])
        if not changed:
            continue
        changed_data = f"{checkpoint.path}: the {kind} are not those of this checkpoint's run ({'; '.join(changed)})"
        if not accept:
            raise InputError(f"{changed_data}; --accept-changed-data goes on with these")
        if rank() == 0:
            logger.warning("%s; accepted", changed_data)


def stop_if_finished(
    checkpoint: Checkpoint,
    config: TrainConfig,
    data: Mapping[str, Fingerprint],
    steps_per_epoch: int,
    encoder: nn.Module,
    objective: nn.Module,
) -> None:
    """Raises AlreadyFinished where a checkpoint leaves nothing to do, by its length or by the patience.

    InputError where it is not what the configuration asks for: the architecture or the objective is another.
    """
    progress = checkpoint.progress
    whole = is_whole(config.run, progress, steps_per_epoch)
    stale = 0 < config.run.patience <= progress.stale and not _judged_otherwise(checkpoint, config, data)
    if not whole and not stale:
        return
    _check_same_architecture(checkpoint, encoder)
    list(_changes(checkpoint, config))
    _load_objective(checkpoint, objective)
    raise AlreadyFinished(checkpoint.path, progress, out_of_patience=not whole)


def progress_of(checkpoint: Checkpoint, config: TrainConfig, data: Mapping[str, Fingerprint], pairs: int) -> Progress:
    """Where a run of ``pairs`` an epoch goes on; rank 0 warns of what changes the course of the training."""
    progress, state = checkpoint.progress, checkpoint.state
    said = [
        f"resumed with another {key}: {now!r} instead of {before!r}"
        for key, before, now in _changes(checkpoint, config)
    ]
    processes, size, held = len(state["rng"]), state["batch_size"], state["pairs"]
    if processes != world_size():
        said.append(
            f"resumed with {world_size()} processes instead of {processes}: the data go on where they were, "
            f"sums may round differently"
        )
    if size != config.run.batch_size:
        said.append(
            f"resumed with batch size {config.run.batch_size} instead of {size}: the data go on where they were, "
            f"the learning rate where a run of that batch size would be"
        )
    if held != pairs:  # the order of the epoch is another
        begun = ": the epoch begins anew" if progress.position else ""
        said.append(f"resumed with {pairs:,} pairs an epoch instead of {held:,}{begun}")
        progress.begin_epoch()
    if otherwise := _judged_otherwise(checkpoint, config, data):
        said.append(f"resumed {otherwise}: the best epoch and --patience begin anew")
        progress.stale = 0
    for line in said if rank() == 0 else ():
        logger.warning(line)
    if rank() != 0:  # the counts of bad samples are summed over ranks, so one rank keeps them
        progress.reasons = {}
    return progress


def _judged_otherwise(checkpoint: Checkpoint, config: TrainConfig, data: Mapping[str, Fingerprint]) -> str | None:
    """Why validations cannot be compared with those of the checkpoint's run; None if they can."""
    state = checkpoint.state
    if not (HELD_OUT in state["data"] and HELD_OUT in data):
        return None
    if state["data"][HELD_OUT] != data[HELD_OUT]:
        return "with other held-out pairs"
    if state["best"] != config.save.best:
        return f"with --best {config.save.best} instead of {state['best']}"
    if config.save.best == "val_loss" and state["batch_size"] != config.run.batch_size:
        return "in batches of another size, by which the validation loss is another"
    return None


def _changes(checkpoint: Checkpoint, config: TrainConfig) -> Iterator[tuple[str, object, object]]:
    """What changes the course of the training and differs from the checkpoint's run: key, its value, the one now.

    Another objective is an InputError.
    """
    file = checkpoint.path.parent.parent / RUN_CONFIG_FILE
    if not file.is_file():
        return
    before = TrainConfig.from_json(file).to_dict()
    for part, leaves in config.to_dict().items():
        for leaf, now in leaves.items():
            then = before[part][leaf]
            if part in _FREE_PARTS or leaf in _FREE.split() or _same(then, now):
                continue
            key = f"{part}.{leaf}"
            if part == "loss":
                raise InputError(
                    f"{checkpoint.path}: was trained with {key} = {then!r}, not {now!r}; "
                    f"resume with the same objective, or start from the weights with --init {checkpoint.path}"
                )
            yield key, then, now


def _same(a: object, b: object) -> bool:
    # A temperature is kept as its logarithm: read back, it may differ in the last digit.
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def restore(
    checkpoint: Checkpoint,
    *,
    encoder: nn.Module,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> None:
    """Loads weights, optimiser and objective of a checkpoint into freshly built ones.

    An average goes on from the checkpoint's, or starts from its weights when it has none. InputError where the
    checkpoint is of another architecture or objective, or damaged.
    """
    _check_same_architecture(checkpoint, encoder)
    with _other_parameters(checkpoint):
        sharding.load_whole(encoder, checkpoint.weights)
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


def _check_same_architecture(checkpoint: Checkpoint, encoder: nn.Module) -> None:
    """Refuses weights of other names or shapes than the checkpoint's."""
    if difference := first_difference(encoder.state_dict(), checkpoint.weights):
        name, here, there = difference
        raise InputError(
            f"{checkpoint.path}: holds another architecture ({name} has {there}, the configured model has {here}); "
            f"resume with the model it was trained with"
        )


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Checks that each parameter got a step and two moments of its shape: torch does not, and reads memory beyond."""
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
