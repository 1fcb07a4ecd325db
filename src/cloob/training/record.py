"""What a run measures: the lines of its steps, read from CUDA many at a time, and how
good it is on held-out pairs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cloob.data.bad import check_fraction
from cloob.data.batch import Batch, Skip, micro_batches
from cloob.distributed import gather_objects, on_rank_zero, rank, world_size
from cloob.errors import InputError, TrainingFailed
from cloob.files import write_whole
from cloob.functional.bootstrap import group_means
from cloob.functional.geometry import effective_eigenvalues, saturation
from cloob.functional.ranking import mutual_ranks, mutual_ranks_of_ids, recall_at_k
from cloob.models.runs import SKIPPED_FILE, read_lines
from cloob.objective import ContrastiveObjective, NonFiniteFeaturesError
from cloob.objective.batch import cone_notice, mean_cosine
from cloob.training import sharding
from cloob.training.build import Run
from cloob.training.callbacks import HeldOut
from cloob.training.faults import StopSignal, agree_on_batch, fetch, kept
from cloob.training.progress import preserved_rng
from cloob.training.run_folder import finite, with_readers
from cloob.training.step import (
    Features,
    Launched,
    StepResult,
    TowersWithLoss,
    joined,
    sides_of,
)

logger = logging.getLogger(__name__)
Rows = tuple[Tensor, Tensor, Tensor]  # the unit rows of both sides, and ids
RECALLS = (1, 5, 10)
GALLERY = 10_000  # pairs of the recall, about: its time grows with their square
# of a line of epochs.jsonl, beside the metrics
LINE = ("epoch", "step", "samples_seen", "loss", "skipped", "val_skipped", "seconds")
MAX_MEASURED = 2048  # pairs whose geometry is measured: the time grows with the square


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
    """Accounts for the steps; every rank has one.

    ``notify`` is called with every line of ``metrics.jsonl``.
    """

    def __init__(self, run: Run, notify: Callable[[Mapping[str, Any]], None]) -> None:
        self.run = run
        self.notify = notify
        self.last_loss: float | None = None  # of the last step that was not skipped
        groups = run.stepper.optimizer.param_groups
        self._rates = [
            group["lr_scale"] for group in groups
        ]  # shares of the schedule's rate
        # A given optimiser's rates are peaks.
        self._peak = max(self._rates) if run.config.given_optimizer is not None else 1.0
        self._late = is_async(
            run.stepper.device
        )  # then the host waits where it reads a value
        self._pending: list[Step] = []

    def add(self, step: Step) -> None:
        """Records a step.

        Its numbers are read now, or later in one batch so as not to stall a GPU.
        """
        due = step.number % self.run.config.log_every == 0
        if step.number == 1 and step.hopfield and rank() == 0:
            _warn_of_cone(step)
        if step.outcome is not None and not due:
            # the rows of one batch are looked at, those of many would fill the memory
            step.outcome.features = None
        self._pending.append(step)
        if due or not self._late:
            self.flush()

    def flush(self) -> None:
        steps, self._pending = self._pending, []
        if not steps:
            return
        requested = time.perf_counter()
        results = _results_of(steps)
        answered = time.perf_counter()
        lines = [
            self._line(step, result)
            for step, result in zip(steps, results, strict=True)
        ]
        shared = self._rates_of(steps, waited=answered - requested)
        for step, result, line in zip(steps, results, lines, strict=True):
            self.run.log.write("metrics", line | shared)
            self.notify(line | shared)
            if result is None:
                continue
            if result.finite:
                self.run.progress.nonfinite = 0
            elif not result.overflow:
                self._nonfinite(step, result)

    def _rates_of(self, steps: Sequence[Step], waited: float) -> dict[str, float]:
        """How fast these steps were, and what they waited for."""
        elapsed = time.perf_counter() - steps[0].began
        speed = sum(step.samples for step in steps) / elapsed
        rates = {
            "images_per_second": speed,
            "images_per_second_per_rank": speed / world_size(),
            "data_wait": sum(step.waited for step in steps) / elapsed,
            "peak_memory": _peak_memory(self.run.stepper.device),
        }
        if self._late:
            rates["device_wait"] = waited / elapsed
        return rates

    def _line(self, step: Step, result: StepResult | None) -> dict[str, Any]:
        """Moves the progress by a step; returns its line but for the times.

        All ranks call this.
        """
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
            line[name] = scale if isinstance(scale, float) else None
            if result is not None and name in result.scales:
                line[name] = result.scales[name]
        if not step.hopfield:
            line["beta"] = None
        if run.config.layer_decay < 1:
            line["lr_lowest"] = step.lr * min(self._rates)
        if result is None:
            return line | {"skipped": "too few usable samples"}
        if run.config.precision == "fp16":
            line["loss_scale"] = result.loss_scale
        if not result.finite:
            line["skipped"] = "overflow" if result.overflow else "not finite"
        elif result.features is not None:
            line |= _geometry(result.features, run.objective)
        return line

    def _nonfinite(self, step: Step, result: StepResult) -> None:
        """Writes the samples of all ranks to ``nonfinite-step-N.json``; too many such
        steps in a row end the run.
        """
        config, progress, last = self.run.config, self.run.progress, self.run.saver.last
        progress.nonfinite += 1
        keys = list(itertools.chain.from_iterable(gather_objects(step.keys)))
        path = config.out / f"nonfinite-step-{step.number}.json"
        numbers: dict[str, Any] = {
            "step": step.number,
            "epoch": progress.epoch + 1,
            "loss": str(result.loss),
        }
        numbers |= {"grad_norm": str(result.grad_norm), "lr": step.lr, "keys": keys}
        on_rank_zero(lambda: write_whole(path, json.dumps(numbers, indent=2) + "\n"))
        what = f"step {step.number}: loss or gradient not finite"
        if progress.nonfinite >= config.max_nonfinite:
            in_a_row = (
                f"for {progress.nonfinite} steps in a row (samples"
                f" {', '.join(keys[:3])} …; all in {path})"
            )
            help_ = "a lower --lr or clipping (clip_grad_norm) may help"
            raise TrainingFailed(f"{what} {in_a_row}; {kept(last)}; {help_}")
        if rank() == 0:
            logger.warning("%s, step skipped; samples in %s", what, path)


def _warn_of_cone(step: Step) -> None:
    """Warns of first rows that are too much alike for retrieval."""
    if step.outcome is None or step.outcome.features is None:
        return
    notice = cone_notice(float(mean_cosine(*step.outcome.features)))
    if notice is not None:
        logger.warning(
            "step 1: %s; centre and scale what comes in, let it join later"
            " (--retrieval-from), or take --objective infoloob",
            notice,
        )


def _results_of(steps: Sequence[Step]) -> list[StepResult | None]:
    """What the steps came to, read from the device in one copy."""
    launched = [step.outcome for step in steps if step.outcome is not None]
    if not launched:
        return [None] * len(steps)
    numbers = iter(torch.stack([outcome.numbers for outcome in launched]).tolist())
    return [
        None if step.outcome is None else step.outcome.result(next(numbers))
        for step in steps
    ]


def is_async(device: torch.device) -> bool:
    return device.type == "cuda"


def _peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had on its CUDA device, else in memory; 0
    where nobody counts (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return 0


def _geometry(
    features: tuple[Tensor, Tensor], objective: ContrastiveObjective
) -> dict[str, float]:
    """On rank 0 saturation and effective eigenvalues of the batch, or of pairs evenly
    spread over it and its ranks.
    """
    most = MAX_MEASURED // world_size()
    everywhere = gather_objects(
        [rows[:: -(-len(rows) // most)].cpu() for rows in features]
    )
    if rank() != 0:
        return {}
    images, texts = (torch.cat([both[side] for both in everywhere]) for side in (0, 1))
    sides = {"image": images, "text": texts}
    result: dict[str, float] = {
        f"effective_eigenvalues_{k}": int(effective_eigenvalues(x))
        for k, x in sides.items()
    }
    if objective.contrast in ("infoloob", "infonce"):  # saturation is that of a softmax
        result["saturation"] = float(
            saturation(images, texts, float(objective.inv_tau.detach()))
        )
    return result


def judge(
    run: Run, stop: StopSignal, *, hopfield: bool
) -> tuple[dict[str, float | None], list[Skip], bool]:
    """``validate`` of the weights and, as ``ema_…``, of their average; and whether
    these weights are the best.
    """
    metrics, lost = validate(run, stop, run.towers, hopfield=hopfield)
    if run.stepper.average is not None:
        averaged = TowersWithLoss(
            run.stepper.average.encoder, run.objective, run.config.precision
        )
        of_average, _ = validate(run, stop, averaged, hopfield=hopfield)
        metrics |= {f"ema_{name}": value for name, value in of_average.items()}
    # Weights after a step that was not finite are not saved, so they cannot be the
    # best.
    best = not run.progress.nonfinite and run.saver.judged(run.progress.step, metrics)
    run.progress.stale = 0 if best else run.progress.stale + 1
    return metrics, lost, best


def validate(
    run: Run, stop: StopSignal, towers: TowersWithLoss, *, hopfield: bool
) -> tuple[dict[str, float | None], list[Skip]]:
    """``val_loss`` and ``val_recall`` of the held-out pairs, which are embedded once on
    all ranks, and the bad pairs.

    The loss is the mean in batches of the training's size, the recall that at 1, 5 and
    10 in both directions among some 10,000 pairs at most. An image's only correct
    answer is its caption, a vector's the first row of its id.
    """
    assert run.val_loader is not None
    if world_size() > 1:
        # what is judged is what is exported: rank 0's running statistics
        sharding.share_buffers(towers)
    towers.eval()
    with preserved_rng(run.stepper.device), torch.no_grad():
        found = _pass_over_held_out(run, stop, towers, hopfield=hopfield)
    if found.refused is not None and rank() == 0:
        logger.warning(
            "held-out pairs have no loss, and bad rows count as not found: %s",
            found.refused,
        )
    lost = _note_lost(run, found)
    rows = _of_all_ranks(found.rows)
    device, by_id = run.stepper.device, run.val_loader.by_id
    metrics = {
        "val_loss": finite(found.loss_sum / found.samples) if found.samples else None,
        "val_recall": mean_recall(rows, device, by_id),
    }
    return metrics | _own_metrics(run, towers, rows), lost


@dataclass
class _HeldOutPass:
    """What a pass over the held-out pairs has found so far."""

    loss_sum: float = 0.0  # over samples of all ranks
    samples: int = 0  # that had a loss
    pairs: int = 0  # usable or not
    rows: list[Rows] = field(default_factory=list)  # of this rank, for the recall
    left_out: list[Skip] = field(default_factory=list)
    refused: NonFiniteFeaturesError | None = None  # the first loss that there was not


def _pass_over_held_out(
    run: Run, stop: StopSignal, towers: TowersWithLoss, *, hopfield: bool
) -> _HeldOutPass:
    loader, device = run.val_loader, run.stepper.device
    assert loader is not None
    found = _HeldOutPass()
    batches = loader.epoch(0)
    every = -(-loader.pairs_per_epoch // GALLERY)
    while True:
        fetched, fault = fetch(batches, stop)
        if isinstance(fault, StopIteration):
            return found
        batch, layout, bad = agree_on_batch(
            fetched, fault, stop, device, run.saver.last
        )
        in_recall = found.pairs // loader.batch_size % every == 0
        found.pairs += layout.total + bad
        found.left_out += batch.skipped
        if min(layout.sizes) < 1:
            continue
        on = batch.to(device)
        features = _embedded(towers, on, run.stepper.micro_batch_size)
        if in_recall:
            images, texts = sides_of(features)
            found.rows.append((images.cpu(), texts.cpu(), batch.ids.cpu()))
        if layout.total > 1:
            found.samples += layout.total
            ids = on.ids if run.hands_over_ids else None
            try:
                loss = towers.loss_of(features, on.parts, ids, hopfield=hopfield)
                found.loss_sum += layout.total * float(loss)
            except NonFiniteFeaturesError as error:  # of one rank, on all
                found.loss_sum = math.nan
                found.refused = found.refused or error


def _embedded(towers: TowersWithLoss, batch: Batch, micro_batch_size: int) -> Features:
    """The features of a batch, a micro-batch at a time where there are any."""
    number = -(-len(batch) // (micro_batch_size or len(batch)))
    pieces = micro_batches(batch.parts, number) if number > 1 else [batch.parts]
    return joined([towers(piece, loss=False) for piece in pieces])


def _note_lost(run: Run, found: _HeldOutPass) -> list[Skip]:
    """The bad pairs of all ranks, written down once: they are the same at every
    validation; InputError if they are too many.
    """
    config = run.config
    skipped = with_readers(found.left_out)
    if rank() == 0:
        before = read_lines(config.out / SKIPPED_FILE)
        if not any(line.get("held_out") for line in before):
            step, epoch = run.progress.step, run.progress.epoch + 1
            place = {"step": step, "epoch": epoch, "held_out": True}
            run.log.write_skipped(place, skipped)
    lost = [skip for _, skip in skipped]
    limit = config.max_bad_fraction
    assert run.val_loader is not None
    check_fraction(run.val_loader.name, "held-out pairs", lost, found.pairs, limit)
    return lost


def _of_all_ranks(batches: Sequence[Rows]) -> Rows | None:
    """The rows of all ranks' batches, on every rank; None where there are none."""
    mine = [torch.cat(side) for side in zip(*batches, strict=True)]
    parts = [part for part in gather_objects(mine) if part]
    if not parts:
        return None
    x, y, ids = (torch.cat(side) for side in zip(*parts, strict=True))
    return x, y, ids


