"""What can be refused before torch is imported: what does not go together, and models that are not there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from cloob.errors import InputError
from cloob.models.source import check_name, check_packages
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEADS, RETRIEVING, AlignConfig, OptimConfig, PairsConfig, RunConfig


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as its words say; what is about files is said by what opens them.

    Raises:
        InputError: Two values exclude each other, or there is no such model or no package with an encoder.
    """
    check_combination(config)
    if _processes() > 1:  # one that ended alone would leave the others waiting for it
        return
    check_packages(config.align.encoders())
    if config.towers.model is not None and config.towers.init is None:
        check_name(config.towers.model)


def check_combination(config: TrainConfig) -> None:
    """Refuses values that exclude each other, or need others that are missing; InputError names the first."""
    for conflict in _conflicts(config):
        raise InputError(conflict)


def _conflicts(config: TrainConfig) -> Iterator[str]:
    """Each combination that is refused, with its error."""
    pairs, towers, loss, optim = config.pairs, config.towers, config.loss, config.optim
    run, save = config.run, config.save

    if save.overwrite and save.resume != "none":
        yield f"overwrite is True; it must be left out with --resume {save.resume}"
    # A rank whose batch lost samples has fewer micro-batches, and both of these communicate in each forward pass: the
    # other ranks would wait for it.
    for key in ("sync_bn", "fsdp"):
        if getattr(run, key) and run.micro_batch_size:
            yield f"{key} is True; it must be left out with --micro-batch-size"
    # GradScaler looks for overflow in one rank's shard and would scale each rank by another factor.
    if run.fsdp and run.precision == "fp16":
        yield "fsdp is True; it must be left out with --precision fp16 (take bf16)"
    if run.fsdp and run.compile:
        yield "fsdp is True; it must be left out with --compile"
    if run.fsdp and optim.ema:
        yield "ema keeps a whole copy of the weights, fsdp has them in shards: leave one of them out"
    if run.fsdp and _processes() == 1:
        yield "fsdp is True, but there is one process; start several with torchrun, or leave it out"
    if run.compile_backend != RunConfig.compile_backend and not run.compile:
        yield f"compile_backend is {run.compile_backend!r}, but nothing is compiled; add --compile"
    if optim.restarts != OptimConfig.restarts and optim.schedule != "cosine-restarts":
        yield (f"restarts is {optim.restarts}, but the schedule is {optim.schedule!r}; add --schedule cosine-restarts")

    sigmoid, retrieves = loss.objective.startswith("siglip"), loss.objective in RETRIEVING
    if loss.beta is not None and not retrieves:
        yield f"beta is {loss.beta}; it must be left out with {loss.objective}, which has no retrieval"
    if loss.retrieval_from and not retrieves:
        yield f"retrieval_from is {loss.retrieval_from}; it must be left out with {loss.objective}: it has no retrieval"
    if loss.retrieval_from and loss.learnable_beta:
        yield "learnable_beta is True; it must be left out with --retrieval-from: it would have no part"
    if loss.retrieval_from and pairs.holds_out and save.best == "val_loss":
        yield (
            "--retrieval-from changes the loss during the run, so --best val_loss cannot compare epochs; "
            "use --best val_recall"
        )
    if sigmoid and loss.scale == "paper":
        yield f"scale is 'paper'; it must be left out with {loss.objective}"
    if loss.bias is not None and not sigmoid:
        yield f"bias is {loss.bias}; it must be left out with {loss.objective}, in which it would cancel"
    if loss.learnable_inv_tau and loss.scale == "paper":
        yield "learnable_inv_tau is True; it must be left out with the scale paper: it would rise to its bound"

    if towers.init is not None and towers.init_image is not None:
        yield f"init is {towers.init!r}, init_image {towers.init_image!r}; a run starts from one of them"
    if towers.unlocked and towers.freeze == "none":
        yield f"unlocked is {towers.unlocked}, but no tower is frozen; add --freeze image or --freeze text"
    if loss.init_scales and towers.init is None:
        yield "init_scales needs a model that was trained; give --init"
    if towers.average_with_start is not None and towers.init is None:
        yield "average_with_start needs the trained weights of a start; give --init"

    if pairs.val_split and pairs.val_data:
        yield f"val_split is {pairs.val_split}; it must be left out with --val-data"
    if run.patience and not pairs.holds_out:
        yield (
            f"patience is {run.patience}, but there are no held-out pairs; give --val-data or --val-split, "
            "or --patience 0"
        )
    if pairs.val_every > 1 and not pairs.holds_out:
        yield f"val_every is {pairs.val_every}, but there are no held-out pairs; give --val-data or --val-split"
    if pairs.data_weights and len(pairs.data_weights) != len(pairs.data):
        yield f"data_weights is {pairs.data_weights}; it must be a number for each of the {len(pairs.data)} sources"

    if any(dataclasses.asdict(config.vectors).values()):
        yield from _conflicts_of_vectors(config)
        return
    if loss.objective == "auto":
        yield "objective is 'auto', which is for `cloob train vectors`; name one"
    if not pairs.data:
        yield (
            "data is missing; give --data with your pairs (a table such as pairs.csv, shards, or a folder of images "
            "with .txt files beside them), or --data demo for the set that comes along, or of `cloob train vectors` "
            "--a and --b"
        )
    yield from _conflicts_of_heads(config)


