"""The training loop: batches in, steps, log lines and checkpoints out; faults are
skipped, counted or end the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from torch import nn

from cloob.data.bad import by_reason
from cloob.data.batch import Batch
from cloob.data.loader import Copies
from cloob.distributed import process_group, rank, resolve_device
from cloob.errors import InputError, Stopped, TrainingFailed
from cloob.lock import lock_run_folder
from cloob.training import faults
from cloob.training.build import Run, assemble
from cloob.training.callbacks import (
    Callback,
    Metrics,
    RunFinished,
    RunInfo,
    RunResult,
)
from cloob.training.config import TrainConfig
from cloob.training.custom_parts import CustomParts
from cloob.training.faults import StopRequested
from cloob.training.generators import preserved_rng
from cloob.training.optim import GivenOptimizer, freeze
from cloob.training.pairs import GivenPairs
from cloob.training.progress import Schedule, is_over
from cloob.training.run_folder import result_of
from cloob.training.step_log import Step, StepLog
from cloob.training.validation import Validation, validate_run

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    *,
    pairs: GivenPairs | None = None,
    held_out: GivenPairs | None = None,
    towers: nn.Module | None = None,
    objective: nn.Module | None = None,
    optimizer: GivenOptimizer | None = None,
    sampler: Iterable[int] | None = None,
    batch_sampler: Iterable[Sequence[int]] | None = None,
    metrics: Metrics | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Trains two towers.

    Every part below takes the place of what the configuration names.

    Under ``torchrun`` every process calls this, with one run folder. On the CPU in
    float32 with one or two processes the same configuration gives the same numbers, bit
    for bit, whether or not the run was interrupted; with more up to rounding.

    Args:
        config: The configuration.
        pairs: Training pairs: a map-style torch ``Dataset`` of (a, b) or (a, b, id),
            collated by its ``collate_fn`` or torch's default; or a source such as
            ``open_source`` gives. An item that raises is a bad sample. What an item
            draws at random depends on (seed, epoch, its number). Items may be mappings,
            with an ``id`` or without, or longer tuples (the third part is the id) for
            towers or a loss that take ``batch``.
        held_out: Held-out pairs, likewise; pairs of one id are one answer.
        towers: A module that makes of a batch's a and b two (n, D) matrices, whose rows
            need not be of length one. One whose ``forward`` takes ``batch`` gets the
            collated batch. It may return tensors (n, …) by name, the first two (n, D).
        objective: A module: ``loss(x, y, ids=…)`` of (N, D) float32 or float64 unit
            rows -> 0-d tensor. ``ids`` is (N,) int64, and may be left out of its
            signature. One that takes ``loss(features, batch)`` gets what the towers
            returned by name (two matrices are x and y, of unit rows) and the batch.
            Over ranks it sees the rows of all, with their gradient.
        optimizer: Parameter groups -> optimiser. Its learning rates are the schedule's
            peak; groups of norms and biases come with a weight decay of 0. Or several:
            a list of (predicate, function), where ``predicate(name, parameter)`` says
            which parameters it takes that none before it has.
        sampler: A torch ``Sampler`` of the rows of a Dataset, in place of a new order
            in every epoch. Rank 0 iterates it once an epoch, its draws depend on (seed,
            epoch), and a ``state_dict`` of plain values and tensors is resumed.
        batch_sampler: Likewise, one that gives the rows of whole batches, of all ranks
            together; ``batch_size`` is the size of the largest.
        metrics: :class:`cloob.training.callbacks.HeldOut` -> numbers by name, at every
            validation and on every rank, the higher the better. They stand in
            epochs.jsonl, and ``best`` may name one, which ``patience`` then goes by.
        callbacks: Called along the way, on every rank.

    Returns:
        The result; ``already_finished``: nothing was left to do.

    Raises:
        InputError: An argument is wrong, too many samples are bad, the disk is full, a
            batch does not fit in memory, or another process writes to the run folder.
        Stopped: SIGTERM came; the current step was finished and a checkpoint written.
            A ``KeyboardInterrupt`` with the ``result`` (of ``cloob.errors``).
        TrainingFailed: The loss was not finite for ten steps in a row, a
            data worker died, or another process took the run folder over.

    Example:
        >>> import cloob
        >>> config = cloob.get_recipe("demo-scratch")
        >>> config = config.override(steps=2, batch_size=8, out="runs/example")
        >>> config = config.override(device="cpu")
        >>> result = cloob.train(config)
        >>> result.steps, result.samples_seen
        (2, 16)
    """
    custom = CustomParts(
        pairs, held_out, towers, objective, optimizer, sampler, batch_sampler, metrics
    )
    config = custom.named(config)
    device = resolve_device(config.device)
    with process_group(device), lock_run_folder(config.out) as check_lock:
        try:
            run = assemble(config, custom, device)
        except RunFinished as ended:
            return ended.result
        loop = Loop(run, custom, callbacks, check_lock)
        with run.stop:
            result = loop.go()
        del run, loop  # and with them DDP, before the group that it holds
    if result.stopped is not None:
        raise Stopped(result)
    return result