def mean_recall(rows: Rows | None, device: torch.device, by_id: bool) -> float | None:
    """The mean recall (see ``validate``); on every rank."""

    def mean() -> float | None:
        if rows is None:
            return None
        images, texts, ids = (side.to(device) for side in rows)
        if by_id:
            return float(recalls_of_ids(images, texts, ids).mean(1).mean())
        pairs = torch.arange(len(images), device=device).repeat(2, 1).T
        both = mutual_ranks(images, texts, pairs)
        return float(
            sum(recall_at_k(ranks, k) for ranks in both for k in RECALLS)
            / (2 * len(RECALLS))
        )

    return on_rank_zero(mean)


def _own_metrics(
    run: Run, towers: TowersWithLoss, rows: Rows | None
) -> dict[str, float | None]:
    """The caller's metrics, as rank 0 finds them."""
    if run.metrics is None or rows is None:
        return {}
    encoder: Any = towers.encoder
    given = run.config.given_towers is not None
    with preserved_rng(run.stepper.device), torch.no_grad():
        found = run.metrics(HeldOut(encoder.model if given else encoder, *rows))
    values = {name: finite(float(value)) for name, value in found.items()}
    wrong = values.keys() & {"val_loss", "val_recall", *LINE}
    if wrong:
        raise InputError(f"metrics=: {wrong.pop()!r} is a name of cloob's own")
    best = run.config.best
    if best not in ("val_loss", "val_recall", *values):
        raise InputError(
            f"best is {best!r}, but metrics= gives {', '.join(values) or 'nothing'}"
        )
    return gather_objects(values)[0]


def recalls_of_ids(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """(6, distinct ids) recall at 1, 5 and 10 in both directions."""
    both = mutual_ranks_of_ids(a, b, ids)
    return torch.stack([group_means(ranks < k, ids) for ranks in both for k in RECALLS])
