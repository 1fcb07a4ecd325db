"""Where a run stands: its position, the steps that are left and the schedules at a
step.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from cloob.data.loader import Loader
from cloob.distributed import rank
from cloob.training.config import TrainConfig
from cloob.training.optim import make_schedule, warmup_steps

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands.

    Positions count samples over all ranks, so they mean the same for any world size.
    """

    step: int = 0  # optimiser steps done, skipped ones included
    epoch: int = 0  # epochs completed; the last may have been cut short
    passed: int = 0  # samples of all epochs already passed, whether usable or not
    position: int = 0  # those of the current epoch's order
    # sequences of shards of the current epoch's order; 0: not begun, one per process
    lanes: int = 0
    samples_seen: int = 0  # usable samples trained on
    nonfinite: int = 0  # steps in a row skipped for a non-finite loss or gradient
    seconds: float = 0.0  # training time so far
    epoch_good: int = 0  # usable samples of the current epoch
    # samples of the current epoch that could not be used, over all ranks
    epoch_bad: int = 0
    # the same by reason, of this rank; a checkpoint has the sum
    reasons: dict[str, int] = field(default_factory=dict)
    # of the losses of the current epoch's steps that were not skipped
    loss_sum: float = 0.0
    loss_steps: int = 0  # their number
    stale: int = 0  # validations in a row that found nothing better

    def mean_loss(self) -> float | None:
        """Of the current epoch's steps; None where all were skipped."""
        return self.loss_sum / self.loss_steps if self.loss_steps else None

    def next_epoch(self) -> None:
        """Moves to the beginning of the next epoch."""
        self.epoch += 1
        self.position = self.lanes = 0
        self.epoch_good = self.epoch_bad = self.loss_steps = 0
        self.loss_sum, self.reasons = 0.0, {}


class Schedule:
    """What follows from the progress of a run: its place in all steps, how many are
    left, whether the objective retrieves, and the learning rate. It holds no state, so
    a resumed run finds the same.
    """

    def __init__(
        self, config: TrainConfig, loader: Loader, progress: Progress, *, hopfield: bool
    ) -> None:
        self._config, self._loader, self._progress = config, loader, progress
        self._total_steps = total = config.total_steps(loader.steps_per_epoch)
        self._retrieves_from = config.retrieval_from * total if hopfield else math.inf
        self.learning_rate = make_schedule(config, total)
        warmup = warmup_steps(config, total)
        if warmup > total and rank() == 0:
            logger.warning(
                f"a warm-up of {warmup:,} steps is longer than this run of {total:,}:"
                f" its learning rate ends at {self.learning_rate(total - 1):.2g}, not"
                f" {config.lr:g}"
            )

    def place(self) -> int:
        """The step at which a run of this batch size alone would stand;
        ``progress.step`` if no other came before.
        """
        progress, size = self._progress, self._config.batch_size
        if self._config.epochs is None:
            return progress.passed // size
        return progress.epoch * self._loader.steps_per_epoch + progress.position // size

    def retrieves(self, step: int) -> bool:
        """Whether the objective retrieves at a step."""
        return step >= self._retrieves_from

    def retrieved(self) -> bool:
        """Whether the objective retrieved at the last step."""
        return self.retrieves(max(self.place() - 1, 0))

    def steps_left(self) -> int:
        """How many steps there are to the end of the run."""
        if self._config.epochs is None:
            return max(self._total_steps - self.place(), 0)
        later = self._config.epochs - self._progress.epoch - 1
        if later < 0:
            return 0
        left = self._loader.steps(self._progress.position)
        return left + later * self._loader.steps_per_epoch


def is_over(config: TrainConfig, progress: Progress) -> bool:
    """Whether a run is whole, or out of patience."""
    return is_whole(config, progress) or 0 < config.patience <= progress.stale


def is_whole(config: TrainConfig, progress: Progress) -> bool:
    """Whether a run has its full length, and its last epoch was validated."""
    if config.epochs is not None:
        return progress.epoch >= config.epochs
    return (
        progress.position == 0
        and progress.passed >= config.total_steps(0) * config.batch_size
    )
