"""From a configuration and custom parts to a ``Run``, every part checked before the
first step.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from cloob.data.batch import Batch
from cloob.data.loader import Loader
from cloob.distributed import Layout, gather_objects, on_rank_zero, rank, world_size
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.machine import warn_of_emulated_bfloat16
from cloob.models.encoder import DualEncoder
from cloob.models.load import load_model
from cloob.models.runs import RUN_CONFIG_FILE
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective, make_objective
from cloob.settings import SCALES
from cloob.training import sharding
from cloob.training.callbacks import Metrics
from cloob.training.checkpoint import (
    HELD_OUT,
    TRAINING,
    Checkpoint,
    Saver,
    find_checkpoint,
    remove_leftovers,
)
from cloob.training.config import TrainConfig
from cloob.training.custom_modules import (
    BatchObjective,
    GivenObjective,
    GivenTowers,
    takes,
)
from cloob.training.custom_parts import CustomParts, is_family
from cloob.training.faults import Fetched, StopSignal, fetch
from cloob.training.generators import set_rng_state
from cloob.training.optim import freeze, make_optimizer, warmup_steps
from cloob.training.pairs import make_loader, open_pairs, same_on_every_rank
from cloob.training.preflight import check_combination
from cloob.training.progress import Progress
from cloob.training.run_folder import (
    prepare_run_folder,
    progress_of,
    refuse_another_run,
)
from cloob.training.run_log import BadSamples, RunLog
from cloob.training.step import StepBatch, Stepper, TowersWithLoss

logger = logging.getLogger(__name__)
DEFAULT_MODEL = "RN50"


@dataclass(frozen=True)
class Run:
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
    hands_over_ids: bool  # to the objective
    metrics: Metrics | None  # the caller's
    stop: StopSignal = field(default_factory=StopSignal)

    def fetch(self, batches: Iterator[Batch]) -> Fetched:
        """The next of a loader's batches; every rank raises the same."""
        return fetch(batches, self.stop, self.stepper.device, self.saver.last)

    def step_batch(self, batch: Batch, layout: Layout, *, hopfield: bool) -> StepBatch:
        """A batch that lies on the device, as towers and objective take it."""
        ids = batch.ids if self.hands_over_ids else None
        return StepBatch(batch.parts, layout, ids, hopfield)


def assemble(config: TrainConfig, custom: CustomParts, device: torch.device) -> Run:
    """Builds a run, or takes it up where its checkpoint left it; every rank calls this.

    Raises RunFinished if nothing is left to do.

    The run folder is touched last, the optimiser made after all that replaces
    parameters.
    """
    check_combination(config)
    checkpoint = find_checkpoint(config)
    on_rank_zero(lambda: refuse_another_run(config))
    pairs, held_out = open_pairs(config, custom.pairs, custom.held_out)
    config = fit_batch(config, len(pairs))
    encoder = make_encoder(config, custom.towers)
    freeze(encoder, config.freeze)
    objective = make_loss(config, custom.objective)
    config = resolved(config, encoder, objective, device)
    data = {TRAINING: same_on_every_rank(pairs)}
    if held_out is not None:
        data[HELD_OUT] = same_on_every_rank(held_out)

    progress = Progress()
    if checkpoint is not None:
        progress = progress_of(checkpoint, config, data, objective)
    order = custom.order(len(pairs), config)
    loader = make_loader(pairs, encoder, config, device, order=order)
    val_loader = None
    if held_out is not None:
        val_loader = make_loader(held_out, encoder, config, device, train=False)
    stepper = _make_stepper(config, custom, encoder, objective, device)
    saver = Saver(config, stepper, data)
    if checkpoint is not None:
        saver.restore(checkpoint)
        loader.order.load(checkpoint.state["order"])

    on_rank_zero(lambda: prepare_run_folder(config, saver.last))
    _seed_process(config.seed, checkpoint, device)
    if rank() == 0:
        remove_leftovers(config.out)
        write_whole(config.out / RUN_CONFIG_FILE, config.to_json())
    resumed = progress if config.resume != "none" else None
    log = RunLog(config.out, resumed, writes=rank() == 0)
    return Run(
        config=config,
        encoder=encoder,
        objective=objective,
        loader=loader,
        val_loader=val_loader,
        towers=stepper.module,
        stepper=stepper,
        progress=progress,
        saver=saver,
        log=log,
        bad=BadSamples(progress, loader, config.max_bad_fraction, log),
        hands_over_ids=config.mask_duplicates or isinstance(objective, GivenObjective),
        metrics=custom.metrics,
    )