def _conflicts_of_vectors(config: TrainConfig) -> Iterator[str]:
    files = config.vectors
    if files.a is None or files.b is None:
        yield f"{'a' if files.a is None else 'b'} is missing: vectors need both --a and --b"
    if (files.a_ids is None) != (files.b_ids is None):
        yield f"{'a_ids' if files.a_ids is None else 'b_ids'} is missing: --a-ids and --b-ids join the rows together"
    if files.ids is not None and files.a_ids is not None:
        yield f"ids is {files.ids!r}; it must be left out with --a-ids and --b-ids"
    if config.loss.objective == "auto":
        if not config.pairs.val_split:
            yield "objective is 'auto', but there are no held-out pairs to choose by; give --val-split"
        if _processes() > 1:
            yield "objective is 'auto', which needs one process; choose with one, then train with what it chose"
        for key, value in config.loss.overrides().items():
            yield f"{key} is {value}; it must be left out with the objective auto, which tries several"
    others = {"data": config.pairs.data, "val_data": config.pairs.val_data, **vars(config.towers), **vars(config.align)}
    for key in ("data", "val_data", "model", "init", "init_image", "image_size", "image_encoder", "text_encoder"):
        if others[key]:
            yield f"{key} is {others[key]!r}, but --a and --b give vectors; leave it out"
    yield from _settings_of_towers(config)


def _conflicts_of_heads(config: TrainConfig) -> Iterator[str]:
    align, towers = config.align, config.towers
    if align.image_encoder is None and align.text_encoder is None:
        if towers.init is None:  # which may hold heads
            yield from _settings_of_heads(align)
        return
    if align.image_encoder is None or align.text_encoder is None:
        missing = "text_encoder" if align.image_encoder else "image_encoder"
        yield f"{missing} is missing: heads need both --image-encoder and --text-encoder"
    for key, value in (("model", towers.model), ("init", towers.init), ("init_image", towers.init_image)):
        if value is not None:
            yield f"{key} is {value!r}, but the encoders are given by --image-encoder and --text-encoder"
    yield from _settings_of_towers(config)


def _settings_of_towers(config: TrainConfig) -> Iterator[str]:
    """What makes no sense where nothing but heads is trained."""
    for key in ("fsdp", "compile", "grad_checkpointing"):
        if getattr(config.run, key):
            yield f"{key} is True, but heads on frozen encoders are too small for it; leave it out"
    unused = [(config.pairs, PairsConfig, key) for key in ("data_weights", "shuffle_buffer", "flip", "crop_scale")]
    for part, kind, key in (*unused, (config.optim, OptimConfig, "layer_decay")):
        if getattr(part, key) != getattr(kind, key):
            yield f"{key} is {getattr(part, key)}, but heads train on features made once; leave it out"
    if config.towers.freeze != "none":
        yield f"freeze is {config.towers.freeze!r}, but both encoders are frozen anyway; leave it out"


def _settings_of_heads(align: AlignConfig) -> Iterator[str]:
    """Settings of heads where there are none."""
    for key, value in dataclasses.asdict(align).items():
        if value not in (None, HEADS.get(key)):  # which the config.json of an earlier run has filled in
            yield f"{key} is {value}, but there are no heads; give --image-encoder and --text-encoder, or leave it out"


def check_start(config: TrainConfig, *, aligned: bool) -> None:
    """Refuses settings that do not suit what ``init`` holds: two towers, or heads on frozen encoders."""
    for conflict in _settings_of_towers(config) if aligned else _settings_of_heads(config.align):
        raise InputError(conflict)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
