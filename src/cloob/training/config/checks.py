"""What can be refused at once, before torch is imported: what does not go together, and models that are not there."""

from __future__ import annotations

import dataclasses
import os

from cloob.errors import InputError
from cloob.models.source import check_name, check_packages
from cloob.training.config import TrainConfig
from cloob.training.config.model import HEADS, AlignConfig
from cloob.training.config.pairs import PairsConfig
from cloob.training.config.run import OptimConfig, RunConfig


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as its words say; what is about files is said by what opens them.

    Raises:
        InputError: Two values exclude each other, or there is no such model or no package with an encoder.
    """
    check_combination(config)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # one that ended alone would leave the others waiting for it
        return
    if config.run.fsdp:
        raise fsdp_alone()
    check_packages(config.align.encoders())
    if config.towers.model is not None and config.towers.init is None:
        check_name(config.towers.model)


def check_combination(config: TrainConfig) -> None:
    """Refuses a run without data, and what needs trained weights, held-out pairs or a frozen tower without them.

    Raises:
        InputError: No ``data``, both ``init`` and ``init_image``, ``average_with_start`` without ``init``, ``patience``
            without ``val_data``, ``unlocked`` without ``freeze``, ``restarts`` without their schedule,
            ``compile_backend`` without ``compile``, ``retrieval_from`` with held-out pairs judged by the loss, which it
            changes; or as ``aligns``.
    """
    towers = config.towers
    if config.loss.retrieval_from and config.pairs.holds_out and config.save.best == "val_loss":
        raise InputError(
            "the loss is another from retrieval_from on, so it cannot tell the best; give --best val_recall"
        )
    if towers.init is not None and towers.init_image is not None:
        raise InputError(f"init is {towers.init!r}, init_image {towers.init_image!r}; a run starts from one of them")
    if towers.unlocked and towers.freeze == "none":
        raise InputError(f"unlocked is {towers.unlocked}, but no tower is frozen; add --freeze image or --freeze text")
    if config.optim.restarts != OptimConfig.restarts and config.optim.schedule != "cosine-restarts":
        raise InputError(
            f"restarts is {config.optim.restarts}, but the schedule is {config.optim.schedule!r}; "
            "add --schedule cosine-restarts"
        )
    if config.run.patience and not config.pairs.holds_out:
        raise InputError(
            f"patience is {config.run.patience}, but there are no held-out pairs; give --val-data or --val-split, "
            "or --patience 0"
        )
    if config.pairs.val_every > 1 and not config.pairs.holds_out:
        raise InputError(
            f"val_every is {config.pairs.val_every}, but there are no held-out pairs; give --val-data or --val-split"
        )
    if config.run.compile_backend != RunConfig.compile_backend and not config.run.compile:
        raise InputError(f"compile_backend is {config.run.compile_backend!r}, but nothing is compiled; add --compile")
    if config.loss.init_scales and towers.init is None:
        raise InputError("init_scales needs a model that was trained; give --init")
    if towers.average_with_start is not None and towers.init is None:
        raise InputError("average_with_start needs the trained weights of a start; give --init")
    aligns(config)
    if not config.pairs.data:
        raise InputError(
            "data is missing; give --data with your pairs (a table such as pairs.csv, shards, or a folder of images "
            "with .txt files beside them), or --data demo for the set that comes along"
        )


def aligns(config: TrainConfig) -> bool:
    """Whether a configuration is about heads on frozen encoders.

    Raises:
        InputError: One encoder is given without the other, or with what makes no sense for heads; or none, but
            something of the heads and no ``init``, which may hold some.
    """
    align, towers = config.align, config.towers
    given = (align.image_encoder, align.text_encoder)
    if not any(given):
        if towers.init is None:
            check_no_heads(align)
        return False
    if not all(given):
        missing = "text_encoder" if align.image_encoder else "image_encoder"
        raise InputError(f"{missing} is missing: heads need both --image-encoder and --text-encoder")
    for key, value in (("model", towers.model), ("init", towers.init), ("init_image", towers.init_image)):
        if value is not None:
            raise InputError(f"{key} is {value!r}, but the encoders are given by --image-encoder and --text-encoder")
    check_heads_alone(config)
    return True


def check_heads_alone(config: TrainConfig) -> None:
    """Refuses what makes no sense where nothing but heads is trained."""
    run, towers = config.run, config.towers
    for key in ("fsdp", "compile", "grad_checkpointing"):
        if getattr(run, key):
            raise InputError(f"{key} is True, but heads on frozen encoders are too small for it; leave it out")
    unused = [(config.pairs, PairsConfig, key) for key in ("data_weights", "shuffle_buffer", "flip", "crop_scale")]
    for part, kind, key in (*unused, (config.optim, OptimConfig, "layer_decay")):
        if getattr(part, key) != getattr(kind, key):
            raise InputError(f"{key} is {getattr(part, key)}, but heads train on features made once; leave it out")
    if towers.freeze != "none":
        raise InputError(f"freeze is {towers.freeze!r}, but both encoders are frozen anyway; leave it out")


def check_no_heads(align: AlignConfig) -> None:
    """Refuses settings of heads where there are none."""
    for key, value in dataclasses.asdict(align).items():
        if value not in (None, HEADS.get(key)):  # which the config.json of an earlier run has filled in
            raise InputError(
                f"{key} is {value}, but there are no heads; give --image-encoder and --text-encoder, or leave it out"
            )


def fsdp_alone() -> InputError:
    """The error of shards for one process."""
    return InputError("fsdp is True, but there is one process; start several with torchrun, or leave it out")
