"""The lines of ``metrics.jsonl``, one a step; their numbers are read from CUDA many at
a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloob.data.batch import Skip
from cloob.distributed import rank
from cloob.errors import TrainingFailed
from cloob.objective.values import cone_notice, mean_cosine
from cloob.training.build import Run
from cloob.training.callbacks import Line
from cloob.training.faults import name_last_checkpoint
from cloob.training.run_log import finite, skips_of_all_ranks
from cloob.training.step import Launched, Sides, StepResult

logger = logging.getLogger(__name__)
MAX_NONFINITE = 10  # steps in a row
READ_AT_ONCE = 50  # steps on a GPU


@dataclass
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
    result: StepResult | None = None  # what the outcome says, once it is read


class StepLog:
    """Accounts for the steps; every rank has one.

    ``notify`` is called with every line of ``metrics.jsonl``.
    """

    def __init__(self, run: Run, notify: Callable[[Line], None]) -> None:
        self.run = run
        self.notify = notify
        self.last_loss: float | None = None  # of the last step that was not skipped
        # an optimiser of the caller's has rates of its own, as shares of the schedule's
        self._peak_share = 1.0
        if run.config.given_optimizer is not None:
            groups = run.stepper.optimizer.param_groups
            self._peak_share = max(group["lr_scale"] for group in groups)
        self._reads_later = waits_at_reading(run.stepper.device)
        self._pending: list[Step] = []

    def add(self, step: Step) -> None:
        """Records a step.

        Its numbers are read now, or later in one batch so as not to stall a GPU.
        """
        outcome = step.outcome
        if outcome is not None:
            if step.number == 1 and step.hopfield and rank() == 0:
                _warn_of_cone(outcome.sides)
            outcome.sides = None  # the rows of many batches would fill the memory
        self._pending.append(step)
        if len(self._pending) >= READ_AT_ONCE or not self._reads_later:
            self.flush()

    def flush(self) -> None:
        """Reads and writes what is pending."""
        steps, self._pending = self._pending, []
        if not steps:
            return
        _read(steps)
        rates = self._rates_of(steps)
        for step in steps:
            result = step.result
            if result is not None and result.finite:
                self._count(step, result)
            line = {**self._line(step), **rates}
            self.run.log.write("metrics", line)
            self.notify(line)
            if result is not None and not result.finite:
                self._note_nonfinite(step, result)

    def _count(self, step: Step, result: StepResult) -> None:
        """Adds a step to the samples and the mean loss of the epoch."""
        progress = self.run.progress
        self.last_loss = result.loss
        progress.nonfinite = 0
        progress.samples_seen += step.samples
        progress.loss_sum += result.loss
        progress.loss_steps += 1

    def _line(self, step: Step) -> dict[str, object]:
        """The line of a step but for the speed."""
        progress, result = self.run.progress, step.result
        line: dict[str, object] = {
            "step": step.number,
            "epoch": progress.epoch + 1,
            "samples_seen": progress.samples_seen,
            "loss": None,
            "lr": step.lr * self._peak_share,
            "grad_norm": None,
        }
        for name, scale in self.run.objective.scale_values().items():
            is_learned = isinstance(scale, Tensor)  # then the step has its value
            line[name] = None if is_learned else scale
        if result is None:
            return {**line, "skipped": "too few usable samples"}
        line["loss"] = finite(result.loss)
        line["grad_norm"] = finite(result.grad_norm)
        line.update(result.scales)
        if not step.hopfield:
            line["beta"] = None
        if not result.finite:
            line["skipped"] = "not finite"
        return line

    def _rates_of(self, steps: Sequence[Step]) -> dict[str, float]:
        """How fast these steps were, and the share of time that they waited."""
        elapsed = time.perf_counter() - steps[0].began
        speed = sum(step.samples for step in steps) / elapsed
        waited = sum(step.waited for step in steps) / elapsed
        rates = {"images_per_second": speed, "data_wait": waited}
        device = self.run.stepper.device
        if device.type == "cuda":
            rates["peak_memory"] = torch.cuda.max_memory_allocated(device)
        return rates

    def _note_nonfinite(self, step: Step, result: StepResult) -> None:
        """Names the samples of all ranks in ``skipped.jsonl``; too many such steps in a
        row end the run.
        """
        progress = self.run.progress
        progress.nonfinite += 1
        detail = f"loss {result.loss}, norm of the gradient {result.grad_norm}"
        skipped = skips_of_all_ranks(
            [Skip(key, "not finite", detail) for key in step.keys]
        )
        place = {"step": step.number, "epoch": progress.epoch + 1}
        self.run.log.write_skipped(place, skipped)
        message = f"step {step.number}: loss or gradient not finite"
        if progress.nonfinite >= MAX_NONFINITE:
            keys = ", ".join(skip.key for _, skip in skipped[:3])
            raise TrainingFailed(
                f"{message} for {progress.nonfinite} steps in a row (samples {keys} …;"
                f" all in skipped.jsonl); {name_last_checkpoint(self.run.saver.last)};"
                " a lower --lr or clipping (clip_grad_norm) may help"
            )
        if rank() == 0:
            logger.warning(f"{message}, step skipped; samples in skipped.jsonl")


def _warn_of_cone(sides: Sides | None) -> None:
    """Warns of rows that are too much alike for retrieval."""
    assert sides is not None
    notice = cone_notice(float(mean_cosine(*sides)))
    if notice is not None:
        logger.warning(
            f"step 1: {notice}; centre and scale what comes in, let it join later"
            " (--retrieval-from), or take --objective infoloob"
        )


def _read(steps: Sequence[Step]) -> None:
    """Reads the results of the steps from the device, in one copy."""
    launched = [(step, step.outcome) for step in steps if step.outcome is not None]
    if launched:
        rows = torch.stack([outcome.numbers for _, outcome in launched]).tolist()
        for (step, outcome), numbers in zip(launched, rows, strict=True):
            step.result = outcome.result(numbers)


def waits_at_reading(device: torch.device) -> bool:
    """Whether the host waits where it reads a value of the device."""
    return device.type == "cuda"
