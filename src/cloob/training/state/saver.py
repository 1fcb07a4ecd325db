"""When a run writes a checkpoint and what goes into it; on every rank, as each holds a part of the state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloob.data.fingerprint import Fingerprint, digest
from cloob.models.encoder import DualEncoder
from cloob.models.runs import find_best, is_better
from cloob.objective import ContrastiveObjective
from cloob.training.config import TrainConfig
from cloob.training.ranks import gather_objects, on_rank_zero
from cloob.training.state.checkpoint import Checkpoint, Progress, TrainerState, save_checkpoint, whole_state
from cloob.training.state.compare import HELD_OUT
from cloob.training.state.rng import rng_state
from cloob.training.step import Stepper
from cloob.training.towers.average import WeightAverage
from cloob.training.validate import Validation


class Saver:
    """Writes the checkpoints of one run, and knows the last (or what it was resumed from) and the best."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: DualEncoder,
        objective: ContrastiveObjective,
        stepper: Stepper,
        average: WeightAverage | None,
        device: torch.device,
        pairs: int,
        data: Mapping[str, Fingerprint],
        resumed: Checkpoint | None,
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.objective = objective
        self.stepper = stepper
        self.average = average
        self.device = device
        self.pairs = pairs
        self.data = data
        self.last: Path | None = resumed.path if resumed else None
        self._saved = _place(resumed.progress) if resumed else None
        held_out = digest([json.dumps(data[HELD_OUT], sort_keys=True)]) if HELD_OUT in data else None
        self._measured = {"batch_size": config.run.batch_size, "held_out": held_out}
        best = on_rank_zero(lambda: find_best(config.save.out, config.save.best, self._measured))
        self._best: float | None = best[1] if best else None
        self._validation: tuple[int, Validation] | None = None

    def judged(self, step: int, validation: Validation) -> bool:
        """Takes note of how good the weights after ``step`` are. Returns whether they are the best so far."""
        self._validation = step, validation
        value = validation.metrics()[self.config.save.best]
        if value is None or (self._best is not None and not is_better(self.config.save.best, value, self._best)):
            return False
        self._best = value
        return True

    def save(self, progress: Progress, hopfield: bool | None = None) -> Path | None:
        """Writes a checkpoint of this step, unless there is one or the loss is not finite just now.

        If it stays so, the weights may be at fault: they must not push the good checkpoints out. One that was written
        at the end of an epoch before the held-out pairs were looked at is written again. ``hopfield``: whether the
        objective retrieved at the last step; None: as it was made.
        """
        if _place(progress) == self._saved or progress.nonfinite:
            return None
        states = gather_objects(rng_state(self.device))
        weights, moments = whole_state(self.encoder, self.stepper.optimizer)
        validation: dict[str, Any] | None = None
        if self._validation is not None and self._validation[0] == progress.step:
            validation = {"metric": self.config.save.best, **self._validation[1].metrics(), **self._measured}
        trainer = TrainerState(
            optimizer=moments,
            stepper=self.stepper.state_dict(),
            progress=progress,
            rng=states,
            batch_size=self.config.run.batch_size,
            pairs=self.pairs,
            data=self.data,
            best=self.config.save.best,
        )
        self.last = on_rank_zero(
            lambda: save_checkpoint(
                self.config.save.out,
                self.encoder,
                self.objective,
                trainer,
                keep=self.config.save.keep,
                hopfield=hopfield,
                weights=weights,
                average=self.average,
                validation=validation,
            )
        )
        self._saved = _place(progress)
        return self.last


def _place(progress: Progress) -> tuple[int, int, int]:
    """What a checkpoint is of: a step, and whether the epoch that it ends was looked back on."""
    return progress.step, progress.epoch, progress.cut
