"""The run folder: whether a run may go on in it, or begin."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from cloob.data.source import Fingerprint, differences
from cloob.distributed import rank, world_size
from cloob.errors import InputError
from cloob.models import runs
from cloob.models.source import find_model_folder
from cloob.settings import SCALES
from cloob.training.callbacks import RunFinished, RunResult
from cloob.training.checkpoint import TRAINING, Checkpoint, load_objective
from cloob.training.config import TrainConfig
from cloob.training.progress import Progress, is_over, is_whole

logger = logging.getLogger(__name__)

# What weights and optimiser belong to.
_FIXED = (
    *("objective", "retrieval_from", "mask_duplicates", "model", "image_size"),
    *SCALES,
    *("given_pairs", "given_towers", "given_objective", "given_optimizer"),
    *("given_sampler", "given_batch_sampler"),
)
# Of the other settings these go without saying, or are said elsewhere.
_UNNOTED = (*_FIXED, "out", "resume", "overwrite", "data")


def progress_of(
    checkpoint: Checkpoint,
    config: TrainConfig,
    data: Mapping[str, Fingerprint],
    objective: nn.Module,
) -> Progress:
    """Where a run continues; rank 0 warns of other settings.

    Raises RunFinished where nothing is left to do.
    """
    progress = checkpoint.progress
    before = _config_before(checkpoint, config)
    _refuse_other_model(checkpoint, before, config)
    _refuse_other_pairs(checkpoint, data)
    if is_over(config, progress):
        load_objective(checkpoint, objective)
        result = result_of(config, progress, checkpoint.path)
        raise RunFinished(replace(result, already_finished=True))
    if rank() != 0:
        # the counts of bad samples are summed over ranks, so one rank keeps them
        return replace(progress, reasons={})
    _note_changes(checkpoint, before, config)
    return progress


def _config_before(checkpoint: Checkpoint, config: TrainConfig) -> TrainConfig:
    """The configuration that the run had; the present one without its file."""
    file = checkpoint.path.parent.parent / runs.RUN_CONFIG_FILE
    return TrainConfig().merge_file(file) if file.is_file() else config


def _note_changes(
    checkpoint: Checkpoint, before: TrainConfig, config: TrainConfig
) -> None:
    """Says which settings are others than before. With another batch size or number of
    processes the data go on where they were, the learning rate where a run of that
    batch size would be; sums may round differently.
    """
    then = {"processes": len(checkpoint.state["rng"]), **before.to_dict()}
    now = {"processes": world_size(), **config.to_dict()}
    changes = [
        f"{name} {value} instead of {then[name]}"
        for name, value in now.items()
        if name not in _UNNOTED and value != then[name]
    ]
    if changes:
        logger.warning("resumed with %s", ", ".join(changes))


def _refuse_other_model(
    checkpoint: Checkpoint, before: TrainConfig, config: TrainConfig
) -> None:
    """Refuses settings that the checkpoint's weights do not belong to."""
    for name in _FIXED:
        now, then = getattr(config, name), getattr(before, name)
        # A temperature is kept as its logarithm: read back, it may differ in the last
        # digit.
        floats = isinstance(then, float) and isinstance(now, float)
        if now != then and not (floats and math.isclose(then, now, rel_tol=1e-6)):
            raise InputError(
                f"{checkpoint.path}: was trained with {name} = {then!r}, not {now!r};"
                " resume with the same, or start from the weights with --init"
                f" {checkpoint.path}"
            )


def _refuse_other_pairs(
    checkpoint: Checkpoint, data: Mapping[str, Fingerprint]
) -> None:
    other = differences(checkpoint.state["data"][TRAINING], data[TRAINING])
    if other:
        raise InputError(
            f"{checkpoint.path}: the training pairs are not those of this checkpoint's"
            f" run ({'; '.join(other)}); start from its weights with --init"
            f" {checkpoint.path}"
        )


def result_of(
    config: TrainConfig, progress: Progress, checkpoint: Path | None
) -> RunResult:
    """What a run came to that ends here."""
    return RunResult(
        run=config.out,
        steps=progress.step,
        epochs=progress.epoch,
        samples_seen=progress.samples_seen,
        seconds=progress.seconds,
        loss=None,
        checkpoint=checkpoint,
        out_of_patience=not is_whole(config, progress),
    )


def refuse_another_run(config: TrainConfig) -> None:
    """Refuses a folder that holds a run which this one neither goes on with nor may
    replace.
    """
    if not runs.run_files(config.out):
        return
    if config.overwrite:
        _check_removable(config)
    elif config.resume == "none":
        raise InputError(
            f"{config.out}: already holds a run; go on with --resume auto, or give"
            " --overwrite or another --out"
        )


def _check_removable(config: TrainConfig) -> None:
    """Refuses to remove what this run needs."""
    out, init = config.out, config.init
    # a rank has died: it is the run itself
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise InputError(
            f"{out}: holds the run that torchrun has started again, which --overwrite"
            " would remove; give --resume auto in its place"
        )
    folder = find_model_folder(init) if init is not None else None
    if folder is not None and folder.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"init {init!r} lies in {out}, which --overwrite would remove; give another"
            " --out"
        )


def prepare_run_folder(config: TrainConfig, resumed: Path | None) -> None:
    """Makes the run folder; an earlier run is removed, and unreadable checkpoints after
    the resumed one, which must not count as the newest, are set aside.
    """
    out = config.out
    if config.overwrite:
        runs.remove_run(out)
    (out / runs.CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in runs.list_checkpoints(out):
        if resumed is not None and path.name > resumed.name:
            aside = path.with_name(f"unreadable-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
