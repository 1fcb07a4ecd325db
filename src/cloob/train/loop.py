"""The training loop: batches in, steps, log lines and checkpoints out; faults are skipped, counted or end the run."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cloob.data.batch import Batch
from cloob.distributed import process_group, rank, resolve_device, world_size
from cloob.errors import TrainingFailed
from cloob.files import write_whole
from cloob.functional.geometry import effective_eigenvalues, saturation
from cloob.train import build, faults, finetune, sharding
from cloob.train.average import make_average
from cloob.train.callbacks import Callback, RunInfo, RunResult
from cloob.train.checkpoint import Progress, find_checkpoint, remove_leftovers, restore
from cloob.train.config import TrainConfig
from cloob.train.faults import StopRequested, StopSignal
from cloob.train.log import RunLog, TensorBoard, finite
from cloob.train.optim import make_optimizer, make_schedule, warmup_steps
from cloob.train.preflight import check_combination
from cloob.train.ranks import Tally, gather_objects, on_rank_zero, tally
from cloob.train.rng import preserved_rng, set_rng_state
from cloob.train.saver import Saver
from cloob.train.step import Stepper, StepResult, TowersWithLoss
from cloob.train.trackers import make_trackers
from cloob.train.validate import Validation, validate

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")


def train(config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Trains two towers.

    Under ``torchrun`` each process calls this; the run folder must be visible to all of them. SIGTERM ends the run
    after the current step with a checkpoint. On the CPU in float32 the same configuration gives the same numbers, bit
    for bit, whether or not the run was interrupted and resumed.

    Args:
        config: The whole configuration.
        callbacks: Called along the way, on every rank.

    Returns:
        What the run came to; ``stopped`` says whether a signal ended it early.

    Raises:
        InputError: Something the user gave is wrong, too many samples are bad, or the disk is full.
        TrainingFailed: The loss was not finite for ``max_nonfinite`` steps in a row.
    """
    device = resolve_device(config.run.device)
    with process_group(device):
        run = _Run(config, device, callbacks)
        with StopSignal() as stop:
            result = run.go(stop)
        del run  # and with it DDP, before the group that it holds
        if config.towers.average_with_start is not None and result.stopped is None and result.checkpoint is not None:
            averaged = result.checkpoint
            on_rank_zero(lambda: finetune.write_average(config, averaged))
        return result


