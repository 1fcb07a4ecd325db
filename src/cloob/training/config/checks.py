"""What can be refused before torch is imported: what does not go together, and models
that are not there.
"""

from __future__ import annotations

import os
from typing import NoReturn

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.family import CONTRASTS, FAMILY
from cloob.models.source import check_name
from cloob.training.config import TrainConfig
from cloob.training.config.parts import LENGTHS, OptimConfig


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as the configuration shows; files are
    checked where they are opened.
    """
    check_combination(config)
    if _processes() > 1:  # one that ended alone would leave the others waiting for it
        return
    if config.towers.model is not None and config.towers.init is None:
        check_name(config.towers.model)


def check_combination(config: TrainConfig) -> None:
    """Refuses values that exclude others, or need others that are missing; InputError
    names the first.
    """
    _check_excluded(config)
    _check_loss(config)
    if config.given.given_towers is not None:
        _check_given_towers(config)
    _check_run(config)
    _check_held_out(config)
    _check_pairs(config)


def _check_excluded(config: TrainConfig) -> None:
    """Refuses settings that others exclude."""
    run, save, optim = config.run, config.save, config.optim
    if save.overwrite and save.resume != "none":
        _refuse("overwrite", True, f"--resume {save.resume}")
    # A rank whose batch lost samples has fewer micro-batches, and both of these
    # communicate in every forward pass: the other ranks would wait for it.
    if run.sync_bn and run.micro_batch_size:
        _refuse("sync_bn", True, "--micro-batch-size")
    if run.fsdp and run.micro_batch_size:
        _refuse("fsdp", True, "--micro-batch-size")
    # GradScaler looks for overflow in one rank's shard and would scale every rank by
    # another factor.
    if run.fsdp and run.precision == "fp16":
        _refuse("fsdp", True, "--precision fp16 (take bf16)")
    if run.fsdp and run.compile:
        _refuse("fsdp", True, "--compile")
    if run.fsdp and optim.ema:
        _refuse("ema", optim.ema, "--fsdp")
    if config.pairs.val_split and config.pairs.val_data:
        _refuse("val_split", config.pairs.val_split, "--val-data")


def _check_loss(config: TrainConfig) -> None:
    """Refuses settings that the objective has no use for."""
    loss, name = config.loss, config.loss.objective
    member = FAMILY.get(name)
    retrieves = member is not None and member.hopfield
    sigmoid = member is not None and not CONTRASTS[member.contrast].softmax
    if loss.beta and not retrieves:
        _refuse("beta", loss.beta, f"{name}, which has no retrieval")
    if loss.retrieval_from and not retrieves:
        _refuse("retrieval_from", loss.retrieval_from, f"{name}: it has no retrieval")
    if loss.retrieval_from and loss.learnable_beta:
        _refuse("learnable_beta", True, "--retrieval-from: it would have no part")
    if sigmoid and loss.scale == "paper":
        _refuse("scale", loss.scale, name)
    if loss.bias is not None and not sigmoid:
        _refuse("bias", loss.bias, f"{name}, in which it would cancel")
    if loss.learnable_inv_tau and loss.scale == "paper":
        _refuse(
            "learnable_inv_tau", True, "the scale paper: it would rise to its bound"
        )


def _check_given_towers(config: TrainConfig) -> None:
    """Refuses what needs towers of cloob's."""
    both = "towers=, which gives both towers"
    alone = "towers=: it knows the layers of cloob's towers alone"
    for part, keys, other in (
        (config.towers, ("init", "freeze"), both),
        (config.run, ("fsdp", "grad_checkpointing", "channels_last"), alone),
        (config.optim, ("layer_decay",), alone),
    ):
        for key in keys:
            value = getattr(part, key)
            if value != getattr(type(part), key):
                _refuse(key, value, other)


def _refuse(key: str, value: object, other: str) -> NoReturn:
    raise InputError(f"{key} is {value!r}; it must be left out with {other}")


def _check_run(config: TrainConfig) -> None:
    """Refuses settings of the run that need others, which are missing."""
    run, optim, towers = config.run, config.optim, config.towers
    lengths = {name: getattr(run, name) for name in LENGTHS}
    typed = [f"{name} is {value}" for name, value in lengths.items() if value]
    if len(typed) > 1:
        raise InputError(
            f"{' and '.join(typed)}; give one of them: all are the length of the run"
        )
    if run.fsdp and _processes() == 1:
        raise InputError(
            "fsdp is True, but there is one process; start several with torchrun, or"
            " leave it out"
        )
    if optim.restarts != OptimConfig.restarts and optim.schedule != "cosine-restarts":
        raise InputError(
            f"restarts is {optim.restarts}, but the schedule is {optim.schedule!r}; add"
            " --schedule cosine-restarts"
        )
    if towers.average_with_start is not None and towers.init is None:
        raise InputError(
            "average_with_start needs the trained weights of a start; give --init"
        )


def _check_held_out(config: TrainConfig) -> None:
    """Refuses settings of the validation that its pairs cannot serve."""
    run, save, pairs = config.run, config.save, config.pairs
    own = config.given.given_metrics is not None
    if save.best not in ("val_loss", "val_recall") and not own:
        raise InputError(
            f"best is {save.best!r}; it must be one of val_loss, val_recall, or a"
            " metric of cloob.train(…, metrics=…)"
        )
    if config.holds_out and config.loss.retrieval_from and save.best == "val_loss":
        raise InputError(
            "--retrieval-from changes the loss, by which epochs cannot be compared"
            " then; use --best val_recall"
        )
    if pairs.val_split and any(map(is_remote, pairs.data)):
        raise InputError(
            f"val_split is {pairs.val_split}, but streamed pairs would all be fetched"
            " to hold some out; give --val-data in its place"
        )
    no_pairs = "but there are no held-out pairs; give --val-data or --val-split"
    if run.patience and not config.holds_out:
        raise InputError(f"patience is {run.patience}, {no_pairs}, or --patience 0")
    if pairs.val_every > 1 and not config.holds_out:
        raise InputError(f"val_every is {pairs.val_every}, {no_pairs}")


def _check_pairs(config: TrainConfig) -> None:
    """Refuses a run without pairs."""
    given = config.given.given_pairs is not None
    if not (config.pairs.data or given):
        raise InputError(
            "data is missing; give --data with your pairs (a table such as pairs.csv,"
            " shards, or a folder of images with .txt files next to them), or --data"
            " demo for the set that comes along; `cloob train vectors` takes --a and"
            " --b"
        )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
