"""The steps of a run and what came of them: in its progress, in its log and at its callbacks, in their order.

On CUDA the numbers of a step stay there until a line of measurements is due, a checkpoint is written or the epoch ends.
Then those of all steps since are read at once, which waits for the device, and the lines are those that they would be
if each had been waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloob.distributed import rank, world_size
from cloob.functional.geometry import effective_eigenvalues, saturation
from cloob.objective import ContrastiveObjective
from cloob.training import faults, parts
from cloob.training.parts import Parts
from cloob.training.ranks import gather_objects
from cloob.training.step import Launched, StepResult
from cloob.training.watch.log import finite

MAX_MEASURED = 2048
"""Pairs whose geometry is measured: enough for a number that is watched; the time grows with the square."""


@dataclass(frozen=True)
class Step:
    """A step that was taken, or left out for too few samples (``outcome`` None)."""

    number: int
    lr: float
    hopfield: bool
    samples: int  # usable, over all ranks
    keys: tuple[str, ...]  # of this rank
    began: float  # by time.perf_counter
    waited: float  # seconds, for its batch
    outcome: Launched | None


class StepLog:
    """Accounts for the steps; every rank has one. ``notify`` is called with each line of ``metrics.jsonl``."""

    def __init__(self, run: Parts, notify: Callable[[Mapping[str, Any]], None]) -> None:
        self.parts = run
        self.notify = notify
        self.last_loss: float | None = None  # of the last step that was not skipped
        self._late = parts.is_async(run.device)
        self._pending: list[Step] = []

    def add(self, step: Step) -> None:
        """Records a step. Its numbers are read now, or later in one batch so as not to stall a GPU."""
        due = self._is_due(step)
        if step.outcome is not None and not due:
            step.outcome.features = None  # the rows of one batch are looked at, those of many would fill the memory
        self._pending.append(step)
        if due or not self._late:
            self.flush()

    def _is_due(self, step: Step) -> bool:
        """Whether the batch of a step is measured."""
        return step.number % self.parts.config.log.log_every == 0

    def flush(self) -> None:
        """Reads the numbers of the steps since the last time; waits once for the device, if there are any.

        Raises:
            TrainingFailed: ``max_nonfinite`` steps in a row were not finite; the message names the last.
            InputError: The run folder cannot be written.
        """
        steps, self._pending = self._pending, []
        if not steps:
            return
        asked = time.perf_counter()
        results = _read(steps)
        answered = time.perf_counter()
        lines = [self._line(step, result) for step, result in zip(steps, results, strict=True)]
        elapsed = time.perf_counter() - steps[0].began
        shared = {
            "images_per_second": sum(step.samples for step in steps) / elapsed,
            "data_wait": sum(step.waited for step in steps) / elapsed,
        }
        if self._late:
            shared["device_wait"] = (answered - asked) / elapsed
        for step, result, line in zip(steps, results, lines, strict=True):
            self._enter(step, result, line | shared)

    def _line(self, step: Step, result: StepResult | None) -> dict[str, Any]:
        """Moves the progress by a step; returns what the log says of it but for its times. All ranks call this."""
        run, progress = self.parts, self.parts.progress
        if result is not None and result.finite:
            self.last_loss = result.loss
            progress.samples_seen += step.samples
            progress.loss_sum += result.loss
            progress.loss_steps += 1
        line: dict[str, Any] = {
            "step": step.number,
            "epoch": progress.epoch + 1,
            "samples_seen": progress.samples_seen,
            "loss": finite(result.loss) if result else None,
            "lr": step.lr,
            "grad_norm": finite(result.grad_norm) if result else None,
        }
        for name, scale in run.objective.scale_values().items():
            line[name] = scale if isinstance(scale, float) else result.scales[name] if result else None
        if not step.hopfield:
            line["beta"] = None
        if run.config.optim.layer_decay < 1:
            line["lr_lowest"] = step.lr * min(group["lr_scale"] for group in run.stepper.optimizer.param_groups)
        if result is not None and run.config.run.precision == "fp16":
            line["loss_scale"] = result.loss_scale
        if result is not None and result.finite and result.features is not None:
            line |= _geometry(result.features, run.objective)
        return line

    def _enter(self, step: Step, result: StepResult | None, line: dict[str, Any]) -> None:
        """Writes the line, and does what has to be done about a step that was not finite."""
        run, progress = self.parts, self.parts.progress
        if result is None:
            line["skipped"] = "too few usable samples"
        elif not result.finite:
            line["skipped"] = "overflow" if result.overflow else "not finite"
        run.log.write("metrics", line)
        self.notify(line)
        if result is None or result.overflow:
            return
        if result.finite:
            progress.nonfinite = 0
        else:
            faults.skip_nonfinite(run.config, progress, result, step.number, step.lr, step.keys, run.saver.last)


def _read(steps: Sequence[Step]) -> list[StepResult | None]:
    """What the steps came to; all numbers that are on the device come in one copy."""
    outcomes = [step.outcome for step in steps]
    launched = [outcome.numbers for outcome in outcomes if outcome is not None]
    rows = iter(torch.stack(launched).tolist() if launched else ())
    return [outcome.result(next(rows)) if outcome is not None else None for outcome in outcomes]


def _geometry(features: tuple[Tensor, Tensor], objective: ContrastiveObjective) -> dict[str, float]:
    """On rank 0 saturation and effective eigenvalues of the batch, or of pairs evenly spread over it and its ranks.

    Saturation is that of a softmax, which the sigmoid loss has none of.
    """
    most = MAX_MEASURED // world_size()
    everywhere = gather_objects([rows[:: -(-len(rows) // most)].cpu() for rows in features])
    if rank() != 0:
        return {}
    images, texts = (torch.cat([both[side] for both in everywhere]) for side in (0, 1))
    softmax = objective.contrast != "sigmoid"
    return {
        **({"saturation": float(saturation(images, texts, float(objective.inv_tau.detach())))} if softmax else {}),
        "effective_eigenvalues_image": int(effective_eigenvalues(images)),
        "effective_eigenvalues_text": int(effective_eigenvalues(texts)),
    }
