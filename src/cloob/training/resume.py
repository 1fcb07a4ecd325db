"""Where a run goes on: its checkpoint compared with the configuration and the pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from cloob.data.source import Fingerprint, differences
from cloob.distributed import rank, world_size
from cloob.models.runs import RUN_CONFIG_FILE, find_best
from cloob.training.callbacks import Ended, RunResult
from cloob.training.checkpoint import TRAINING, Checkpoint, load_objective, measured
from cloob.training.config import TrainConfig
from cloob.training.config.checks import wrong
from cloob.training.progress import Progress, is_whole

logger = logging.getLogger(__name__)
# Changing these between a run and its resumption changes no number of the training; batch_size has a line of its own.
_FREE_PARTS = ("save", "log")
_FREE = """workers val_data val_a val_b val_ids val_every cache_dir cache_gb device max_nonfinite patience
average_with_start batch_size given_held_out"""


def progress_of(
    checkpoint: Checkpoint, config: TrainConfig, data: Mapping[str, Fingerprint], objective: nn.Module
) -> Progress:
    """Where a run goes on; rank 0 warns of what changes the course of the training.

    InputError for other training pairs, another objective or model; Ended where nothing is left to do.
    """
    state, progress = checkpoint.state, checkpoint.progress
    changes = list(_changes(checkpoint, config))
    if other := differences(state["data"][TRAINING], data[TRAINING]):
        others = f"the training pairs are not those of this checkpoint's run ({'; '.join(other)})"
        wrong(f"{checkpoint.path}: {others}; start from its weights with --init {checkpoint.path}")
    # A validation that later ones can be compared with: by the same pairs in the same batches.
    has_best = progress.stale and find_best(config.save.out, config.save.best, measured(config, data)) is not None
    whole = is_whole(config.run, progress)
    if whole or (has_best and 0 < config.run.patience <= progress.stale):
        load_objective(checkpoint, objective)
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
        changes.append(f"{world_size()} processes instead of {processes}: {goes_on}")
    if size != config.run.batch_size:
        goes_on = "the data go on where they were, the learning rate where a run of that batch size would be"
        changes.append(f"batch size {config.run.batch_size} instead of {size}: {goes_on}")
    if progress.stale and not has_best:
        changes.append("held-out pairs that none of its validations was made with: --patience begins anew")
        progress = replace(progress, stale=0)
    if rank() != 0:  # the counts of bad samples are summed over ranks, so one rank keeps them
        return replace(progress, reasons={})
    for line in changes:
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
            if part in ("loss", "align", "given") or leaf in ("model", "image_size"):
                advice = f"resume with the same, or start from the weights with --init {checkpoint.path}"
                wrong(f"{checkpoint.path}: was trained with {part}.{leaf} = {then!r}, not {now!r}; {advice}")
            yield f"another {part}.{leaf}: {now!r} instead of {then!r}"