class _Run:
    """One run from its configuration to its result."""

    def __init__(self, config: TrainConfig, device: torch.device, callbacks: Sequence[Callback]) -> None:
        self.device = device
        self.main = rank() == 0
        out = config.save.out
        check_combination(config)
        self.encoder = build.make_encoder(config)
        finetune.freeze(self.encoder, config.towers.freeze, config.towers.unlocked)
        self.objective = build.make_loss(config)
        self.config = build.resolved(config, self.encoder, self.objective)
        source = build.open_pairs(config.pairs.data, config, config.pairs.weights)
        self.loader = build.make_loader(source, self.encoder, config, device)
        self.val_loader = None
        held_out = build.open_pairs(config.pairs.val_data, config) if config.pairs.val_data else None
        if held_out is not None:
            self.val_loader = build.make_val_loader(held_out, self.encoder, config)

        checkpoint = find_checkpoint(out, self._checkpoint_choice(config))
        on_rank_zero(lambda: build.prepare_run_folder(config, checkpoint))
        self.encoder.to(device)
        self.objective.to(device)
        self.average = make_average(self.encoder, config)
        build.prepare_towers(self.encoder, config, device)
        optimizer = make_optimizer(self.encoder, self.objective, config.optim, device)
        self.progress = Progress()
        if checkpoint is not None:
            goes_on = build.check_same_run(checkpoint, self.config, self.loader.pairs_per_epoch)
            restore(
                checkpoint, encoder=self.encoder, objective=self.objective, optimizer=optimizer, average=self.average
            )
            self.progress = checkpoint.progress
            if not goes_on:
                self.progress.begin_epoch()
            if not self.main:
                self.progress.reasons = {}
        self.towers = TowersWithLoss(self.encoder, self.objective, config.run.precision)
        self.judged_towers = self.towers
        if self.average is not None:
            self.judged_towers = TowersWithLoss(self.average.encoder, self.objective, config.run.precision)
        # Gradient caching embeds twice: not for a batch that is a micro-batch already, on the rank that has most of it.
        micro = config.run.micro_batch_size
        micro = micro if micro < -(-config.run.batch_size // world_size()) else 0
        self.stepper = Stepper(self.towers, optimizer, config.optim.clip_grad_norm, micro)
        if checkpoint is not None:
            self.stepper.load_state_dict(checkpoint.state.get("stepper", {}))
        self._seed(checkpoint.state["rng"] if checkpoint else [])

        whole = config.run.epochs * self.loader.steps_per_epoch
        self.schedule = make_schedule(config.optim, whole)
        self.retrieval_start = config.loss.retrieval_from * whole if self.objective.hopfield else math.inf
        warmup = warmup_steps(config.optim, whole)
        if self.main and warmup >= whole:
            logger.warning("the warm-up takes %d steps, the whole run has %d", warmup, whole)
        if self.main and config.towers.freeze != "none" and config.towers.init is None:
            frozen = config.towers.freeze
            logger.warning("the %s tower is frozen with random weights; --init gives trained ones", frozen)
        self.callbacks = [*callbacks, *([TensorBoard()] if config.log.tensorboard else []), *make_trackers(config.log)]
        self.resumed_from = checkpoint.path if checkpoint else None
        self.saver = Saver(
            self.config,
            self.encoder,
            self.objective,
            self.stepper,
            self.average,
            device,
            self.loader.pairs_per_epoch,
            checkpoint,
        )
        self.last_loss: float | None = None
        self.skipped: dict[str, int] = {}
        if self.main:
            remove_leftovers(out)
            write_whole(out / "config.json", self.config.to_json())
        self.log = RunLog(out, self.progress.step if config.save.resume != "none" else None, writes=self.main)
        limit = config.pairs.max_bad_fraction
        self.bad = faults.BadSamples(self.progress, source.name, limit, self.log)
        self.bad_held_out = faults.BadHeldOut(held_out.name if held_out is not None else "", limit, self.log)

    @staticmethod
    def _checkpoint_choice(config: TrainConfig) -> str:
        """What to resume from, as rank 0 sees it: all ranks must read the same checkpoint."""
        if config.save.resume == "none" or world_size() == 1:
            return config.save.resume

        def choose() -> str:
            found = find_checkpoint(config.save.out, config.save.resume)
            return "none" if found is None else str(found.path)

        return str(on_rank_zero(choose))

    def _seed(self, states: list[dict[str, Any]]) -> None:
        """Generators of this rank: the checkpoint's, or fresh ones."""
        seed = self.config.run.seed + rank()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (whatever a tower may draw from)
        if rank() < len(states):
            set_rng_state(states[rank()], self.device)

    def go(self, stop: StopSignal) -> RunResult:
        """Runs to the end, to a signal or to an exception."""
        info = RunInfo(
            run=self.config.save.out,
            config=self.config,
            encoder=self.encoder,
            objective=self.objective,
            device=self.device,
            total_steps=self.progress.step + self._steps_left(),
            steps_per_epoch=self.loader.steps_per_epoch,
            start_step=self.progress.step,
            average=self.average.encoder if self.average else None,
            rank=rank(),
            resumed_from=self.resumed_from,
        )
        result = None
        self.began = time.perf_counter() - self.progress.seconds
        try:
            self._call("on_start", info)
            stopped = False
            while not stopped and self.progress.epoch < self.config.run.epochs and not self._out_of_patience():
                stopped = self._epoch(stop)
            self._save()
            result = self._result("SIGTERM" if stopped else None)
            return result
        finally:
            self._close()
            self._call("on_end", result)

    def _close(self) -> None:
        for loader in (self.loader, self.val_loader):
            if loader is not None:
                loader.close()
        self.log.close()

    def _call(self, event: str, *arguments: object) -> None:
        with preserved_rng(self.device):
            for callback in self.callbacks:
                getattr(callback, event)(*arguments)

    def _result(self, stopped: str | None) -> RunResult:
        return RunResult(
            run=self.config.save.out,
            steps=self.progress.step,
            epochs=self.progress.epoch,
            samples_seen=self.progress.samples_seen,
            seconds=time.perf_counter() - self.began,
            loss=self.last_loss,
            checkpoint=self.saver.last,
            stopped=stopped,
            skipped=self.skipped,
        )

    def _epoch(self, stop: StopSignal) -> bool:
        """The rest of the current epoch. Returns whether a signal ended it."""
        progress, save_every, size = self.progress, self.config.save.save_every, self.config.run.batch_size
        start, offset = divmod(progress.position, size)
        # An epoch keeps its order at another world size and batch size.
        progress.lanes = progress.lanes or self.loader.lanes
        progress.order_batch_size = progress.order_batch_size or size
        batches = self.loader.epoch(
            progress.epoch, start, progress.lanes, offset=offset, order_batch_size=progress.order_batch_size
        )
        steps = self.loader.steps(offset)
        self.towers.train()
        finetune.keep_frozen(self.encoder, self.config.towers.freeze)
        for index in range(start, steps):
            began = time.perf_counter()
            with preserved_rng(_CPU):
                batch, fault = faults.fetch(batches, stop)
            stop.ignore_children()  # only now: torch sets its own handler when the workers begin
            waited = time.perf_counter() - began
            good, bad = (len(batch), len(batch.skipped)) if batch else (0, 0)
            counts = tally(good, bad, stop.requested, self.device, fault is not None)
            if counts.fault:
                faults.raise_on_every_rank(fault, self.saver.last)
            if counts.stop:
                return True
            assert batch is not None
            self.bad.count(batch, counts)
            self._step(batch, counts, began, waited)
            progress.position = offset + (index + 1) * size
            last = index + 1 == steps
            if save_every and progress.step % save_every == 0 and not last:
                self._save()
        try:
            best = self._end_epoch(stop)
        except StopRequested:  # the epoch's checkpoint is written without its validation, which resuming makes good
            return True
        if best or not save_every or progress.step % save_every == 0:
            self._save()
        return False

    def _place(self) -> int:
        """The step at which a run of this batch size alone would stand; ``progress.step`` if no other came before."""
        return self.progress.epoch * self.loader.steps_per_epoch + self.progress.position // self.config.run.batch_size

    def _steps_left(self) -> int:
        """Steps from here to the end of the last epoch."""
        later = self.config.run.epochs - self.progress.epoch - 1
        if later < 0:
            return 0
        start, offset = divmod(self.progress.position, self.config.run.batch_size)
        return self.loader.steps(offset) - start + later * self.loader.steps_per_epoch

    def _out_of_patience(self) -> bool:
        """Whether the held-out pairs have found nothing better for ``patience`` epochs."""
        return 0 < self.config.run.patience <= self.progress.stale

    def _step(self, batch: Batch, counts: Tally, began: float, waited: float) -> None:
        """One optimiser step, or one that is left out, and its line in the log."""
        progress = self.progress
        place = self._place()
        lr = self.schedule(place)
        # A function of the place alone: a run that goes on finds the objective as one that was not stopped.
        self.objective.hopfield = place >= self.retrieval_start
        progress.step += 1
        result, why = None, None
        if counts.samples < 2 or counts.smallest < 1:
            why = "too few usable samples"
        else:
            batch = batch.to(self.device, non_blocking=True)
            ids = batch.ids if self.config.loss.mask_duplicates else None
            result = self.stepper(batch.images, batch.tokens, ids, lr)
            why = None if result.finite else "overflow" if result.overflow else "not finite"
        if result is not None and result.finite:
            self.last_loss = result.loss
            progress.samples_seen += counts.samples
            progress.loss_sum += result.loss
            progress.loss_steps += 1
            progress.nonfinite = 0
            if self.average is not None:
                self.average.update(self.encoder)
        line: dict[str, Any] = {
            "step": progress.step,
            "epoch": progress.epoch + 1,
            "samples_seen": progress.samples_seen,
            "loss": finite(result.loss) if result else None,
            "lr": lr,
            "grad_norm": finite(result.grad_norm) if result else None,
            "inv_tau": float(self.objective.inv_tau.detach()),
            "beta": float(self.objective.beta.detach()) if self.objective.hopfield else None,
        }
        if self.config.optim.layer_decay < 1:
            line["lr_lowest"] = lr * min(group["lr_scale"] for group in self.stepper.optimizer.param_groups)
        if result is not None and self.config.run.precision == "fp16":
            line["loss_scale"] = result.loss_scale
        if result is not None and result.finite and progress.step % self.config.log.log_every == 0:
            line |= self._measure(result)
        elapsed = time.perf_counter() - began
        line |= {"images_per_second": counts.samples / elapsed, "data_wait": waited / elapsed}
        if why is not None:
            line["skipped"] = why
        self.log.write("metrics", line)
        self._call("on_step", line)
        if why == "not finite" and result is not None:
            self._nonfinite(batch, result, lr)

    def _measure(self, result: StepResult) -> dict[str, float]:
        """Saturation and effective eigenvalues of the whole batch, all ranks together."""
        parts = gather_objects((result.image_features.cpu(), result.text_features.cpu()))
        images, texts = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        return {
            "saturation": float(saturation(images, texts, float(self.objective.inv_tau.detach()))),
            "effective_eigenvalues_image": int(effective_eigenvalues(images)),
            "effective_eigenvalues_text": int(effective_eigenvalues(texts)),
        }

    def _nonfinite(self, batch: Batch, result: StepResult, lr: float) -> None:
        """Writes down which samples were in a step whose loss was not finite; ends the run if there were too many."""
        progress = self.progress
        progress.nonfinite += 1
        step, in_a_row = progress.step, progress.nonfinite
        path, keys = faults.report_nonfinite(self.config.save.out, step, progress.epoch + 1, lr, result, batch.keys)
        if in_a_row >= self.config.run.max_nonfinite:
            some = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
            kept = f"the last checkpoint is {self.saver.last}" if self.saver.last else "there is no checkpoint"
            raise TrainingFailed(
                f"step {step}: loss or gradient not finite for {in_a_row} steps in a row "
                f"(samples {some}; all in {path}); {kept}; a lower --lr or --clip-grad-norm may help"
            )
        if self.main:
            logger.warning("step %d: loss or gradient not finite, step skipped; samples in %s", step, path)

    def _end_epoch(self, stop: StopSignal) -> bool:
        """Looks back on the epoch: bad samples, validation, its line in the log; then turns to the next.

        Returns:
            Whether the held-out pairs say that these weights are the best so far.

        Raises:
            StopRequested: The run was told to end while it validated; the epoch is not over then.
        """
        progress = self.progress
        self.bad.check()
        self.skipped = self.bad.reasons()
        validation = self._validate(stop)
        progress.epoch += 1
        # Weights after a step that was not finite are not saved, so they cannot be the best.
        best = validation is not None and not progress.nonfinite and self.saver.judged(progress.step, validation)
        progress.stale = 0 if best else progress.stale + 1
        line = {
            "epoch": progress.epoch,
            "step": progress.step,
            "samples_seen": progress.samples_seen,
            "loss": progress.loss_sum / progress.loss_steps if progress.loss_steps else None,
            **(validation or Validation(None, None)).metrics(),
            "skipped": self.skipped,
            **({"val_skipped": validation.reasons()} if validation and validation.skipped else {}),
            "seconds": time.perf_counter() - self.began,
        }
        progress.begin_epoch()
        self.log.write("epochs", line)
        self._call("on_epoch_end", line)
        return best

    def _validate(self, stop: StopSignal) -> Validation | None:
        """What the held-out pairs say of the weights that are exported; None without such pairs."""
        if self.val_loader is None:
            return None
        if world_size() > 1:  # what is judged is what is exported: rank 0's running statistics
            sharding.share_buffers(self.judged_towers)
        masked = self.config.loss.mask_duplicates
        with preserved_rng(self.device):
            found = validate(
                self.judged_towers,
                self.val_loader,
                self.device,
                mask_duplicates=masked,
                stop=stop,
                last_checkpoint=self.saver.last,
            )
        self.bad_held_out.check(found, self.progress)
        return found

    def _save(self) -> None:
        """Writes a checkpoint unless this step has one; on every rank, since each gives a part of the state."""
        seconds = time.perf_counter() - self.began
        written = self.saver.save(dataclasses.replace(self.progress, reasons=self.bad.reasons(), seconds=seconds))
        if written is not None:
            self._call("on_checkpoint", written)