def fit_batch(config: TrainConfig, pairs: int) -> TrainConfig:
    """The configuration with a batch size for the number of training pairs: of few, 16
    to 32 steps an epoch.
    """
    if config.batch_size:
        return config
    power = 1 << max(pairs // 16, 1).bit_length() - 1
    size = max(2, 2 * world_size(), min(pairs, 256, max(8, power)))
    config = config.override(batch_size=size)
    if rank() == 0:
        steps = config.total_steps(pairs // size)
        logger.info(
            f"{pairs:,} pairs: batch size {size}, {steps:,} steps, warm-up"
            f" {warmup_steps(config, steps):,}"
        )
    return config


def make_encoder(config: TrainConfig, towers: nn.Module | None = None) -> DualEncoder:
    """The towers to start from, on the CPU: given, by name, or loaded."""
    if towers is not None:
        return GivenTowers(towers, config.image_size)
    if config.init is None:
        name = config.model or DEFAULT_MODEL
        return create_model(name, image_size=config.image_size, seed=config.seed)
    encoder = load_model(config.init, device="cpu")
    encoder.check_weights()
    if encoder.config.kind not in ("open_clip", "towers"):
        raise InputError(
            f"init {config.init!r} holds no towers; `cloob train align` and `cloob"
            " train vectors` begin anew"
        )
    return encoder


def make_loss(config: TrainConfig, custom: nn.Module | None) -> ContrastiveObjective:
    """The caller's loss, else the configuration's; over several ranks it gathers."""
    if custom is None:
        try:
            return make_objective(
                config.objective, gather=world_size() > 1, **config.given_scales()
            )
        except (ValueError, TypeError) as error:
            raise InputError(f"objective {config.objective!r}: {error}") from error
    if isinstance(custom, ContrastiveObjective) and is_family(custom):
        custom.gather = world_size() > 1
        return custom
    kind = BatchObjective if takes(custom, "batch") else GivenObjective
    return kind(custom)  # type: ignore[return-value] # has what training uses


def resolved(
    config: TrainConfig,
    encoder: DualEncoder,
    objective: ContrastiveObjective,
    device: torch.device,
) -> TrainConfig:
    """The configuration with every default that was chosen while building filled in;
    every rank calls this.
    """
    if config.given_towers is None and config.init is None:
        model = config.model or encoder.name
        config = config.override(model=model, image_size=encoder.image_size)
    if config.given_objective is None:
        config = config.override(**_chosen_scales(config, objective))
    if config.precision == "auto":
        every_rank_can = all(gather_objects(_computes_in_bfloat16(device)))
        config = config.override(precision="bf16" if every_rank_can else "fp32")
    if config.precision == "bf16" and device.type == "cpu" and rank() == 0:
        warn_of_emulated_bfloat16()
    return config


def _chosen_scales(
    config: TrainConfig, objective: ContrastiveObjective
) -> dict[str, object]:
    """The objective's scales that the configuration leaves open."""
    names = [name for name in SCALES if getattr(config, name) is None]
    if not objective.hopfield:
        names = [name for name in names if "beta" not in name]
    chosen = objective.config()
    return {name: chosen[name] for name in names if name in chosen}


def _computes_in_bfloat16(device: torch.device) -> bool:
    """A CPU that does so by itself looks like those that emulate it."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def prepare_towers(
    encoder: DualEncoder, config: TrainConfig, device: torch.device
) -> None:
    """Readies towers for training, in place and with the same names of parameters; the
    optimiser is made afterwards.
    """
    # On a CPU it costs the statistics of batch norms three digits.
    on_cpu = device.type == "cpu"
    encoder.set_channels_last(not (on_cpu and _trains_batch_norm(encoder)))
    if config.compile:
        # In place, since a wrapper would put its name into every key of the checkpoint.
        # The two passes of gradient caching are compiled apart and must draw the same
        # random numbers.
        same_draws = {"fallback_random": True} if config.micro_batch_size else None
        encoder.compile(options=same_draws)
    if config.fsdp:
        sharding.shard(encoder, device)


def _trains_batch_norm(encoder: nn.Module) -> bool:
    norms = (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    return any(p.requires_grad for norm in norms for p in norm.parameters())


def _make_stepper(
    config: TrainConfig,
    custom: CustomParts,
    encoder: DualEncoder,
    objective: ContrastiveObjective,
    device: torch.device,
) -> Stepper:
    """Towers, objective and optimiser on the device, ready for steps."""
    encoder.to(device)
    objective.to(device)
    prepare_towers(encoder, config, device)
    optimizer = make_optimizer(encoder, objective, config, device, custom.optimizer)
    towers = TowersWithLoss(encoder, objective, config.precision)
    # Gradient caching embeds twice: not for a batch that is a micro-batch already, on
    # the rank that has most of it.
    micro = config.micro_batch_size
    if micro >= -(-config.batch_size // world_size()):
        micro = 0
    return Stepper(towers, optimizer, config.clip_grad_norm, micro, config.ema)


def _seed_process(
    seed: int, checkpoint: Checkpoint | None, device: torch.device
) -> None:
    """Sets the generators that a tower may draw from: to those of the checkpoint, if it
    has any of this rank.
    """
    of_rank = seed + rank()
    torch.manual_seed(of_rank)
    random.seed(of_rank)
    np.random.seed(of_rank % 2**32)  # noqa: NPY002
    if checkpoint is not None and rank() < len(checkpoint.state["rng"]):
        set_rng_state(checkpoint.state["rng"][rank()], device)
