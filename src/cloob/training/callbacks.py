"""What a caller can hook into a run: the loop calls, it never imports what it calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cloob.models.encoder import DualEncoder
    from cloob.objective import ContrastiveObjective
    from cloob.training.config import TrainConfig


@dataclass(frozen=True)
class RunInfo:
    """A run as its callbacks see it.

    Attributes:
        run: The run folder.
        config: The resolved configuration.
        encoder: The towers being trained; a callback may switch them to eval mode, the loop switches back.
        objective: The objective being trained with.
        device: Where the towers are.
        total_steps: Steps of the whole run.
        steps_per_epoch: Steps of an epoch.
        start_step: Steps done before this process took over; 0 unless resumed.
        rank: This process's rank; callbacks are called on every rank.
        resumed_from: The checkpoint, or None.
        pairs_per_epoch: Pairs that an epoch visits, usable or not.
    """

    run: Path
    config: TrainConfig
    encoder: DualEncoder
    objective: ContrastiveObjective
    device: torch.device
    total_steps: int
    steps_per_epoch: int
    start_step: int = 0
    rank: int = 0
    resumed_from: Path | None = None
    pairs_per_epoch: int = 0


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        run: The run folder.
        steps: Optimiser steps done.
        epochs: Epochs ended, the last one perhaps early by the run's length.
        samples_seen: Usable samples trained on.
        seconds: Training time, checkpoints and validation included, over all resumptions.
        loss: Loss of the last step that was not skipped; None if there was none in this process.
        checkpoint: The newest checkpoint; None if the run wrote none.
        stopped: None when the run reached its end, else ``"SIGTERM"``.
        skipped: Samples of the last epoch that could not be used, by reason.
        already_finished: The run that was to go on had reached its end before; nothing was written.
        out_of_patience: The end was not its length, but ``patience`` validations without a better one.
    """

    run: Path
    steps: int
    epochs: int
    samples_seen: int
    seconds: float
    loss: float | None
    checkpoint: Path | None
    stopped: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    already_finished: bool = False
    out_of_patience: bool = False


class Callback:
    """Override what you need. Called on every rank; random numbers drawn inside do not move the training's."""

    def on_start(self, info: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """After each optimiser step, with the line of ``metrics.jsonl``.

        On a CUDA device lines come together, each ``log_every`` steps and before a checkpoint: until then nobody waits
        for the device. So the towers may be some steps further than the line.
        """

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """After each epoch, with the line of ``epochs.jsonl``; also after one that the run's length ended early."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint was written whole."""

    def on_end(self, result: RunResult | None) -> None:
        """At the end, whatever it was: ``result`` is None when an exception ended the run."""
