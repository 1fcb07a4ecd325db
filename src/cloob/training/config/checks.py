"""What can be refused before torch is imported: what does not go together, and models that are not there."""

from __future__ import annotations

import os
from typing import NoReturn

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.family import CONTRASTS, FAMILY
from cloob.models.source import check_name, check_packages
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEADS, LENGTHS, AlignConfig, OptimConfig

_NEEDS = (
    *("a needs b", "b needs a", "ids needs a", "a_ids needs b_ids", "b_ids needs a_ids", "a_ids needs a"),
    *("val_a needs val_b", "val_b needs val_a", "val_ids needs val_a", "val_a needs a"),
)


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as the configuration shows; files are checked where they are opened."""
    check_combination(config)
    if _processes() > 1:  # one that ended alone would leave the others waiting for it
        return
    check_packages(config.align.encoders())
    if config.towers.model is not None and config.towers.init is None:
        check_name(config.towers.model)


def check_combination(config: TrainConfig) -> None:
    """Refuses values that exclude each other, or need others that are missing; InputError names the first."""
    _check_run(config)
    _check_objective(config)
    _check_pairs(config)
    if config.given.given_towers is not None:
        _check_given_towers(config)
    elif config.has_vectors:
        _check_vectors(config)
        check_with_heads(config)
    elif config.align.encoders():
        _check_encoders(config)
        check_with_heads(config)
    elif config.towers.init is None:  # which may hold heads
        check_without_heads(config.align)


def wrong(message: str) -> NoReturn:
    """Raises the InputError."""
    raise InputError(message)


def _excluded(part: object, key: str, beside: str) -> NoReturn:
    wrong(f"{key} is {getattr(part, key)!r}; it must be left out with {beside}")


def _check_run(config: TrainConfig) -> None:
    run, save, optim, towers = config.run, config.save, config.optim, config.towers
    lengths = [f"{name} is {value}" for name in LENGTHS if (value := getattr(run, name)) is not None]
    if len(lengths) > 1:
        wrong(f"{' and '.join(lengths)}; give one of them, each is the length of the run")
    if save.overwrite and save.resume != "none":
        _excluded(save, "overwrite", f"--resume {save.resume}")
    # A rank whose batch lost samples has fewer micro-batches, and both of these communicate in every forward pass: the
    # other ranks would wait for it.
    for key in ("sync_bn", "fsdp"):
        if getattr(run, key) and run.micro_batch_size:
            _excluded(run, key, "--micro-batch-size")
    if run.fsdp and run.precision == "fp16":
        # GradScaler looks for overflow in one rank's shard and would scale every rank by another factor.
        _excluded(run, "fsdp", "--precision fp16 (take bf16)")
    if run.fsdp and run.compile:
        _excluded(run, "fsdp", "--compile")
    if optim.ema and (run.fsdp or config.loss.objective == "cca"):
        _excluded(optim, "ema", "--fsdp" if run.fsdp else "the objective cca, which takes no steps")
    if run.fsdp and _processes() == 1:
        wrong("fsdp is True, but there is one process; start several with torchrun, or leave it out")
    if optim.restarts != OptimConfig.restarts and optim.schedule != "cosine-restarts":
        schedule = f"the schedule is {optim.schedule!r}; add --schedule cosine-restarts"
        wrong(f"restarts is {optim.restarts}, but {schedule}")
    if towers.average_with_start is not None and towers.init is None:
        wrong("average_with_start needs the trained weights of a start; give --init")


def _check_objective(config: TrainConfig) -> None:
    loss, name = config.loss, config.loss.objective
    for key in loss.overrides() if name == "cca" else ():
        _excluded(loss, key, "the objective cca, which has no loss")
    member, paper = FAMILY.get(name), loss.scale == "paper"
    sigmoid = member is not None and not CONTRASTS[member.contrast].softmax
    retrieves = member is not None and member.hopfield
    if loss.beta and not retrieves:
        _excluded(loss, "beta", f"{name}, which has no retrieval")
    if loss.retrieval_from and not retrieves:
        _excluded(loss, "retrieval_from", f"{name}: it has no retrieval")
    if loss.retrieval_from and loss.learnable_beta:
        _excluded(loss, "learnable_beta", "--retrieval-from: it would have no part")
    if loss.retrieval_from and config.holds_out and config.save.best == "val_loss":
        wrong("--retrieval-from changes the loss, by which epochs cannot be compared then; use --best val_recall")
    if sigmoid and paper:
        _excluded(loss, "scale", name)
    if loss.bias is not None and not sigmoid:
        _excluded(loss, "bias", f"{name}, in which it would cancel")
    if loss.learnable_inv_tau and paper:
        _excluded(loss, "learnable_inv_tau", "the scale paper: it would rise to its bound")


def _check_pairs(config: TrainConfig) -> None:
    pairs, run = config.pairs, config.run
    if pairs.val_split and pairs.val_data:
        _excluded(pairs, "val_split", "--val-data")
    if pairs.val_split and any(map(is_remote, pairs.data)):
        fetched = "but streamed pairs would all be fetched to hold some out; give --val-data in its place"
        wrong(f"val_split is {pairs.val_split}, {fetched}")
    no_pairs = "but there are no held-out pairs; give --val-data or --val-split"
    if run.patience and not config.holds_out:
        wrong(f"patience is {run.patience}, {no_pairs}, or --patience 0")
    if pairs.val_every > 1 and not config.holds_out:
        wrong(f"val_every is {pairs.val_every}, {no_pairs}")
    if config.loss.objective == "cca" and not (config.has_vectors or config.align.encoders()):
        wrong("objective is 'cca', which is for `cloob train vectors` and `cloob train align`; name another")
    if config.loss.objective == "auto" and not (config.has_vectors or config.align.encoders()):
        wrong("objective is 'auto', but there are no heads; give --a and --b, or both encoders, or name an objective")
    if not pairs.data and not config.has_vectors and config.given.given_pairs is None:
        forms = "a table such as pairs.csv, shards, or a folder of images with .txt files beside them"
        others = "--data demo for the set that comes along, or of `cloob train vectors` --a and --b"
        wrong(f"data is missing; give --data with your pairs ({forms}), or {others}")


def _check_vectors(config: TrainConfig) -> None:
    files, pairs = config.vectors, config.pairs
    for one, other in (pair.split(" needs ") for pair in _NEEDS):
        if getattr(files, one) and getattr(files, other) is None:
            wrong(f"{other} is missing: --{one.replace('_', '-')} needs --{other.replace('_', '-')}")
    if files.ids and files.a_ids:
        _excluded(files, "ids", "--a-ids and --b-ids")
    if pairs.val_split and files.val_a:
        _excluded(pairs, "val_split", "--val-a")
    others = {"data": pairs.data, "val_data": pairs.val_data, **vars(config.towers), **vars(config.align)}
    for key in ("data", "val_data", "model", "init", "image_size", "image_encoder", "text_encoder"):
        if others[key]:
            wrong(f"{key} is {others[key]!r}, but --a and --b give vectors; leave it out")


def _check_encoders(config: TrainConfig) -> None:
    for missing in ("image_encoder", "text_encoder"):
        if getattr(config.align, missing) is None:
            wrong(f"{missing} is missing: heads need both --image-encoder and --text-encoder")
    for key in ("model", "init"):
        if value := getattr(config.towers, key):
            wrong(f"{key} is {value!r}, but the encoders are given by --image-encoder and --text-encoder")


def _check_given_towers(config: TrainConfig) -> None:
    """What is of our towers alone, where a caller gives others."""
    towers, align, run, optim = config.towers, config.align, config.run, config.optim
    parts = {"init": towers, "freeze": towers, "image_encoder": align, "text_encoder": align}
    inside = {"fsdp": run, "grad_checkpointing": run, "layer_decay": optim}
    for key, part in (parts | inside).items():
        if getattr(part, key) != getattr(type(part), key):
            reason = "it knows the layers of cloob's towers alone" if key in inside else "which gives both towers"
            _excluded(part, key, f"towers={':' if key in inside else ','} {reason}")


def check_with_heads(config: TrainConfig) -> None:
    """Refuses settings that make no sense where nothing but heads is trained."""
    auto, members = config.loss.objective == "auto", config.align.members or 1
    if auto or members > 1:
        requested = "objective is 'auto'" if auto else f"members is {members}"
        if not config.holds_out:
            other = "; name an objective, or give" if auto else ", or give"
            wrong(f"{requested}, but there are no held-out pairs to choose by{other} --val-split")
        if _processes() > 1:
            wrong(f"{requested}, which needs one process; choose with one, then train with what it chose")
        if config.save.best == "val_loss":
            wrong(f"best is 'val_loss', but {requested}, which goes by recall; leave --best out")
    for key in config.loss.overrides() if auto else ():
        _excluded(config.loss, key, "the objective auto, which tries several")
    for key in ("fsdp", "compile", "grad_checkpointing"):
        if getattr(config.run, key):
            wrong(f"{key} is True, but heads on frozen encoders are too small for it; leave it out")
    pairs, optim = config.pairs, config.optim
    for part, key in ((pairs, "shuffle_buffer"), (pairs, "flip"), (pairs, "crop_scale"), (optim, "layer_decay")):
        if getattr(part, key) != getattr(type(part), key):
            wrong(f"{key} is {getattr(part, key)}, but heads train on features made once; leave it out")
    if config.towers.freeze != "none":
        wrong(f"freeze is {config.towers.freeze!r}, but both encoders are frozen anyway; leave it out")


def check_without_heads(align: AlignConfig) -> None:
    """Refuses settings of heads where there are none, but for those that a config.json of a run has filled in."""
    for key, value in vars(align).items():
        if value not in (None, HEADS.get(key)):
            advice = "but there are no heads; give --image-encoder and --text-encoder, or --a and --b, or leave it out"
            wrong(f"{key} is {value}, {advice}")


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
