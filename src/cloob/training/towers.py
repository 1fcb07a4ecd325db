"""The towers and the objective that a run starts from, and what is done to towers before they are trained."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from cloob.data.vectors import VectorPairs
from cloob.distributed import gather_objects, rank, world_size
from cloob.errors import InputError, require
from cloob.functional.private import float32_products
from cloob.machine import warn_of_emulated_bfloat16
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.aligned.vectors import VectorEncoder
from cloob.models.encoder import DualEncoder
from cloob.models.given import GivenTowers
from cloob.models.importing import import_open_clip
from cloob.models.load import load_model
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective, make_objective
from cloob.training import align, sharding, vectors
from cloob.training.config import TrainConfig
from cloob.training.config.checks import check_start, wrong
from cloob.training.config.parts import RunConfig
from cloob.training.given import Given, Pairs, as_objective

DEFAULT_MODEL = "RN50"


def make_encoder(config: TrainConfig, pairs: Pairs | None = None, given: Given | None = None) -> DualEncoder:
    """The towers to start from, on the CPU: given, by name, loaded, frozen encoders with heads, or heads alone."""
    towers = config.towers
    if given is not None and given.towers is not None:
        return GivenTowers(given.towers, towers.image_size)
    if isinstance(pairs, VectorPairs):
        return vectors.make_vector_encoder(config, pairs)
    if config.align.encoders():
        return align.make_aligned(config)
    if towers.init is None:
        return create_model(towers.model or DEFAULT_MODEL, image_size=towers.image_size, seed=config.run.seed)
    encoder = load_model(towers.init, device="cpu")
    encoder.check_weights()
    holds = f"init {towers.init!r} holds"
    if isinstance(encoder, VectorEncoder):
        wrong(f"{holds} heads for vectors; `cloob train vectors` begins anew")
    check_start(config, aligned=isinstance(encoder, AlignedEncoder))
    settings = {"model": encoder.name, "image_size": encoder.image_size}
    if isinstance(encoder, AlignedEncoder):
        encoder.on_features = True
        settings |= align.head_settings(encoder)
    for key, value in settings.items():
        configured = (vars(towers) | vars(config.align))[key]
        if configured not in (None, value):
            wrong(f"{key} is {configured!r}, but {holds} {value!r}; leave it out, also of --config")
    return encoder


def make_loss(config: TrainConfig, given: Given) -> ContrastiveObjective:
    """The configuration's objective, gathering over several ranks, or the one that was given."""
    if given.objective is not None:
        return as_objective(given.objective)
    if config.loss.objective == "cca":
        return align.ClosedForm()
    try:
        return make_objective(config.loss.objective, gather=world_size() > 1, **config.loss.overrides())
    except (ValueError, TypeError) as error:
        raise InputError(f"objective {config.loss.objective!r}: {error}") from error


def resolved(
    config: TrainConfig, encoder: DualEncoder, objective: ContrastiveObjective, device: torch.device
) -> TrainConfig:
    """The configuration with every default that was chosen while building filled in; every rank calls this."""
    leaves: dict[str, Any] = {}
    if config.given.given_objective is None and config.loss.objective != "cca":
        chosen = objective.config()
        names = ["inv_tau", "learnable_inv_tau", "learnable_beta", "scale", *(["beta"] if objective.hopfield else [])]
        names += [] if objective.bias is None else ["bias"]
        leaves = {name: chosen[name] for name in names if getattr(config.loss, name) is None}
    if isinstance(encoder, AlignedEncoder):
        leaves |= align.head_settings(encoder)
    elif config.towers.init is None and config.given.given_towers is None:
        leaves |= {"model": config.towers.model or encoder.name, "image_size": encoder.image_size}
    if config.run.precision == "auto":
        # A CPU that computes in bfloat16 by itself cannot be told from those that emulate it.
        has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        leaves["precision"] = "bf16" if all(gather_objects(has_bfloat16)) else "fp32"
    if config.run.channels_last is None:
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        trained = any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
        leaves["channels_last"] = not (trained and device.type == "cpu")
    if config.run.tf32 is None:
        leaves["tf32"] = config.run.precision == "auto" and device.type == "cuda"
    if config.run.precision == "bf16" and device.type == "cpu" and rank() == 0:
        warn_of_emulated_bfloat16()
    return config.override(**leaves)


def products(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, float32 matrix products on CUDA are as the configuration says; a GPU without TF32 takes no notice."""
    return float32_products("high") if config.run.tf32 and device.type == "cuda" else contextlib.nullcontext()


def prepare_towers(encoder: DualEncoder, run: RunConfig, device: torch.device) -> None:
    """Readies towers for training, in place: memory layout, batch norm over ranks, recomputation, compilation, shards.

    Names and shapes of parameters stay, so checkpoints are the same for all. The optimiser has to be made afterwards.
    """
    encoder.set_channels_last(run.channels_last is not False)
    if run.sync_bn and world_size() > 1:
        require("timm.layers", "train").convert_sync_batchnorm(encoder)
    if run.grad_checkpointing:
        _enable_recomputation(encoder)
    if run.compile:
        # In place, since a wrapper would put its name into every key of the checkpoint. The two passes of gradient
        # caching are compiled apart and must draw the same random numbers.
        encoder.compile(options={"fallback_random": True} if run.micro_batch_size else None)
    if run.fsdp:
        sharding.shard(encoder, device)


def _enable_recomputation(encoder: DualEncoder) -> None:
    """Gradient checkpointing, by the switch of open_clip's transformers and timm's towers; others are refused."""
    visual = encoder.model.visual
    does_nothing = isinstance(visual, import_open_clip(".modified_resnet").ModifiedResNet)
    switch: Any = None if does_nothing else getattr(visual, "trunk", encoder.model)
    try:
        switch.set_grad_checkpointing(True)  # where timm refuses, open_clip would log a warning and train without
    except (AttributeError, AssertionError):
        raise InputError(
            f"grad_checkpointing is True, but the image tower of {encoder.name} has no such switch; "
            "--micro-batch-size saves memory with any tower"
        ) from None
    encoder.model.set_grad_checkpointing(True)