class Loop:
    def __init__(
        self,
        run: Run,
        custom: CustomParts,
        callbacks: Sequence[Callback],
        check_lock: Callable[[], None],
    ) -> None:
        self.run, self.custom = run, custom
        self.callbacks, self.check_lock = callbacks, check_lock
        self.schedule = Schedule(
            run.config, run.loader, run.progress, hopfield=run.objective.hopfield
        )
        self.modules = list(run.towers.modules())
        self.copies = Copies(run.stepper.device)
        self.steps = StepLog(run, partial(self._call, "on_step"))
        self.skipped: dict[str, int] = {}  # samples of the last epoch, by reason

    def go(self) -> RunResult:
        """Trains to the end of the run, or until a signal comes."""
        run, progress = self.run, self.run.progress
        result = None
        self.began = time.perf_counter() - progress.seconds
        try:
            self._call("on_start", self._info())
            stopped = False
            while not stopped and not is_over(run.config, progress):
                stopped = self._epoch()
            self._save()
            if progress.nonfinite and rank() == 0:
                logger.warning(
                    "the last step was not finite, and nothing is saved until one is:"
                    " %s",
                    faults.name_last_checkpoint(run.saver.last),
                )
            result = self._result(stopped)
            return result
        except Exception:
            # the error to report is the one that ended the run
            with contextlib.suppress(Exception):
                self.steps.flush()
            raise
        finally:
            for part in (run.loader, run.val_loader, run.log):
                if part is not None:
                    part.close()
            self._call("on_end", result)

    def _info(self) -> RunInfo:
        run, custom = self.run, self.custom
        return RunInfo(
            run=run.config.out,
            config=run.config,
            encoder=run.encoder if custom.towers is None else custom.towers,
            objective=run.objective if custom.objective is None else custom.objective,
            device=run.stepper.device,
            total_steps=run.progress.step + self.schedule.steps_left(),
            steps_per_epoch=run.loader.steps_per_epoch,
            start_step=run.progress.step,
            rank=rank(),
        )

    def _result(self, stopped: bool) -> RunResult:
        run = self.run
        result = result_of(run.config, run.progress, run.saver.last)
        return dataclasses.replace(
            result,
            seconds=time.perf_counter() - self.began,
            loss=self.steps.last_loss,
            stopped="SIGTERM" if stopped else None,
            skipped=self.skipped,
            out_of_patience=result.out_of_patience and not stopped,
        )

    def _call(self, event: str, *arguments: object) -> None:
        """Calls the callbacks, which move neither generators nor modes of modules."""
        if not self.callbacks:
            return
        modes = [module.training for module in self.modules]
        with preserved_rng(self.run.stepper.device):
            for callback in self.callbacks:
                getattr(callback, event)(*arguments)
        for module, mode in zip(self.modules, modes, strict=True):
            if module.training != mode:  # to set one takes longer than a small step
                module.training = mode

    def _epoch(self) -> bool:
        """The rest of the current epoch. Returns whether a signal ended it."""
        run, progress = self.run, self.run.progress
        save_every = run.config.save_every
        try:
            self._steps_of_epoch()
            best = self._end_epoch()
        # while it validates: the checkpoint lacks the validation, which resuming makes
        # good
        except StopRequested:
            return True
        if best or not save_every or progress.step % save_every == 0:
            self._save()
        return False

    def _steps_of_epoch(self) -> None:
        """Takes the steps of the epoch that are left, with checkpoints between them."""
        run, progress = self.run, self.run.progress
        save_every, size = run.config.save_every, run.config.batch_size
        # an epoch keeps its order with another world size
        progress.lanes = progress.lanes or run.loader.world_size
        start = progress.position
        batches = run.loader.epoch(progress.epoch, start, progress.lanes)
        steps = min(run.loader.steps(start), self.schedule.steps_left())
        run.towers.train()
        freeze(run.encoder, run.config.freeze)
        for index in range(steps):
            self._step(batches)
            progress.position += size
            progress.passed += size
            is_last = index + 1 == steps
            if save_every and progress.step % save_every == 0 and not is_last:
                self._save()

    def _step(self, batches: Iterator[Batch]) -> None:
        """Fetches a batch, and takes a step on it unless too little of it is usable."""
        run, progress = self.run, self.run.progress
        began = time.perf_counter()
        fetched = run.fetch(batches)
        run.bad.count(fetched)
        place = self.schedule.place()
        lr = self.schedule.learning_rate(place)
        hopfield = self.schedule.retrieves(place)
        progress.step += 1
        outcome = None
        if fetched.is_usable and fetched.layout.total >= 2:
            batch = run.step_batch(
                self.copies(fetched.batch), fetched.layout, hopfield=hopfield
            )
            with faults.enough_memory(run.config):
                outcome = run.stepper.launch(batch, lr)
        step = Step(
            number=progress.step,
            lr=lr,
            hopfield=hopfield,
            samples=fetched.layout.total,
            keys=fetched.batch.keys,
            began=began,
            waited=fetched.waited,
            outcome=outcome,
        )
        self.steps.add(step)

    def _end_epoch(self) -> bool:
        """Validates and logs the epoch, then turns to the next; whether these weights
        are the best so far.
        """
        run, progress = self.run, self.run.progress
        self.steps.flush()
        run.bad.check(ended=True)
        self.skipped = run.bad.reasons()
        found, best = self._validate()
        line = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "samples_seen": progress.samples_seen,
            "loss": progress.mean_loss(),
            **found.metrics,
            "skipped": self.skipped,
            "seconds": time.perf_counter() - self.began,
        }
        if found.bad_pairs:
            line["val_skipped"] = by_reason(found.bad_pairs)
        progress.next_epoch()
        run.log.write("epochs", line)
        self._call("on_epoch_end", line)
        return best

    def _validate(self) -> tuple[Validation, bool]:
        """Judges the weights by the held-out pairs, and whether they are the best."""
        run, progress = self.run, self.run.progress
        if run.val_loader is None:
            return Validation({"val_loss": None, "val_recall": None}), False
        try:
            found = validate_run(run, hopfield=self.schedule.retrieved())
        except (InputError, TrainingFailed):
            # the epoch's work; a resumed run begins with this validation
            self._save()
            raise
        # weights after a step that was not finite are not saved
        best = not progress.nonfinite and run.saver.is_best(
            progress.step, found.metrics
        )
        progress.stale = 0 if best else progress.stale + 1
        return found, best

    def _save(self) -> None:
        """Writes a checkpoint of the progress, and tells the callbacks."""
        run = self.run
        self.steps.flush()
        self.check_lock()
        progress = dataclasses.replace(
            run.progress,
            reasons=run.bad.reasons(),
            seconds=time.perf_counter() - self.began,
        )
        order = run.loader.order.state(at_start=progress.position > 0)
        if run.saver.save(progress, order, hopfield=self.schedule.retrieved()):
            self._call("on_checkpoint", run.saver.last)
