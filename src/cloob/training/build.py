"""From a configuration to the things a run is made of, each checked before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cloob.data.loader import Loader
from cloob.distributed import on_rank_zero, rank, world_size
from cloob.files import write_whole
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.encoder import DualEncoder
from cloob.models.runs import OBJECTIVES_FILE, RUN_CONFIG_FILE
from cloob.objective import ContrastiveObjective
from cloob.training import finetune, resume
from cloob.training.align import FeatureLoader
from cloob.training.bad_samples import BadSamples
from cloob.training.checkpoint import HELD_OUT, TRAINING, Saver, find_checkpoint, remove_leftovers, restore
from cloob.training.clean import write_left_out
from cloob.training.config import TrainConfig
from cloob.training.config.checks import check_combination
from cloob.training.given import Given, optimizer_of
from cloob.training.log import RunLog
from cloob.training.pairs import fit_batch, make_loader, open_pairs, same_on_every_rank
from cloob.training.progress import Progress
from cloob.training.random_state import seed_generators
from cloob.training.run_folder import prepare_run_folder, refuse_another_run
from cloob.training.step import Stepper, TowersWithLoss
from cloob.training.towers import make_encoder, make_loss, prepare_towers, resolved


@dataclass(frozen=True)
class Run:
    """All that the loop works with, on this rank."""

    config: TrainConfig  # with every default filled in
    encoder: DualEncoder
    objective: ContrastiveObjective
    loader: Loader
    val_loader: Loader | None
    towers: TowersWithLoss
    stepper: Stepper
    progress: Progress
    saver: Saver
    log: RunLog
    bad: BadSamples

    @property
    def hands_over_ids(self) -> bool:
        """Whether the objective gets the pairs' ids."""
        return self.config.loss.mask_duplicates or self.config.given.given_objective is not None

    def close(self) -> None:
        for loader in (self.loader, self.val_loader):
            if loader is not None:
                loader.close()
        self.log.close()


def assemble(
    config: TrainConfig, given: Given, device: torch.device, choose: Callable[[TrainConfig], dict[str, Any]]
) -> Run:
    """Builds a run, or takes it up where its checkpoint left it; every rank calls this.

    The order matters: the run folder is touched only once towers, data and checkpoint could be opened, and the
    optimiser is made after everything that replaces parameters.
    ``choose`` finds the objective for ``auto``. Ended where nothing is left to do, or a signal ended that choice.
    """
    check_combination(config)
    checkpoint = find_checkpoint(config.save.out, config.save.resume)
    resumed = checkpoint.path if checkpoint else None
    on_rank_zero(lambda: refuse_another_run(config, resumed))
    choice: dict[str, Any] | None = None
    if config.loss.objective == "auto":
        choice = choose(config)
        config = config.override(objective=choice["chosen"], **choice["settings"])
    pairs, held_out = open_pairs(config, given)
    config = fit_batch(config, len(pairs))
    encoder = make_encoder(config, pairs, given)
    finetune.freeze(encoder, config.towers.freeze)
    objective = make_loss(config, given)
    config = resolved(config, encoder, objective, device)
    both = {TRAINING: pairs} | ({} if held_out is None else {HELD_OUT: held_out})
    data = {name: same_on_every_rank(each) for name, each in both.items()}
    # Before all pairs go through frozen encoders, which may take hours.
    progress = resume.progress_of(checkpoint, config, data, objective) if checkpoint else Progress()
    loader = make_loader(pairs, encoder, config, device)
    val_loader = make_loader(held_out, encoder, config, device, train=False) if held_out is not None else None
    encoder.to(device)
    objective.to(device)
    prepare_towers(encoder, config.run, device)
    optimizer = optimizer_of(given.optimizer, encoder, objective, config.optim, device)
    towers = TowersWithLoss(encoder, objective, config.run.precision)
    # Gradient caching embeds twice: not for a batch that is a micro-batch already, on the rank that has most of it.
    micro, share = config.run.micro_batch_size, -(-config.run.batch_size // world_size())
    stepper = Stepper(towers, optimizer, config.optim.clip_grad_norm, micro if micro < share else 0, config.optim.ema)
    if checkpoint is not None:
        restore(checkpoint, stepper)
    on_rank_zero(lambda: prepare_run_folder(config, resumed))
    seed_generators(config.run.seed, checkpoint.state["rng"] if checkpoint else [], device)

    saver = Saver(config, stepper, data, resumed)
    if rank() == 0:
        remove_leftovers(config.save.out)
        write_whole(config.save.out / RUN_CONFIG_FILE, config.to_json())
        if isinstance(loader, FeatureLoader) and loader.left_out is not None:
            write_left_out(config.save.out, loader.left_out)
        if choice is not None:
            write_whole(config.save.out / OBJECTIVES_FILE, json.dumps(choice, indent=2))
    log = RunLog(config.save.out, progress.step if config.save.resume != "none" else None, writes=rank() == 0)
    # The features that heads train on were checked when they were made or read.
    limit = 1.0 if isinstance(encoder, AlignedEncoder) else config.pairs.max_bad_fraction
    bad = BadSamples(progress, loader, limit, log)
    return Run(config, encoder, objective, loader, val_loader, towers, stepper, progress, saver, log, bad)
