"""Whether a run that goes on from a checkpoint is the one that wrote it: its configuration, its data, its towers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

from torch import nn

from cloob.data.fingerprint import Fingerprint, differences
from cloob.distributed import rank, world_size
from cloob.errors import InputError
from cloob.models.runs import RUN_CONFIG_FILE
from cloob.training.config import TrainConfig
from cloob.training.state.checkpoint import Checkpoint
from cloob.training.towers.finetune import first_difference

logger = logging.getLogger(__name__)
TRAINING, HELD_OUT = "training pairs", "held-out pairs"
"""The two sets of pairs whose fingerprints a checkpoint keeps."""
# Changing these between a run and its resumption changes no number of the training.
_FREE_KEYS = {"save", "log", "run.device", "run.max_nonfinite"} | {
    f"pairs.{leaf}" for leaf in ("workers", "val_data", "val_every", "cache_dir", "cache_gb")
}
_FREE_KEYS |= {"run.patience", "towers.average_with_start"}
_FREE_KEYS |= {"run.batch_size"}  # has a line of its own


def check_same_run(checkpoint: Checkpoint, config: TrainConfig, pairs: int) -> bool:
    """Compares the configuration, and the pairs of an epoch, with those the checkpoint was trained with.

    What only changes the course of the training is allowed and said in the log of rank 0; another objective is not.

    Returns:
        Whether the current epoch can go on: with another number of pairs its order is another.

    Raises:
        InputError: The objective differs.
    """
    said = [
        f"resumed with another {key}: {now!r} instead of {before!r}"
        for key, before, now in _changes(checkpoint, config)
    ]
    processes = len(checkpoint.state["rng"])
    if processes != world_size():
        said.append(
            f"resumed with {world_size()} processes instead of {processes}: the data go on where they were, "
            f"sums may round differently"
        )
    size = checkpoint.state["batch_size"]
    if size != config.run.batch_size:
        said.append(
            f"resumed with batch size {config.run.batch_size} instead of {size}: the data go on where they were, "
            f"the learning rate where a run of that batch size would be"
        )
    held = checkpoint.state["pairs"]
    if held != pairs:
        begun = ": the epoch begins anew" if checkpoint.progress.position else ""
        said.append(f"resumed with {pairs:,} pairs an epoch instead of {held:,}{begun}")
    for line in said if rank() == 0 else ():
        logger.warning(line)
    return bool(held == pairs)


def check_same_objective(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Refuses other settings of the loss than the checkpoint's."""
    for _ in _changes(checkpoint, config):
        pass


def check_same_data(checkpoint: Checkpoint, data: Mapping[str, Fingerprint], *, accept: bool) -> None:
    """Compares fingerprints of training and held-out pairs with those of the run that wrote the checkpoint.

    Held-out pairs that one of the two runs has not got are no change of the data.

    Raises:
        InputError: They differ, and that is not accepted; says in what.
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


def judged_otherwise(checkpoint: Checkpoint, config: TrainConfig, data: Mapping[str, Fingerprint]) -> str | None:
    """Why what the held-out pairs say cannot be compared with what they said to the checkpoint's run; None if it can.

    The loss is measured in batches of the training's size.
    """
    before: Mapping[str, Fingerprint] = checkpoint.state["data"]
    if not (HELD_OUT in before and HELD_OUT in data):
        return None
    if before[HELD_OUT] != data[HELD_OUT]:
        return "with other held-out pairs"
    best = checkpoint.state["best"]
    if best != config.save.best:
        return f"with --best {config.save.best} instead of {best}"
    if config.save.best == "val_loss" and checkpoint.state["batch_size"] != config.run.batch_size:
        return "in batches of another size, by which the validation loss is another"
    return None


def check_same_architecture(checkpoint: Checkpoint, encoder: nn.Module) -> None:
    """Refuses weights of other names or shapes than the checkpoint's."""
    wanted, held = encoder.state_dict(), checkpoint.weights
    if difference := first_difference(wanted, held):
        name, here, there = difference
        raise InputError(
            f"{checkpoint.path}: holds another architecture ({name} has {there}, the configured model has {here}); "
            f"resume with the model it was trained with"
        )


def _changes(checkpoint: Checkpoint, config: TrainConfig) -> Iterator[tuple[str, object, object]]:
    """What changes the course of the training and differs from the checkpoint's run: key, its value, the one now."""
    file = checkpoint.path.parent.parent / RUN_CONFIG_FILE
    if not file.is_file():
        return
    before, now = _flat(TrainConfig.from_json(file)), _flat(config)
    for key in now:
        part = key.partition(".")[0]
        if _same(before[key], now[key]) or part in _FREE_KEYS or key in _FREE_KEYS:
            continue
        if part == "loss":
            raise InputError(
                f"{checkpoint.path}: was trained with {key} = {before[key]!r}, not {now[key]!r}; "
                f"resume with the same objective, or start from the weights with --init {checkpoint.path}"
            )
        yield key, before[key], now[key]


def _same(a: object, b: object) -> bool:
    # A temperature is kept as its logarithm: read back, it may differ in the last digit.
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _flat(config: TrainConfig) -> dict[str, object]:
    return {f"{part}.{leaf}": value for part, leaves in config.to_dict().items() for leaf, value in leaves.items()}
