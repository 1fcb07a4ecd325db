"""What a caller can hook into a run: the loop calls, it never imports what it calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cloob.training.config import TrainConfig


@dataclass(frozen=True)
class RunInfo:
    """A run as its callbacks see it."""

    run: Path  # its folder
    config: TrainConfig  # with every default filled in
    encoder: Any  # a DualEncoder, or the given towers; a callback may switch it to eval mode, the loop switches back
    objective: Any  # a ContrastiveObjective, or the given loss
    device: torch.device
    total_steps: int  # of the whole run
    steps_per_epoch: int
    start_step: int = 0  # steps done before this process took over; 0 unless resumed
    rank: int = 0  # this process's
    resumed_from: Path | None = None  # the checkpoint
    pairs_per_epoch: int = 0  # usable or not


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    run: Path  # its folder
    steps: int  # optimiser steps done
    epochs: int  # ended, the last one perhaps early by the run's length
    samples_seen: int  # usable samples trained on
    seconds: float  # training time, checkpoints and validation included, over all resumptions
    loss: float | None  # of the last step that was not skipped; None if there was none in this process
    checkpoint: Path | None  # the newest; None if the run wrote none
    stopped: str | None = None  # None when the run reached its end, else ``"SIGTERM"``
    skipped: Mapping[str, int] = field(default_factory=dict)  # samples of an epoch without use, by reason
    already_finished: bool = False  # the run that was to go on had reached its end before; nothing was written
    out_of_patience: bool = False  # the end was not its length, but ``patience`` validations without a better one


class Ended(Exception):  # noqa: N818 - an end, not an error
    """A run ended before its first step, and nothing was written; raised on all ranks."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(str(result.run))
        self.result = result


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
