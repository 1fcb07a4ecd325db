"""The steps of a run and what came of them: in its progress, in its log and at its callbacks, in their order.

On CUDA the numbers of a step stay there until a line of measurements is due, a checkpoint is written or the epoch ends.
Then those of all steps since are read at once, and the lines are as if each had been waited for.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloob.distributed import gather_objects, on_rank_zero, rank, world_size
from cloob.errors import TrainingFailed
from cloob.files import write_whole
from cloob.functional.geometry import effective_eigenvalues, saturation
from cloob.objective import ContrastiveObjective
from cloob.objective.batch import cone_notice, mean_cosine
from cloob.training.build import Run
from cloob.training.faults import kept
from cloob.training.log import finite
from cloob.training.step import Launched, StepResult

logger = logging.getLogger(__name__)
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

    def __init__(self, run: Run, notify: Callable[[Mapping[str, Any]], None]) -> None:
        self.run = run
        self.notify = notify
        self.last_loss: float | None = None  # of the last step that was not skipped
        groups = run.stepper.optimizer.param_groups
        self._rates = [group["lr_scale"] for group in groups]  # shares of the schedule's rate
        # A given optimiser's rates are its own: the configuration's stands for no peak then.
        self._peak = max(self._rates) if run.config.given.given_optimizer is not None else 1.0
        self._late = is_async(run.stepper.device)  # then the host waits where it reads a value
        self._pending: list[Step] = []

    def add(self, step: Step) -> None:
        """Records a step. Its numbers are read now, or later in one batch so as not to stall a GPU."""
        due = step.number % self.run.config.log.log_every == 0
        if step.outcome is not None and step.outcome.features is not None:
            if step.number == 1 and step.hopfield and rank() == 0:
                how = "let it join later (--retrieval-from), or take --objective infoloob"
                if notice := cone_notice(float(mean_cosine(*step.outcome.features))):
                    logger.warning("step 1: %s; centre and scale what comes in, %s", notice, how)
            if not due:  # the rows of one batch are looked at, those of many would fill the memory
                step.outcome.features = None
        self._pending.append(step)
        if due or not self._late:
            self.flush()

    def flush(self) -> None:
        """Reads the numbers of the steps since the last time."""
        steps, self._pending = self._pending, []
        if not steps:
            return
        asked = time.perf_counter()
        launched = [step.outcome.numbers for step in steps if step.outcome is not None]
        rows = iter(torch.stack(launched).tolist() if launched else ())  # all numbers come in one copy
        results = [step.outcome.result(next(rows)) if step.outcome is not None else None for step in steps]
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
            self.run.log.write("metrics", line | shared)
            self.notify(line | shared)
            if result is not None and result.finite:
                self.run.progress.nonfinite = 0
            elif result is not None and not result.overflow:
                self._nonfinite(step, result)

    def _line(self, step: Step, result: StepResult | None) -> dict[str, Any]:
        """Moves the progress by a step; returns what the log says of it but for its times. All ranks call this."""
        run, progress = self.run, self.run.progress
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
            "lr": step.lr * self._peak,
            "grad_norm": finite(result.grad_norm) if result else None,
        }
        for name, scale in run.objective.scale_values().items():
            line[name] = scale if isinstance(scale, float) else result.scales[name] if result else None
        if not step.hopfield:
            line["beta"] = None
        if run.config.optim.layer_decay < 1:
            line["lr_lowest"] = step.lr * min(self._rates)
        if result is None:
            return line | {"skipped": "too few usable samples"}
        if run.config.run.precision == "fp16":
            line["loss_scale"] = result.loss_scale
        if not result.finite:
            line["skipped"] = "overflow" if result.overflow else "not finite"
        elif result.features is not None:
            line |= _geometry(result.features, run.objective)
        return line

    def _nonfinite(self, step: Step, result: StepResult) -> None:
        """Writes the samples of all ranks to ``nonfinite-step-N.json``; too many such steps in a row end the run."""
        config, progress, last = self.run.config, self.run.progress, self.run.saver.last
        progress.nonfinite += 1
        keys = list(itertools.chain.from_iterable(gather_objects(step.keys)))
        path = config.save.out / f"nonfinite-step-{step.number}.json"
        numbers: dict[str, Any] = {"step": step.number, "epoch": progress.epoch + 1, "loss": str(result.loss)}
        numbers |= {"grad_norm": str(result.grad_norm), "lr": step.lr, "keys": keys}
        on_rank_zero(lambda: write_whole(path, json.dumps(numbers, indent=2) + "\n"))
        what = f"step {step.number}: loss or gradient not finite"
        if progress.nonfinite >= config.run.max_nonfinite:
            raise TrainingFailed(
                f"{what} for {progress.nonfinite} steps in a row (samples {', '.join(keys[:3])} …; all in {path}); "
                f"{kept(last)}; a lower --lr or clipping (clip_grad_norm) may help"
            )
        if rank() == 0:
            logger.warning("%s, step skipped; samples in %s", what, path)


def is_async(device: torch.device) -> bool:
    return device.type == "cuda"


def _geometry(features: tuple[Tensor, Tensor], objective: ContrastiveObjective) -> dict[str, float]:
    """On rank 0 saturation and effective eigenvalues of the batch, or of pairs evenly spread over it and its ranks."""
    most = MAX_MEASURED // world_size()
    everywhere = gather_objects([rows[:: -(-len(rows) // most)].cpu() for rows in features])
    if rank() != 0:
        return {}
    images, texts = (torch.cat([both[side] for both in everywhere]) for side in (0, 1))
    sides = {"image": images, "text": texts}
    found: dict[str, float] = {f"effective_eigenvalues_{k}": int(effective_eigenvalues(x)) for k, x in sides.items()}
    if objective.contrast in ("infoloob", "infonce"):  # saturation is that of a softmax
        found["saturation"] = float(saturation(images, texts, float(objective.inv_tau.detach())))
    return found
