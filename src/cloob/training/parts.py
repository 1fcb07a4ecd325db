"""What a run is made of, built from its configuration and taken up from a checkpoint if there is one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cloob.data.fingerprint import Fingerprint
from cloob.data.loader import Loader
from cloob.data.source import Source
from cloob.data.vectors import VectorPairs
from cloob.distributed import rank, world_size
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.aligned import AlignedEncoder
from cloob.models.encoder import DualEncoder
from cloob.models.fingerprint import fingerprint
from cloob.models.runs import RUN_CONFIG_FILE
from cloob.objective import ContrastiveObjective
from cloob.training import build, finetune
from cloob.training.config import TrainConfig
from cloob.training.config.checks import check_combination
from cloob.training.course import Progress
from cloob.training.faults import BadSamples
from cloob.training.optim import WeightAverage, make_optimizer
from cloob.training.ranks import gather_objects, on_rank_zero
from cloob.training.state import resume
from cloob.training.state.checkpoint import HELD_OUT, TRAINING, Saver, remove_leftovers
from cloob.training.state.rng import seed_generators
from cloob.training.state.run_folder import prepare_run_folder, refuse_another_run
from cloob.training.step import Stepper, TowersWithLoss
from cloob.training.towers import prepare_towers
from cloob.training.watch.log import RunLog


@dataclass(frozen=True)
class Parts:
    """All that the loop works with, on this rank."""

    config: TrainConfig  # with every default filled in
    device: torch.device
    encoder: DualEncoder
    objective: ContrastiveObjective
    loader: Loader
    val_loader: Loader | None
    held_out: str  # the name of the held-out pairs
    average: WeightAverage | None
    towers: TowersWithLoss  # as the steps train them
    judged: TowersWithLoss  # with the weights that are exported: the same, or on the average
    stepper: Stepper
    progress: Progress
    resumed_from: Path | None
    saver: Saver
    log: RunLog
    bad: BadSamples

    def close(self) -> None:
        """Ends the loaders' workers and closes the log."""
        for loader in (self.loader, self.val_loader):
            if loader is not None:
                loader.close()
        self.log.close()


# Long: what a run is made of, one after the other, and none of it can be moved.
def assemble(config: TrainConfig, device: torch.device) -> Parts:
    """Builds a run, or takes it up where its checkpoint left it; every rank calls this.

    The order matters: the run folder is touched only once towers, data and checkpoint could be opened, and the
    optimiser is made after everything that replaces parameters.

    Raises:
        InputError: Something the user gave is wrong, or the run folder cannot be written.
        AlreadyFinished: There is nothing left to do.
    """
    check_combination(config)
    checkpoint = resume.find_checkpoint_on_every_rank(config.save.out, config.save.resume)
    on_rank_zero(lambda: refuse_another_run(config, checkpoint))
    source, held_out = build.open_all(config)
    config = build.fit_batch(config, len(source))
    encoder = build.make_encoder(config, source)
    began = config.towers.init is not None and checkpoint is None
    progress = Progress(start=on_rank_zero(lambda: fingerprint(encoder)) if began else "")
    finetune.freeze(encoder, config.towers.freeze, config.towers.unlocked)
    objective = build.make_loss(config, encoder)
    config = build.resolved(config, encoder, objective, device)
    sources = {TRAINING: source} | ({} if held_out is None else {HELD_OUT: held_out})
    data = {name: _same_on_every_rank(pairs) for name, pairs in sources.items()}
    if checkpoint is not None:  # before all pairs go through frozen encoders, which may take hours
        resume.check_same_data(checkpoint, data, accept=config.save.accept_changed_data)
    loader = build.make_loader(source, encoder, config, device)
    val_loader = build.make_val_loader(held_out, encoder, config) if held_out is not None else None
    if checkpoint is not None:
        resume.stop_if_finished(checkpoint, config, data, loader.steps_per_epoch, encoder, objective)
    encoder.to(device)
    objective.to(device)
    average = WeightAverage(encoder, config.optim.ema) if config.optim.ema else None
    prepare_towers(encoder, config.run, device)
    optimizer = make_optimizer(encoder, objective, config.optim, device)
    if checkpoint is not None:
        progress = resume.progress_of(checkpoint, config, data, loader.pairs_per_epoch)
        resume.restore(checkpoint, encoder=encoder, objective=objective, optimizer=optimizer, average=average)
    towers = TowersWithLoss(encoder, objective, config.run.precision)
    judged = TowersWithLoss(average.encoder, objective, config.run.precision) if average is not None else towers
    stepper = Stepper(towers, optimizer, config.optim.clip_grad_norm, _micro_batch_size(config))
    if checkpoint is not None:
        stepper.load_state_dict(checkpoint.state["stepper"])
    towers.train()
    finetune.keep_frozen(encoder, config.towers.freeze)
    on_rank_zero(lambda: prepare_run_folder(config, checkpoint))
    seed_generators(config.run.seed, checkpoint.state["rng"] if checkpoint else [], device)

    resumed = None if checkpoint is None else (checkpoint.path, checkpoint.progress)
    saver = Saver(config, encoder, objective, stepper, average, device, loader.pairs_per_epoch, data, resumed)
    if rank() == 0:
        remove_leftovers(config.save.out)
        write_whole(config.save.out / RUN_CONFIG_FILE, config.to_json())
    cut = checkpoint is not None and 0 < checkpoint.progress.cut == progress.step
    kept = progress.step if config.save.resume != "none" else None
    log = RunLog(config.save.out, kept, cut=cut, writes=rank() == 0)
    aligned = isinstance(encoder, AlignedEncoder)  # its features were checked when they were made or read
    limit = 1.0 if aligned else config.pairs.max_bad_fraction
    return Parts(
        config=config,
        device=device,
        encoder=encoder,
        objective=objective,
        loader=loader,
        val_loader=val_loader,
        held_out=held_out.name if held_out is not None else "",
        average=average,
        towers=towers,
        judged=judged,
        stepper=stepper,
        progress=progress,
        resumed_from=checkpoint.path if checkpoint else None,
        saver=saver,
        log=log,
        bad=BadSamples(progress, source.name, limit, loader.pairs_per_epoch, log),
    )


def _same_on_every_rank(pairs: Source | VectorPairs) -> Fingerprint:
    """The fingerprint of pairs; InputError where some host has others: ranks divide them by their number."""
    looks = int(os.environ.get("LOCAL_RANK", "0")) == 0  # once on each host: it may look into a hundred thousand files
    first, *others = gather_objects((len(pairs), pairs.fingerprint() if looks else {}))
    for number, (size, found) in enumerate(others, 1):
        changes = [key for key in {**first[1], **found} if found and first[1].get(key) != found.get(key)]
        if size != first[0] or changes:
            what = f"{size:,} pairs, not {first[0]:,}" if size != first[0] else f"other {', '.join(changes)}"
            raise InputError(f"{pairs.name}: rank {number} finds other data than rank 0 ({what}); give all the same")
    return first[1]


def is_async(device: torch.device) -> bool:
    """Whether the host waits when it reads a value from this device (CUDA)."""
    return device.type == "cuda"


def _micro_batch_size(config: TrainConfig) -> int:
    """Pairs whose activations this rank holds at a time; 0 for all.

    Gradient caching embeds twice: not for a batch that is a micro-batch already, on the rank that has most of it.
    """
    size = config.run.micro_batch_size
    return size if size < -(-config.run.batch_size // world_size()) else 0
