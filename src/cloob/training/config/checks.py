"""What can be refused before torch is imported: what does not go together, and models
that are not there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError, refuse
from cloob.family import CONTRASTS, FAMILY
from cloob.models.source import check_name, check_packages
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEADS, LENGTHS, AlignConfig, OptimConfig

_NEEDS = (
    *(
        "a needs b",
        "b needs a",
        "ids needs a",
        "a_ids needs b_ids",
        "b_ids needs a_ids",
        "a_ids needs a",
    ),
    *("val_a needs val_b", "val_b needs val_a", "val_ids needs val_a", "val_a needs a"),
)


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as the configuration shows; files are
    checked where they are opened.
    """
    check_combination(config)
    if _processes() > 1:  # one that ended alone would leave the others waiting for it
        return
    check_packages(config.align.encoders())
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
    if config.given.given_towers is not None:
        check_without_heads(config.align)
        return
    values = {
        leaf: value
        for part in vars(config).values()
        for leaf, value in vars(part).items()
    }
    if config.has_vectors:
        _check_vectors(values)
        check_with_heads(config)
    elif config.align.encoders():
        _check_encoders(values)
        check_with_heads(config)
    elif config.towers.init is None:  # which may hold heads
        check_without_heads(config.align)


def _check_vectors(values: Mapping[str, Any]) -> None:
    """Refuses files of vectors that lack another, and settings of pictures."""
    for one, other in (pair.split(" needs ") for pair in _NEEDS):
        if values[one] and values[other] is None:
            raise InputError(
                f"{other} is missing: --{one.replace('_', '-')} needs"
                f" --{other.replace('_', '-')}"
            )
    pictures = ("data", "val_data", "model", "init", "image_size")
    for key in (*pictures, "image_encoder", "text_encoder"):
        if values[key]:
            raise InputError(
                f"{key} is {values[key]!r}, but --a and --b give vectors; leave it out"
            )


def _check_encoders(values: Mapping[str, Any]) -> None:
    """Refuses one frozen encoder alone, and other towers beside both."""
    for key in ("image_encoder", "text_encoder"):
        if values[key] is None:
            raise InputError(
                f"{key} is missing: heads need both --image-encoder and --text-encoder"
            )
    for key in ("model", "init"):
        if values[key]:
            raise InputError(
                f"{key} is {values[key]!r}, but the encoders are given by"
                " --image-encoder and --text-encoder"
            )


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
    if config.pairs.val_split and config.vectors.val_a:
        _refuse("val_split", config.pairs.val_split, "--val-a")
    files = config.vectors
    if files.ids and files.a_ids and files.b_ids:
        _refuse("ids", files.ids, "--a-ids and --b-ids")


def _check_loss(config: TrainConfig) -> None:
    """Refuses settings that the objective has no use for."""
    loss, name = config.loss, config.loss.objective
    lossless = {
        "cca": "the objective cca, which has no loss",
        "auto": "the objective auto, which tries several",
    }
    if name in lossless and loss.overrides():
        key, value = next(iter(loss.overrides().items()))
        _refuse(key, value, lossless[name])
    if config.optim.ema and name == "cca":
        _refuse("ema", config.optim.ema, "the objective cca, which takes no steps")
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
        (config.align, ("image_encoder", "text_encoder"), both),
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
    option = "--val-a" if config.has_vectors else "--val-data"
    no_pairs = f"but there are no held-out pairs; give {option} or --val-split"
    if run.patience and not config.holds_out and config.loss.objective != "cca":
        raise InputError(f"patience is {run.patience}, {no_pairs}, or --patience 0")
    if pairs.val_every > 1 and not config.holds_out:
        raise InputError(f"val_every is {pairs.val_every}, {no_pairs}")


def _check_pairs(config: TrainConfig) -> None:
    """Refuses a run without pairs, or of an objective that its pairs are not for."""
    has_heads = config.has_vectors or config.align.encoders()
    if config.loss.objective == "cca" and not has_heads:
        raise InputError(
            "objective is 'cca', which is for `cloob train vectors` and `cloob train"
            " align`; name another"
        )
    if config.loss.objective == "auto" and not has_heads:
        raise InputError(
            "objective is 'auto', but there are no heads; give --a and --b, or both"
            " encoders, or name an objective"
        )
    given = config.given.given_pairs is not None
    if not (config.pairs.data or config.has_vectors or given):
        raise InputError(
            "data is missing; give --data with your pairs (a table such as pairs.csv,"
            " shards, or a folder of images with .txt files next to them), or --data"
            " demo for the set that comes along, or of `cloob train vectors` --a and"
            " --b"
        )


def check_with_heads(config: TrainConfig) -> None:
    """Refuses settings that make no sense where nothing but heads is trained."""
    auto, members = config.loss.objective == "auto", config.align.members or 1
    if auto or members > 1:
        requested = "objective is 'auto'" if auto else f"members is {members}"
        if not config.holds_out:
            other = f"; {'name an objective' if auto else 'leave it out'}, or give"
            raise InputError(
                f"{requested}, but there are no held-out pairs to choose by{other}"
                " --val-split"
            )
        if _processes() > 1:
            raise InputError(
                f"{requested}, which needs one process; choose with one, then train"
                " with what it chose"
            )
        if config.save.best == "val_loss":
            raise InputError(
                f"best is 'val_loss', but {requested}, which goes by recall; leave"
                " --best out"
            )
    small, once = (
        "heads on frozen encoders are too small for it",
        "heads train on features made once",
    )
    for part, keys, reason in (
        (config.run, ("fsdp", "compile", "grad_checkpointing"), small),
        (config.pairs, ("shuffle_buffer", "flip", "crop_scale"), once),
        (config.optim, ("layer_decay",), once),
        (config.towers, ("freeze",), "both encoders are frozen anyway"),
    ):
        for key in keys:
            if (value := getattr(part, key)) != getattr(type(part), key):
                raise InputError(f"{key} is {value!r}, but {reason}; leave it out")


def check_without_heads(align: AlignConfig) -> None:
    """Refuses settings of heads where there are none, but for those that a config.json
    of a run has filled in.
    """
    advice = (
        "but there are no heads; give --image-encoder and --text-encoder, or --a and"
        " --b, or leave it out"
    )
    refuse(
        {
            f"{key} is {value}, {advice}": value not in (None, HEADS.get(key))
            for key, value in vars(align).items()
        }
    )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
